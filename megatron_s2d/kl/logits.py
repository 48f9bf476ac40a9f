"""Divergences of vocab-parallel logits that exist already, differentiable per token; and top-k across shards.

``logits`` are [..., v_tp] before temperature, float32, float64 or bfloat16; arithmetic is float32 (float64 for
float64), chunk by chunk. The gradient has the dtype of the logits and needs no collective.

Shapes: t tokens, c tokens of a chunk, v_tp local vocabulary columns, k top-k entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.errors import UserError
from megatron_s2d.kl.chunk import (
    MEASURED,
    Evaluated,
    Target,
    choose_backend,
    compute_dtype,
    evaluate,
    gradient,
    make_plan,
    refuse_infinite,
)
from megatron_s2d.kl.merge import Plan
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.kl.shards import VocabShard, check_ids
from megatron_s2d.kl.teachers import (
    PreparedTeacher,
    TeacherSource,
    Temperature,
    kind_of,
    over_temperature,
    warn_on_narrow_support,
)
from megatron_s2d.kl.top_k import SupportChunk

_CHUNK_BYTES = {"cuda": 1 << 28, "cpu": 1 << 24}


def vocab_parallel_divergence(
    logits: torch.Tensor,
    teacher: TeacherSource | None,
    shard: VocabShard,
    outputs: tuple[str, ...],
    *,
    beta: float | None = None,
    temperature: Temperature = 1.0,
    target_ids: torch.Tensor | None = None,
    response_mask: torch.Tensor | None = None,
) -> TokenOutputs:
    """Return the ``outputs`` (names of ``TokenOutputs`` fields) of every position [...], with gradient in ``logits``.

    logits: [..., >= v_tp]; columns beyond ``shard.columns`` are padding. teacher: None for log_probs and entropy alone;
    its rows follow the flattened leading dimensions of ``logits``. response_mask: bool [...]; other positions are left
    out before any arithmetic, their outputs and gradients are 0. Other arguments as in ``linear_divergence``.
    """
    warn_on_narrow_support(teacher, outputs)
    plan = make_plan(outputs, teacher=kind_of(teacher), beta=beta, has_target=target_ids is not None)
    if not plan.has_teacher and kind_of(teacher) == "dense":
        teacher = None
    if logits.shape[-1] < shard.columns:
        raise UserError(f"logits have {logits.shape[-1]} columns for a shard of {shard.columns}")
    leading = logits.shape[:-1]
    for name, value in {"target_ids": target_ids, "response_mask": response_mask, "temperature": temperature}.items():
        if isinstance(value, torch.Tensor) and value.shape != leading:
            raise UserError(f"{name} has shape {tuple(value.shape)}, logits {tuple(leading)} positions")
    rows = None if response_mask is None else response_mask.reshape(-1).nonzero().squeeze(1)
    if isinstance(temperature, torch.Tensor):
        temperature = _select(temperature, rows)
    target = None
    if target_ids is not None:
        target_ids = _select(target_ids, rows)
        check_ids(target_ids, shard.vocab_size, "target_ids")
        target = shard.local(target_ids)
    pass_ = _LogitsPass(plan, shard, teacher, temperature, target, rows)
    values: tuple[torch.Tensor, ...] = _VocabParallel.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        logits.reshape(-1, logits.shape[-1]), pass_
    )
    return TokenOutputs(**{name: value.view(leading) for name, value in zip(plan.outputs, values, strict=True)})


def _select(values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Return ``values`` [...] of all positions, flat, at the active ``rows`` (None: all)."""
    return values.reshape(-1) if rows is None else values.reshape(-1)[rows]


