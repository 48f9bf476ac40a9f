"""Hidden states and an output-layer shard in, loss and gradients out, chunk by chunk: full logits never exist.

Every chunk's logits are float32 straight out of the matrix product. In mode "fused" the gradients of hidden states and
weight are formed in the forward pass, so each logits product is made once; what depends on the loss comes from
``token_loss``, a function of the chunk's per-token outputs. In mode "recompute" ``token_loss`` sees all tokens at once
(sequence-level objectives) and the backward pass makes the logits again.

Left out: soft-capped or scaled logits and output biases (a model that has them must not use this path), and logits that
exist already (``kl/logits.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.distributed as dist

from megatron_s2d.buffer_sizes import CHUNKS_PER_PRODUCT, LOGITS_CHUNK_BYTES
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
    Projection,
    TeacherSource,
    Temperature,
    kind_of,
    over_temperature,
    warn_on_narrow_support,
)
from megatron_s2d.kl.torch_backend import Plan

TokenLoss = Callable[[TokenOutputs, torch.Tensor], torch.Tensor]


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    shard: VocabShard,
    outputs: tuple[str, ...],
    teacher: TeacherSource | None = None,
    beta: float | None = None,
    temperature: Temperature = 1.0,
    target_ids: torch.Tensor | None = None,
    token_loss: TokenLoss | None = None,
    weights: torch.Tensor | None = None,
    response_mask: torch.Tensor | None = None,
    sequence_parallel: bool = False,
    mode: str = "fused",
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, TokenOutputs]:
    """sum_i weights[i] * token_loss_i, differentiable in ``hidden`` and ``weight``, and detached outputs per token.

    hidden: [N, d] the same on every tensor-parallel rank, or under ``sequence_parallel`` this rank's slice [N / T, d];
    its gradient is summed over the shards here (all-reduce, or reduce-scatter). weight: [local columns, d], row i is
    global id ``shard.start + i``; rows beyond ``shard.columns`` are padding with gradient 0. float32, float64 or
    bfloat16.
    outputs: names of ``TokenOutputs`` fields. temperature: of the student, a number or [N]. target_ids: [N] int64.
    token_loss(outputs of a chunk [C] with gradients, rows: int64 [C] indices into N) -> [C]; in mode "recompute" it is
    called once with all rows. Without it nothing is differentiated and the loss is 0. It must be a pure function whose
    normalisers are already global: it runs once per chunk. The captured masses carry no gradient. weights: [N],
    default 1.
    response_mask: bool [N]; other rows are left out before any arithmetic, their outputs read 0.
    chunk_bytes: memory of the logits buffers (1 GiB on CUDA, 128 MiB on CPU); it changes results by rounding only.

    Collectives over ``shard.group``: one per chunk (two with a mixture), and the hidden gradient's in backward.
    Raises ``UserError`` for an infinite divergence, and RuntimeError on double backward.
    """
    if mode not in ("fused", "recompute"):
        raise UserError(f"mode {mode!r}: choose fused or recompute")
    warn_on_narrow_support(teacher, outputs)
    plan = make_plan(outputs, teacher=kind_of(teacher), beta=beta, has_target=target_ids is not None)
    if not plan.has_teacher and kind_of(teacher) == "dense":
        teacher = None  # nothing that was asked for depends on it, so its logits are not made
    task = _Task(plan, shard, teacher, temperature, target_ids, token_loss, weights, response_mask, sequence_parallel)
    task.chunk_bytes = chunk_bytes
    task.backend = choose_backend(backend, hidden.device, compute_dtype(hidden))
    differentiates = token_loss is not None and torch.is_grad_enabled()
    if differentiates and (hidden.requires_grad or weight.requires_grad):
        function = _Fused if mode == "fused" else _Recompute
        loss = function.apply(hidden, weight, task)
    else:
        with torch.no_grad():
            work = PendingBatch(task, hidden, weight)
            loss = work.run(whole=mode == "recompute").loss
            task.results = work.results
    return loss, TokenOutputs(**task.results)


@dataclasses.dataclass
class _Task:
    """The arguments of one call, and its per-token results."""

    plan: Plan
    shard: VocabShard
    teacher: TeacherSource | None
    temperature: Temperature
    target_ids: torch.Tensor | None
    token_loss: TokenLoss | None
    weights: torch.Tensor | None
    response_mask: torch.Tensor | None
    sequence_parallel: bool
    chunk_bytes: int | None = None
    backend: ModuleType | None = None
    results: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Gradients:
    """What a pass over all chunks leaves: the loss and, where asked for, partial gradients (float32 for the weight)."""

    loss: torch.Tensor
    hidden: torch.Tensor | None = None  # [N, d] this shard's part of the sum over shards
    weight: torch.Tensor | None = None  # [local columns, d]


class PendingBatch:
    """One pass: the rows that count, operands in the dtype of the products, and the chunk loop."""

    def __init__(self, task: _Task, hidden: torch.Tensor, weight: torch.Tensor):
        shard = task.shard
        hidden, weight = hidden.detach(), weight.detach()
        if weight.shape[0] < shard.columns:
            raise UserError(f"output layer has {weight.shape[0]} rows for a shard of {shard.columns} columns")
        if task.sequence_parallel:
            hidden = shard.gather(hidden).flatten(0, 1)
        self.task, self.num_rows, self.weight_shape = task, hidden.shape[0], weight.shape
        _check_shapes(task, self.num_rows)
        self.dtype = compute_dtype(hidden)
        self.rows = _kept_rows(task.response_mask)
        self.hidden_dtype = hidden.dtype
        hidden = self._select(hidden)
        self.temperature = self._select(task.temperature)
        self.student = Projection(hidden, weight[: shard.columns], self.temperature, self.dtype)
        self.weights = None if task.weights is None else self._select(task.weights).to(self.dtype)
        self.teacher = None
        if task.teacher is not None:
            self.teacher = PreparedTeacher(
                task.teacher, num_rows=self.num_rows, rows=self.rows, shard=shard, dtype=self.dtype
            )
        self.target = None
        if task.target_ids is not None:
            target = self._select(task.target_ids)
            check_ids(target, shard.vocab_size, "target_ids")
            self.target = shard.local(target)
        self.count = hidden.shape[0]
        self.results: dict[str, torch.Tensor] = {}

    def _select(self, value):
        return value if self.rows is None or not isinstance(value, torch.Tensor) else value[self.rows]

    def blocks(self) -> Iterator[slice]:
        """Row ranges of the chunks; the same on all ranks, so it does not depend on this shard's own width."""
        task = self.task
        columns = -(-task.shard.vocab_size // task.shard.size)
        dense = self.teacher is not None and kind_of(task.teacher) == "dense"
        budget = task.chunk_bytes or LOGITS_CHUNK_BYTES[self.student.hidden.device.type]
        size = max(1, budget // (self.dtype.itemsize * columns * (2 if dense else 1)))
        size = size // 128 * 128 if size > 128 else size
        self.chunk_rows = max(1, min(size, self.count))
        for start in range(0, self.count, size):
            yield slice(start, min(start + size, self.count))

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor, object, tuple | None]]:
        """(rows, student logits, teacher's distribution, target) of every chunk; buffers are used again by the next."""
        device, columns = self.student.hidden.device, self.task.shard.columns
        z_buffer = y_buffer = None
        for block in self.blocks():
            if z_buffer is None:
                z_buffer = torch.empty(self.chunk_rows, columns, dtype=self.dtype, device=device)
                y_buffer = torch.empty_like(z_buffer) if kind_of(self.task.teacher) == "dense" else None
            rows = block.stop - block.start
            z = self.student.logits(block, z_buffer[:rows])
            teacher = None
            if self.teacher is not None:
                teacher = self.teacher.chunk(block, None if y_buffer is None else y_buffer[:rows])
            target = None if self.target is None else (self.target[0][block], self.target[1][block])
            yield block, z, teacher, target

    def run(self, *, whole: bool = False, hidden: bool = False, weight: bool = False) -> _Gradients:
        """Evaluate all chunks; ``hidden`` and ``weight``: form those gradients too. whole: one ``token_loss`` call."""
        task, plan = self.task, self.task.plan
        compact = {name: self._new(self.count) for name in plan.outputs}
        total = self._new(())
        accumulator = _Accumulator(self, hidden, weight)
        self.evaluated: list[Evaluated] = []
        for block, z, teacher, target in self.chunks():
            evaluated = evaluate(z, teacher, target, plan, task.shard, task.backend)
            for name, value in evaluated.outputs.items():
                compact[name][block] = value
            if whole:
                self.evaluated.append(evaluated)
            elif task.token_loss is not None:
                value, cotangents = self.differentiate(evaluated.outputs, block)
                total += value
                if cotangents and (hidden or weight):
                    arguments = (block, z, teacher, target, evaluated, cotangents)
                    accumulator.add(block, self.logits_gradient(*arguments, accumulator.room(block)))
        refuse_infinite(compact)
        self.cotangents: dict[str, torch.Tensor] = {}
        if whole and task.token_loss is not None and self.count:
            total, self.cotangents = self.differentiate(compact, slice(0, self.count))
        self.results = {name: self._spread(value) for name, value in compact.items()}
        return _Gradients(total, *accumulator.finish())

    def run_backward(self, evaluated: list[Evaluated], cotangents: dict, *, hidden: bool, weight: bool) -> _Gradients:
        """Gradients from a first pass's statistics and the cotangents [count] of all tokens; logits are made again."""
        accumulator = _Accumulator(self, hidden, weight)
        if cotangents:
            for (block, z, teacher, target), kept in zip(self.chunks(), evaluated, strict=True):
                part = {name: value[block] for name, value in cotangents.items()}
                arguments = (block, z, teacher, target, kept, part)
                accumulator.add(block, self.logits_gradient(*arguments, accumulator.room(block)))
        return _Gradients(self._new(()), *accumulator.finish())

    def differentiate(self, values: dict[str, torch.Tensor], block: slice) -> tuple[torch.Tensor, dict]:
        """Weighted sum of ``token_loss`` over a chunk, and its derivative by each output."""
        rows = (
            self.rows[block]
            if self.rows is not None
            else torch.arange(block.start, block.stop, device=self.student.hidden.device)
        )
        leaves = {name: value.detach().requires_grad_(name not in MASSES) for name, value in values.items()}
        with torch.enable_grad():
            losses = self.task.token_loss(TokenOutputs(**leaves), rows)
            if losses.shape != rows.shape:
                raise UserError(f"token_loss returned shape {tuple(losses.shape)} for {rows.numel()} tokens: one each")
            value = losses.sum() if self.weights is None else (losses * self.weights[block]).sum()
        if not value.requires_grad:
            return value, {}
        open_leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        slopes = torch.autograd.grad(value, list(open_leaves.values()), allow_unused=True)
        slopes = zip(open_leaves, slopes, strict=True)
        return value.detach(), {name: slope for name, slope in slopes if slope is not None}

    def logits_gradient(self, block, z, teacher, target, evaluated: Evaluated, cotangents, out) -> torch.Tensor:
        """Gradient by the raw logits (the student's temperature divides once more), in ``out`` if that is not None."""
        if isinstance(self.temperature, torch.Tensor) or self.temperature != 1.0:
            cotangents = {k: over_temperature(v.clone(), self.temperature, block) for k, v in cotangents.items()}
        return gradient(z, teacher, target, evaluated, cotangents, self.task.plan, self.task.backend, out)

    def _new(self, shape) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.student.hidden.device)

    def _spread(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.rows is None else self._new(self.num_rows).index_copy_(0, self.rows, value)


class _Accumulator:
    """Gradients of hidden states (written once per row) and of the weight (float32 over all chunks)."""

    def __init__(self, work: PendingBatch, hidden: bool, weight: bool):
        self.work, self.columns = work, work.task.shard.columns
        student = work.student
        self.hidden = self.weight = None
        if hidden:
            self.hidden = student.hidden.new_zeros(work.count, student.hidden.shape[1], dtype=work.hidden_dtype)
        if weight:
            self.weight = student.weight.new_empty(work.weight_shape, dtype=work.dtype)
            self.weight[self.columns :] = 0.0
        self.kept = CHUNKS_PER_PRODUCT[student.hidden.device.type]
        self.buffer: torch.Tensor | None = None  # logit gradients of ``kept`` chunks, in the dtype of the products
        self.fresh, self.begin, self.end = True, 0, 0  # whether nothing was added; rows in the buffer

    def room(self, block: slice) -> torch.Tensor | None:
        """Where the gradient by the logits of ``block`` belongs; None: over the logits."""
        student = self.work.student
        if self.kept == 1 and not student.mixed:
            return None
        if self.buffer is None:
            rows = min(self.kept * self.work.chunk_rows, self.work.count)
            self.buffer = student.weight.new_empty(rows, self.columns)
        if block.start != self.end or block.stop - self.begin > len(self.buffer):
            self._flush()
            self.begin = block.start
        self.end = block.stop
        return self.buffer[block.start - self.begin : block.stop - self.begin]

    def add(self, block: slice, delta: torch.Tensor) -> None:
        """Take one chunk's gradient by logits [C, columns], which lies where ``room`` said."""
        if self.buffer is None:
            self._products(block, delta)

    def _flush(self) -> None:
        if self.end > self.begin:
            self._products(slice(self.begin, self.end), self.buffer[: self.end - self.begin])
        self.begin = self.end

    def _products(self, rows: slice, delta: torch.Tensor) -> None:
        student = self.work.student
        if self.columns == 0:
            return
        if self.hidden is not None:
            if self.hidden.dtype == delta.dtype:
                torch.mm(delta, student.weight, out=self.hidden[rows])
            else:
                self.hidden[rows] = torch.mm(delta, student.weight)
        if self.weight is not None:
            valid, beta = self.weight[: self.columns], 0.0 if self.fresh else 1.0
            if student.mixed:
                torch.addmm(valid, delta.t(), student.hidden[rows], beta=beta, out_dtype=valid.dtype, out=valid)
            else:
                torch.addmm(valid, delta.t(), student.hidden[rows], beta=beta, out=valid)
            self.fresh = False

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(hidden [N, d] or None, weight [local columns, d] or None)."""
        self._flush()
        hidden = self.hidden
        if hidden is not None and self.work.rows is not None:
            full = hidden.new_zeros(self.work.num_rows, hidden.shape[1])
            hidden = full.index_copy_(0, self.work.rows, hidden)
        if self.weight is not None and self.fresh:
            self.weight.zero_()
        return hidden, self.weight


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, task):
        work = PendingBatch(task, hidden, weight)
        ctx.gradients = work.run(hidden=ctx.needs_input_grad[0], weight=ctx.needs_input_grad[1])
        ctx.task, ctx.weight_dtype = task, weight.dtype
        task.results = work.results
        return ctx.gradients.loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        found = ctx.gradients
        if found is None:
            raise RuntimeError("the fused divergence gave its gradients away in the first backward pass")
        ctx.gradients = None
        return *_scaled(found, upstream, ctx.task, ctx.weight_dtype), None


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, task):
        work = PendingBatch(task, hidden, weight)
        loss = work.run(whole=True).loss
        ctx.task, ctx.evaluated, ctx.cotangents = task, work.evaluated, work.cotangents
        ctx.save_for_backward(hidden, weight)
        task.results = work.results
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        hidden, weight = ctx.saved_tensors
        work = PendingBatch(ctx.task, hidden, weight)
        found = work.run_backward(
            ctx.evaluated, ctx.cotangents, hidden=ctx.needs_input_grad[0], weight=ctx.needs_input_grad[1]
        )
        return *_scaled(found, upstream, ctx.task, weight.dtype), None


def _scaled(found: _Gradients, upstream: torch.Tensor, task: _Task, weight_dtype: torch.dtype):
    """Gradients times the scalar from above; the hidden part summed over the shards."""
    hidden, weight = found.hidden, found.weight
    if hidden is not None:
        hidden = reduce_hidden(hidden.mul_(upstream), task.shard, task.sequence_parallel)
    if weight is not None:
        if weight.is_cuda and weight.dtype != weight_dtype:  # one pass for product and rounding
            weight = torch.mul(weight, upstream, out=torch.empty_like(weight, dtype=weight_dtype))
        else:
            weight = weight.mul_(upstream).to(weight_dtype)
    return hidden, weight


def reduce_hidden(partial: torch.Tensor, shard: VocabShard, sequence_parallel: bool) -> torch.Tensor:
    """Sum of the shards' hidden gradients: [N, d] everywhere, or this rank's slice [N / T, d]."""
    if shard.size == 1:
        return partial
    if not sequence_parallel:
        dist.all_reduce(partial, group=shard.group)
        return partial
    mine = partial.new_empty(partial.shape[0] // shard.size, partial.shape[1])
    dist.reduce_scatter_tensor(mine, partial, group=shard.group)
    return mine


def _kept_rows(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Indices of the rows that count; None when all do."""
    if mask is None:
        return None
    rows = mask.nonzero().squeeze(1)  # the host waits for it, once
    return None if rows.numel() == mask.numel() else rows


def _check_shapes(task: _Task, num_rows: int) -> None:
    named = {"target_ids": task.target_ids, "weights": task.weights, "response_mask": task.response_mask}
    if isinstance(task.temperature, torch.Tensor):
        named["temperature"] = task.temperature
    for name, value in named.items():
        if value is not None and value.shape != (num_rows,):
            raise UserError(f"{name} has shape {tuple(value.shape)}, expected one entry for each of {num_rows} rows")
