"""The same quantities for vocab-parallel logits that exist already, differentiable per token; and top-k across shards.

``logits`` are [..., local columns] before temperature, of any float dtype; arithmetic is float32 (float64 for float64),
chunk by chunk. The gradient comes back in the dtype of the logits, exact for this shard's columns without a collective.
``response_mask`` (bool [...]): other positions are left out before any arithmetic; they read 0 and get gradient 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_s2d.errors import UserError
from megatron_s2d.kl.chunk import (
    MASSES,
    Evaluated,
    choose_backend,
    compute_dtype,
    evaluate,
    gradient,
    make_plan,
    refuse_infinite,
)
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
from megatron_s2d.kl.torch_backend import Plan

_CHUNK_BYTES = {"cuda": 1 << 28, "cpu": 1 << 24}


def vocab_parallel_log_probs(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    shard: VocabShard,
    temperature: Temperature = 1.0,
    response_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """log p(target) [...] of ``target_ids`` [...] (global ids), with gradient."""
    options = {"temperature": temperature, "target_ids": target_ids, "response_mask": response_mask}
    return _all(logits, shard, ("log_probs",), **options).log_probs


def vocab_parallel_entropy(
    logits: torch.Tensor,
    shard: VocabShard,
    temperature: Temperature = 1.0,
    response_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Entropy [...] in nats, with gradient."""
    return _all(logits, shard, ("entropy",), temperature=temperature, response_mask=response_mask).entropy


def vocab_parallel_divergence(
    logits: torch.Tensor,
    teacher: TeacherSource,
    shard: VocabShard,
    outputs: tuple[str, ...],
    *,
    beta: float | None = None,
    temperature: Temperature = 1.0,
    target_ids: torch.Tensor | None = None,
    response_mask: torch.Tensor | None = None,
) -> TokenOutputs:
    """The ``outputs`` (names of ``TokenOutputs`` fields) [...], with gradient in ``logits``.

    A teacher's rows follow the flattened leading dimensions of ``logits``. Other arguments as ``linear_divergence``.
    """
    warn_on_narrow_support(teacher, outputs)
    options = {"temperature": temperature, "target_ids": target_ids, "response_mask": response_mask}
    return _all(logits, shard, outputs, teacher=teacher, beta=beta, **options)


def _all(
    logits, shard, outputs, *, teacher=None, beta=None, temperature=1.0, target_ids=None, response_mask=None
) -> TokenOutputs:
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
    temperature, target_ids = _kept(temperature, rows), _kept(target_ids, rows)
    if target_ids is not None:
        check_ids(target_ids, shard.vocab_size, "target_ids")
        target_ids = shard.local(target_ids)
    work = _LogitsWork(plan, shard, teacher, temperature, target_ids, rows)
    values = _VocabParallel.apply(logits.reshape(-1, logits.shape[-1]), work)
    return TokenOutputs(**{name: value.view(leading) for name, value in zip(plan.outputs, values, strict=True)})