class _LogitsPass:
    """One evaluation of logits [t, >= v_tp]; stores what its backward pass needs beside them."""

    def __init__(
        self,
        plan: Plan,
        shard: VocabShard,
        source: TeacherSource | None,
        temperature: Temperature,
        target: Target | None,
        rows: torch.Tensor | None,
    ) -> None:
        """temperature, target: of the active positions ``rows`` alone (None: all)."""
        self.plan, self.shard, self.source, self.temperature, self.target = plan, shard, source, temperature, target
        self.rows = rows
        self.teacher: PreparedTeacher | None = None
        self.evaluated: list[Evaluated] = []

    def prepare(self, logits: torch.Tensor) -> None:
        """Bind the teacher and the backend to the logits' rows, dtype and device."""
        self.dtype = compute_dtype(logits)
        self.backend = choose_backend("auto", logits.device, self.dtype)
        if self.source is not None:
            self.teacher = PreparedTeacher(
                self.source, num_rows=logits.shape[0], rows=self.rows, shard=self.shard, dtype=self.dtype
            )

    def chunks(
        self, logits: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | SupportChunk | None, Target | None]]:
        """Yield (active rows, float32 logits over temperature, teacher's distribution, target) of every chunk."""
        for block, z in scaled_chunks(logits, self.shard, self.temperature, self.dtype, self.rows):
            teacher = None if self.teacher is None else self.teacher.chunk(block, torch.empty_like(z))
            target = None if self.target is None else (self.target[0][block], self.target[1][block])
            yield block, z, teacher, target

    def positions(self, block: slice) -> slice | torch.Tensor:
        """Return the indices of a block of active rows among all positions."""
        return block if self.rows is None else self.rows[block]


def scaled_chunks(
    logits: torch.Tensor,
    shard: VocabShard,
    temperature: Temperature,
    dtype: torch.dtype,
    rows: torch.Tensor | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, copy of the valid columns in ``dtype`` over temperature); chunks are the same on all ranks.

    rows: indices of the active rows (None: all); blocks, and a temperature per row, index into these.
    """
    columns = ceil_div(shard.vocab_size, shard.size)
    size = max(1, _CHUNK_BYTES[logits.device.type] // (dtype.itemsize * columns))
    count = logits.shape[0] if rows is None else rows.numel()
    for start in range(0, count, size):
        block = slice(start, min(start + size, count))
        part = logits[block if rows is None else rows[block], : shard.columns]
        z = part.to(dtype, copy=rows is None, memory_format=torch.contiguous_format).contiguous()
        yield block, over_temperature(z, temperature, block)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, pass_: _LogitsPass) -> tuple[torch.Tensor, ...]:
        pass_.prepare(logits)
        results = {name: logits.new_zeros(logits.shape[0], dtype=pass_.dtype) for name in pass_.plan.outputs}
        for block, z, teacher, target in pass_.chunks(logits):
            evaluated = evaluate(z, teacher, target, pass_.plan, pass_.shard, pass_.backend)
            for name, value in evaluated.outputs.items():
                results[name][pass_.positions(block)] = value
            pass_.evaluated.append(evaluated)
        refuse_infinite([results])
        ctx.save_for_backward(logits)
        ctx.pass_ = pass_
        ctx.mark_non_differentiable(*(value for name, value in results.items() if name in MEASURED))
        return tuple(results.values())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        (logits,), pass_ = ctx.saved_tensors, ctx.pass_
        result = torch.zeros_like(logits)
        for (block, z, teacher, target), evaluated in zip(pass_.chunks(logits), pass_.evaluated, strict=True):
            positions = pass_.positions(block)
            cotangents = {
                name: over_temperature(slope[positions].clone(), pass_.temperature, block)
                for name, slope in zip(pass_.plan.outputs, upstream, strict=True)
                if slope is not None and name not in MEASURED
            }
            delta = gradient(z, teacher, target, evaluated, cotangents, pass_.plan, pass_.backend)
            result[positions, : pass_.shard.columns] = delta.to(result.dtype)
        return result, None


@torch.no_grad()
def vocab_parallel_topk(
    logits: torch.Tensor, k: int, shard: VocabShard, temperature: Temperature = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the k most likely tokens over all shards: ids [t, k] int64, log-probabilities [t, k], log tail mass [t].

    logits: [t, >= v_tp]. Most likely first; no gradient. One all-gather of k values and ids per token and shard. The
    tail is the sum outside the shards' candidates plus the candidates that were not selected, never 1 - sum.
    """
    if not 1 <= k <= shard.vocab_size:
        raise UserError(f"top-k with k = {k}: choose between 1 and the vocabulary size {shard.vocab_size}")
    dtype = compute_dtype(logits)
    parts = [_chunk_topk(z, k, shard) for _, z in scaled_chunks(logits, shard, temperature, dtype)]
    if not parts:
        empty = logits.new_zeros(0, k, dtype=dtype)
        return empty.long(), empty, empty[:, 0]
    ids, log_probs, tail = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(log_probs), torch.cat(tail)


