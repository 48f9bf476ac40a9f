"""The output layer fused with a divergence: hidden states and a weight shard in, loss and gradients out.

Full logits never exist: tokens are processed in chunks, each chunk's logits come in float32 straight out of the matrix
product, and the gradients of hidden states and weight are formed in the forward pass, so each logits product is made
once. The part that depends on the loss comes from ``token_loss``, a function of the chunk's per-token outputs.

Not supported: soft-capped or scaled logits and output biases (a model that has them must not use this function). For
logits that exist already see ``kl/logits.py``.

Shapes: t tokens, c tokens of a chunk, v_tp local vocabulary columns, h hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.buffer_sizes import CHUNKS_PER_PRODUCT, LOGITS_CHUNK_BYTES
from megatron_s2d.errors import UserError
from megatron_s2d.kl.chunk import (
    MEASURED,
    Backend,
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
    Projection,
    TeacherSource,
    Temperature,
    kind_of,
    over_temperature,
    warn_on_narrow_support,
)
from megatron_s2d.kl.top_k import SupportChunk
from megatron_s2d.matrix_products import add_weight_gradient, linear_out

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
    response_mask: torch.Tensor | None = None,
    response_rows: torch.Tensor | None = None,
    sequence_parallel: bool = False,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    check_values: bool = True,
) -> tuple[torch.Tensor, TokenOutputs]:
    """Return the sum of ``token_loss`` over tokens, differentiable in ``hidden`` and ``weight``, and detached outputs.

    hidden: [t, h], the same on every tensor-parallel rank, or under ``sequence_parallel`` this rank's slice
    [t / tp, h]; its gradient is summed over the shards here (all-reduce, or reduce-scatter). weight: [>= v_tp, h], row
    i is global id ``shard.start + i``; rows beyond ``shard.columns`` are padding with gradient 0. float32, float64 or
    bfloat16.
    outputs: names of ``TokenOutputs`` fields. teacher: needed by divergences. beta: of a mixture (jsd, skew), between 0
    and 1. temperature: of the student, a number or [t]. target_ids: int64 [t], needed by log_probs.
    token_loss(outputs of a chunk [c] with gradients, rows: int64 [c] indices into t) -> [c]. It must be a pure function
    whose normalisers are already global, because it runs once per chunk. Without it the loss is 0 and nothing is
    differentiated. Masses and the teacher's log-probabilities carry no
    gradient.
    response_mask: bool [t]; other rows are left out before any arithmetic, their outputs are 0. response_rows: the same
    as increasing indices, int64 [c], instead of the mask: their number is known without a wait for the device.
    chunk_bytes: memory of the logits buffers (default 1 GiB on CUDA, 128 MiB on CPU); it changes results by rounding
    only. backend: "auto" (Triton for float32 logits on CUDA), "torch" or "triton".
    check_values: refuse target ids outside of the vocabulary and infinite divergences. Each check waits for the device;
    a caller with several micro-batches can check ids on the host, and divergences by ``refuse_infinite`` once for all.

    Collectives over ``shard.group``: one per chunk (two with a mixture), and the hidden gradient's in backward.
    Raises ``UserError`` for what is checked, and RuntimeError on a second or a double backward pass.
    """
    warn_on_narrow_support(teacher, outputs)
    plan = make_plan(outputs, teacher=kind_of(teacher), beta=beta, has_target=target_ids is not None)
    if not plan.has_teacher and kind_of(teacher) == "dense":
        teacher = None  # no requested output depends on it, so its logits are not computed
    module = choose_backend(backend, hidden.device, compute_dtype(hidden))
    inputs = (plan, shard, teacher, temperature, target_ids, token_loss, response_mask, response_rows)
    call = _Call(*inputs, sequence_parallel, chunk_bytes, module, check_values)
    if token_loss is not None and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: torch.Tensor = _Fused.apply(hidden, weight, call)  # type: ignore[no-untyped-call]  # torch does not annotate it
    else:
        with torch.no_grad():
            pass_ = _Pass(call, hidden, weight)
            loss = pass_.run().loss
            call.results = pass_.results
    return loss, TokenOutputs(**call.results)


@dataclasses.dataclass
class _Call:
    """The arguments of one call, and its per-token results."""

    plan: Plan
    shard: VocabShard
    teacher: TeacherSource | None
    temperature: Temperature
    target_ids: torch.Tensor | None
    token_loss: TokenLoss | None
    response_mask: torch.Tensor | None
    response_rows: torch.Tensor | None
    sequence_parallel: bool
    chunk_bytes: int | None
    backend: Backend
    check_values: bool
    results: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _LossAndGradients:
    """Result of a pass over all chunks: the loss and the requested partial gradients (float32 for the weight)."""

    loss: torch.Tensor
    hidden: torch.Tensor | None = None  # [t, h] this shard's part of the sum over shards
    weight: torch.Tensor | None = None  # [>= v_tp, h]


class _Pass:
    """One pass over the tokens: the active rows, the operands in the dtype of the products, and the chunk loop."""

    def __init__(self, call: _Call, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        shard = call.shard
        hidden, weight = hidden.detach(), weight.detach()
        if weight.shape[0] < shard.columns:
            raise UserError(f"output layer has {weight.shape[0]} rows for a shard of {shard.columns} columns")
        if call.sequence_parallel:
            hidden = shard.gather(hidden).flatten(0, 1)
        self.call, self.num_rows, self.weight_shape = call, hidden.shape[0], weight.shape
        _check_shapes(call, self.num_rows)
        self.dtype = compute_dtype(hidden)
        self.rows = _active_rows(call)
        if self.rows is not None and self.rows.numel() == self.num_rows:
            self.rows = None
        self.hidden_dtype = hidden.dtype
        hidden = self._select(hidden)
        self.temperature = (
            self._select(call.temperature) if isinstance(call.temperature, torch.Tensor) else call.temperature
        )
        self.student = Projection(hidden, weight[: shard.columns], self.temperature, self.dtype)
        self.teacher = None
        if call.teacher is not None:
            self.teacher = PreparedTeacher(
                call.teacher, num_rows=self.num_rows, rows=self.rows, shard=shard, dtype=self.dtype
            )
        self.target: Target | None = None
        if call.target_ids is not None:
            target = self._select(call.target_ids)
            if call.check_values:
                check_ids(target, shard.vocab_size, "target_ids")
            self.target = shard.local(target)
        self.count = hidden.shape[0]
        self.results: dict[str, torch.Tensor] = {}

    def _select(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.rows is None else values[self.rows]

    def blocks(self) -> Iterator[slice]:
        """Yield the row ranges of the chunks: the same on all ranks, so independent of this shard's own width."""
        call = self.call
        columns = ceil_div(call.shard.vocab_size, call.shard.size)
        dense = self.teacher is not None and kind_of(call.teacher) == "dense"
        budget = call.chunk_bytes or LOGITS_CHUNK_BYTES[self.student.hidden.device.type]
        size = max(1, budget // (self.dtype.itemsize * columns * (2 if dense else 1)))
        size = size // 128 * 128 if size > 128 else size
        self.chunk_rows = max(1, min(size, self.count))
        for start in range(0, self.count, size):
            yield slice(start, min(start + size, self.count))

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | SupportChunk | None, Target | None]]:
        """Yield (rows, student logits, teacher's distribution, target) of each chunk; buffers are reused."""
        device, columns = self.student.hidden.device, self.call.shard.columns
        z_buffer = y_buffer = None
        for block in self.blocks():
            if z_buffer is None:
                z_buffer = torch.empty(self.chunk_rows, columns, dtype=self.dtype, device=device)
                y_buffer = torch.empty_like(z_buffer) if kind_of(self.call.teacher) == "dense" else None
            rows = block.stop - block.start
            z = self.student.logits(block, z_buffer[:rows])
            teacher = None
            if self.teacher is not None:
                teacher = self.teacher.chunk(block, None if y_buffer is None else y_buffer[:rows])
            target = None if self.target is None else (self.target[0][block], self.target[1][block])
            yield block, z, teacher, target

    def run(self, *, hidden: bool = False, weight: bool = False) -> _LossAndGradients:
        """Evaluate all chunks; ``hidden`` and ``weight``: form those gradients too."""
        call, plan = self.call, self.call.plan
        values = {name: self._zeros(self.count) for name in plan.outputs}
        total = self._zeros(())
        accumulator = _GradientAccumulator(self, hidden, weight)
        for block, z, teacher, target in self.chunks():
            evaluated = evaluate(z, teacher, target, plan, call.shard, call.backend)
            for name, value in evaluated.outputs.items():
                values[name][block] = value
            if call.token_loss is None:
                continue
            loss, cotangents = self._differentiate(call.token_loss, evaluated.outputs, block)
            total += loss
            if cotangents and (hidden or weight):
                out = accumulator.buffer_for(block)
                accumulator.add(block, self._logits_gradient(block, z, teacher, target, evaluated, cotangents, out))
        if call.check_values:
            refuse_infinite([values])
        self.results = {name: self._spread(value) for name, value in values.items()}
        return _LossAndGradients(total, *accumulator.finish())

    def _differentiate(
        self, token_loss: TokenLoss, values: dict[str, torch.Tensor], block: slice
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the sum of ``token_loss`` over a chunk, and its derivative by each output [c]."""
        rows = (
            self.rows[block]
            if self.rows is not None
            else torch.arange(block.start, block.stop, device=self.student.hidden.device)
        )
        leaves = {name: value.detach().requires_grad_(name not in MEASURED) for name, value in values.items()}
        with torch.enable_grad():
            losses = token_loss(TokenOutputs(**leaves), rows)
            if losses.shape != rows.shape:
                raise UserError(
                    f"token_loss returned shape {tuple(losses.shape)} for {rows.numel()} tokens: return one per token"
                )
            total = losses.sum()
        if not total.requires_grad:
            return total, {}
        differentiable = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        slopes = torch.autograd.grad(total, list(differentiable.values()), allow_unused=True)
        named = zip(differentiable, slopes, strict=True)
        return total.detach(), {name: slope for name, slope in named if slope is not None}

    def _logits_gradient(
        self,
        block: slice,
        z: torch.Tensor,
        teacher: torch.Tensor | SupportChunk | None,
        target: Target | None,
        evaluated: Evaluated,
        cotangents: dict[str, torch.Tensor],
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the gradient by the logits before the student's temperature, in ``out`` if given."""
        if isinstance(self.temperature, torch.Tensor) or self.temperature != 1.0:
            cotangents = {k: over_temperature(v.clone(), self.temperature, block) for k, v in cotangents.items()}
        return gradient(z, teacher, target, evaluated, cotangents, self.call.plan, self.call.backend, out)

    def _zeros(self, shape: int | tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.student.hidden.device)

    def _spread(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.rows is None else self._zeros(self.num_rows).index_copy_(0, self.rows, value)


class _GradientAccumulator:
    """Gradients of hidden states (written once per row) and of the weight (summed in float32 over all chunks)."""

    def __init__(self, pass_: _Pass, hidden: bool, weight: bool) -> None:
        self.pass_, self.columns = pass_, pass_.call.shard.columns
        student = pass_.student
        self.hidden: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None
        if hidden:
            self.hidden = student.hidden.new_zeros(pass_.count, student.hidden.shape[1], dtype=pass_.hidden_dtype)
        if weight:
            self.weight = student.weight.new_empty(pass_.weight_shape, dtype=pass_.dtype)
            self.weight[self.columns :] = 0.0
        self.num_chunks = CHUNKS_PER_PRODUCT[student.hidden.device.type]
        self.buffer: torch.Tensor | None = (
            None  # logit gradients of ``num_chunks`` chunks, in the dtype of the products
        )
        self.is_empty, self.begin, self.end = True, 0, 0  # whether the weight gradient is unset; rows in the buffer

    def buffer_for(self, block: slice) -> torch.Tensor | None:
        """Return where to write the gradient by the logits of ``block``; None: over the logits."""
        student = self.pass_.student
        if self.num_chunks == 1 and not student.mixed:
            return None
        if self.buffer is None:
            rows = min(self.num_chunks * self.pass_.chunk_rows, self.pass_.count)
            self.buffer = student.weight.new_empty(rows, self.columns)
        if block.start != self.end or block.stop - self.begin > len(self.buffer):
            self._flush()
            self.begin = block.start
        self.end = block.stop
        return self.buffer[block.start - self.begin : block.stop - self.begin]

    def add(self, block: slice, delta: torch.Tensor) -> None:
        """Add one chunk's gradient by logits [c, v_tp], written to the buffer that ``buffer_for`` returned."""
        if self.buffer is None:
            self._multiply(block, delta)

    def _flush(self) -> None:
        if self.buffer is not None and self.end > self.begin:
            self._multiply(slice(self.begin, self.end), self.buffer[: self.end - self.begin])
        self.begin = self.end

    def _multiply(self, rows: slice, delta: torch.Tensor) -> None:
        student = self.pass_.student
        if self.columns == 0:
            return
        if self.hidden is not None:
            if self.hidden.dtype == delta.dtype:
                linear_out(delta, student.weight.t(), self.hidden[rows])
            else:
                self.hidden[rows] = torch.mm(delta, student.weight)
        if self.weight is not None:
            valid = self.weight[: self.columns]
            if student.mixed:
                beta = 0.0 if self.is_empty else 1.0
                torch.addmm(valid, delta.t(), student.hidden[rows], beta=beta, out_dtype=valid.dtype, out=valid)
            else:
                add_weight_gradient(valid, delta, student.hidden[rows], is_first=self.is_empty)
            self.is_empty = False

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return (hidden [t, h] or None, weight [>= v_tp, h] or None)."""
        self._flush()
        hidden = self.hidden
        if hidden is not None and self.pass_.rows is not None:
            full = hidden.new_zeros(self.pass_.num_rows, hidden.shape[1])
            hidden = full.index_copy_(0, self.pass_.rows, hidden)
        if self.weight is not None and self.is_empty:
            self.weight.zero_()
        return hidden, self.weight


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, call: _Call) -> torch.Tensor:
        pass_ = _Pass(call, hidden, weight)
        ctx.gradients = pass_.run(hidden=ctx.needs_input_grad[0], weight=ctx.needs_input_grad[1])
        ctx.call, ctx.weight_dtype = call, weight.dtype
        call.results = pass_.results
        loss: torch.Tensor = ctx.gradients.loss.clone()
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Scale the stored gradients by the scalar from above and sum the hidden part over the shards."""
        gradients: _LossAndGradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("the fused divergence released its gradients in the first backward pass")
        ctx.gradients = None
        hidden, weight = gradients.hidden, gradients.weight
        if hidden is not None:
            hidden = reduce_hidden(hidden.mul_(upstream), ctx.call.shard, ctx.call.sequence_parallel)
        if weight is not None:
            if weight.is_cuda and weight.dtype != ctx.weight_dtype:  # one kernel for product and rounding
                weight = torch.mul(weight, upstream, out=torch.empty_like(weight, dtype=ctx.weight_dtype))
            else:
                weight = weight.mul_(upstream).to(ctx.weight_dtype)
        return hidden, weight, None


def reduce_hidden(partial: torch.Tensor, shard: VocabShard, sequence_parallel: bool) -> torch.Tensor:
    """Sum the shards' hidden gradients: [t, h] on every rank, or this rank's slice [t / tp, h]."""
    if shard.size == 1:
        return partial
    if not sequence_parallel:
        dist.all_reduce(partial, group=shard.group)
        return partial
    local = partial.new_empty(partial.shape[0] // shard.size, partial.shape[1])
    dist.reduce_scatter_tensor(local, partial, group=shard.group)
    return local


def _active_rows(call: _Call) -> torch.Tensor | None:
    """Return the indices of the rows that the call computes; None for all."""
    if call.response_rows is not None or call.response_mask is None:
        return call.response_rows
    return call.response_mask.nonzero().squeeze(1)  # waits for the device


def _check_shapes(call: _Call, num_rows: int) -> None:
    if call.response_rows is not None and call.response_mask is not None:
        raise UserError("give response_mask or response_rows, not both")
    tensors = {"target_ids": call.target_ids, "response_mask": call.response_mask}
    if isinstance(call.temperature, torch.Tensor):
        tensors["temperature"] = call.temperature
    for name, value in tensors.items():
        if value is not None and value.shape != (num_rows,):
            raise UserError(f"{name} has shape {tuple(value.shape)}, expected one entry for each of {num_rows} rows")