def _kept(value, rows: torch.Tensor | None):
    """A tensor [...] of all positions as [rows that are kept]; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.reshape(-1) if rows is None else value.reshape(-1)[rows]


class _LogitsWork:
    """One evaluation of whole logits; keeps what its backward pass needs beside them."""

    def __init__(
        self, plan: Plan, shard: VocabShard, teacher, temperature: Temperature, target, rows: torch.Tensor | None
    ):
        """temperature, target: of the positions ``rows`` [kept] alone (None: all)."""
        self.plan, self.shard, self.source, self.temperature, self.target = plan, shard, teacher, temperature, target
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

    def chunks(self, logits: torch.Tensor) -> Iterator[tuple]:
        """(rows among those kept, float32 logits over temperature, teacher's distribution, target) of every chunk."""
        for block, z in scaled_chunks(logits, self.shard, self.temperature, self.dtype, self.rows):
            teacher = None if self.teacher is None else self.teacher.chunk(block, torch.empty_like(z))
            target = None if self.target is None else (self.target[0][block], self.target[1][block])
            yield block, z, teacher, target

    def places(self, block: slice) -> slice | torch.Tensor:
        """Where a block of kept rows lies among all positions."""
        return block if self.rows is None else self.rows[block]


def scaled_chunks(
    logits: torch.Tensor,
    shard: VocabShard,
    temperature: Temperature,
    dtype: torch.dtype,
    rows: torch.Tensor | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, copy of the valid columns in ``dtype`` over temperature); the cut is the same on all ranks.

    rows: indices of the rows that are kept (None: all); the blocks and a temperature per row count among these.
    """
    columns = -(-shard.vocab_size // shard.size)
    size = max(1, _CHUNK_BYTES[logits.device.type] // (dtype.itemsize * columns))
    count = logits.shape[0] if rows is None else rows.numel()
    for start in range(0, count, size):
        block = slice(start, min(start + size, count))
        part = logits[block if rows is None else rows[block], : shard.columns]
        z = part.to(dtype, copy=rows is None, memory_format=torch.contiguous_format).contiguous()
        yield block, over_temperature(z, temperature, block)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, work):
        work.prepare(logits)
        found = {name: logits.new_zeros(logits.shape[0], dtype=work.dtype) for name in work.plan.outputs}
        for block, z, teacher, target in work.chunks(logits):
            evaluated = evaluate(z, teacher, target, work.plan, work.shard, work.backend)
            for name, value in evaluated.outputs.items():
                found[name][work.places(block)] = value
            work.evaluated.append(evaluated)
        refuse_infinite(found)
        ctx.save_for_backward(logits)
        ctx.work = work
        ctx.mark_non_differentiable(*(value for name, value in found.items() if name in MASSES))
        return tuple(found.values())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        (logits,), work = ctx.saved_tensors, ctx.work
        result = torch.zeros_like(logits)
        for (block, z, teacher, target), kept in zip(work.chunks(logits), work.evaluated, strict=True):
            slopes = zip(work.plan.outputs, upstream, strict=True)
            cotangents = {
                name: over_temperature(slope[work.places(block)].clone(), work.temperature, block)
                for name, slope in slopes
                if slope is not None and name not in MASSES
            }
            slope = gradient(z, teacher, target, kept, cotangents, work.plan, work.backend)
            result[work.places(block), : work.shard.columns] = slope.to(result.dtype)
        return result, None


@torch.no_grad()
def vocab_parallel_topk(
    logits: torch.Tensor, k: int, shard: VocabShard, temperature: Temperature = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most likely tokens across all shards: ids [N, k] int64, log-probabilities [N, k], log tail mass [N].

    logits: [N, local columns]. Most likely first; no gradient. One all-gather of k values and ids per token and shard:
    the tail is the sum outside the shards' own candidates plus the candidates that were not chosen, never 1 - sum.
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
    lowest = torch.finfo(z.dtype).min  # stands for a real column's -inf; a shard narrower than k fills up with -inf
    integer = torch.int64 if z.dtype == torch.float64 else torch.int32
    values = z.new_full((z.shape[0], k), -torch.inf)
    ids = torch.zeros(z.shape[0], k, dtype=integer, device=z.device)
    rest = z.new_zeros(z.shape[0], 1)
    width = min(k, z.shape[1])
    if width:
        top, columns = z.clamp(min=lowest).topk(width, dim=1)
        values[:, :width], ids[:, :width] = top, columns.to(integer) + shard.start
        rest = (z - top[:, :1]).exp_().scatter_(1, columns, 0.0).sum(1, keepdim=True)
    gathered = shard.gather(torch.cat([values, ids.view(z.dtype), rest], dim=1))
    values = gathered[:, :, :k].transpose(0, 1).flatten(1)  # [C, T k] in rank order
    ids = gathered[:, :, k : 2 * k].contiguous().view(integer).transpose(0, 1).flatten(1)
    best, places = values.topk(k, dim=1)
    maximum = best[:, :1]
    candidates = (values - maximum).exp().scatter_(1, places, 0.0).sum(1)
    outside = (gathered[:, :, 0] - maximum.t()).exp() * gathered[:, :, 2 * k]
    tail = outside.sum(0) + candidates
    chosen = (best - maximum).exp()
    log_sum = torch.log1p(chosen[:, 1:].sum(1) + tail)  # the maximum's own term is the 1
    log_probs = ((best - maximum) - log_sum.unsqueeze(1)).masked_fill_(best == lowest, -torch.inf)
    return ids.gather(1, places).long(), log_probs, tail.log() - log_sum


@torch.no_grad()
def vocab_parallel_support(
    logits: torch.Tensor, ids: torch.Tensor, shard: VocabShard, temperature: Temperature = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [N, k] of given distinct ``ids`` [N, k] (global) and the log mass [N] of all other tokens.

    For a support that another model chose, such as the student's top-k under the teacher. No gradient; one all-gather.
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
        picked = gathered[:, :, 2:].max(0).values - maximum.unsqueeze(1)  # foreign entries are -inf
        log_sum = (picked.exp().sum(1) + outside).log()
        on.append(picked - log_sum.unsqueeze(1))
        off.append(outside.log() - log_sum)
    return torch.cat(on), torch.cat(off)


def _support_part(z: torch.Tensor, local: torch.Tensor, owned: torch.Tensor) -> torch.Tensor:
    """[C, 2 + k]: maximum, sum of exponentials off the support, logits on it (-inf where foreign)."""
    if z.shape[1] == 0:
        part = z.new_full((z.shape[0], 2 + local.shape[1]), -torch.inf)
        part[:, 1] = 0.0
        return part
    picked = z.gather(1, local).masked_fill_(~owned, -torch.inf)
    maximum = z.amax(1, keepdim=True)
    rest = (z - maximum.clamp(min=torch.finfo(z.dtype).min)).exp_()
    rows, places = owned.nonzero(as_tuple=True)
    rest[rows, local[rows, places]] = 0.0
    return torch.cat([maximum, rest.sum(1, keepdim=True), picked], dim=1)