def _chunk_topk(z: torch.Tensor, k: int, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lowest = torch.finfo(z.dtype).min  # replaces a real column's -inf; a shard narrower than k is padded with -inf
    integer = torch.int64 if z.dtype == torch.float64 else torch.int32
    values = z.new_full((z.shape[0], k), -torch.inf)
    ids = torch.zeros(z.shape[0], k, dtype=integer, device=z.device)
    outside_sum = z.new_zeros(z.shape[0], 1)
    width = min(k, z.shape[1])
    if width:
        top, columns = z.clamp(min=lowest).topk(width, dim=1)
        values[:, :width], ids[:, :width] = top, columns.to(integer) + shard.start
        outside_sum = (z - top[:, :1]).exp_().scatter_(1, columns, 0.0).sum(1, keepdim=True)
    # One gather for values and ids: the ids' bits travel as floats of the same width.
    gathered = shard.gather(torch.cat([values, ids.view(z.dtype), outside_sum], dim=1))
    values = gathered[:, :, :k].transpose(0, 1).flatten(1)  # [c, tp * k] in rank order
    ids = gathered[:, :, k : 2 * k].contiguous().view(integer).transpose(0, 1).flatten(1)
    best, indices = values.topk(k, dim=1)
    maximum = best[:, :1]
    candidates = (values - maximum).exp().scatter_(1, indices, 0.0).sum(1)
    outside = (gathered[:, :, 0] - maximum.t()).exp() * gathered[:, :, 2 * k]
    tail = outside.sum(0) + candidates
    selected = (best - maximum).exp()
    log_sum = torch.log1p(selected[:, 1:].sum(1) + tail)  # the maximum's own term is the 1
    log_probs = ((best - maximum) - log_sum.unsqueeze(1)).masked_fill_(best == lowest, -torch.inf)
    return ids.gather(1, indices).long(), log_probs, tail.log() - log_sum


@torch.no_grad()
def vocab_parallel_support(
    logits: torch.Tensor, ids: torch.Tensor, shard: VocabShard, temperature: Temperature = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities [t, k] of distinct global ``ids`` [t, k], and the log mass [t] of all other tokens.

    For a support selected by another model, such as the student's top-k under the teacher. No gradient; one all-gather.
    """
    check_ids(ids, shard.vocab_size, "ids")
    local, owned = shard.local(ids.long())
    dtype = compute_dtype(logits)
    on, off = [], []
    for block, z in scaled_chunks(logits, shard, temperature, dtype):
        gathered = shard.gather(_support_part(z, local[block], owned[block]))
        maxima = gathered[:, :, 0]
        maximum = maxima.max(0).values
        outside = ((maxima - maximum).exp() * gathered[:, :, 1]).sum(0)
        picked = gathered[:, :, 2:].max(0).values - maximum.unsqueeze(1)  # entries of other ranks are -inf
        log_sum = (picked.exp().sum(1) + outside).log()
        on.append(picked - log_sum.unsqueeze(1))
        off.append(outside.log() - log_sum)
    return torch.cat(on), torch.cat(off)


def _support_part(z: torch.Tensor, local: torch.Tensor, owned: torch.Tensor) -> torch.Tensor:
    """Return [c, 2 + k]: maximum, sum of exponentials off the support, logits on it (-inf for other ranks' ids)."""
    if z.shape[1] == 0:
        part = z.new_full((z.shape[0], 2 + local.shape[1]), -torch.inf)
        part[:, 1] = 0.0
        return part
    picked = z.gather(1, local).masked_fill_(~owned, -torch.inf)
    maximum = z.amax(1, keepdim=True)
    outside = (z - maximum.clamp(min=torch.finfo(z.dtype).min)).exp_()
    rows, entries = owned.nonzero(as_tuple=True)
    outside[rows, local[rows, entries]] = 0.0
    return torch.cat([maximum, outside.sum(1, keepdim=True), picked], dim=1)
