"""Teacher distributions: hidden states with an output layer, logits, a cached top-k, or a geometric target of two.

All sources are frozen: none carries a gradient. Rows line up with the student's rows (same tokens, same order), and
columns with the student's shard, whatever the teacher's own layout, hidden size and vocabulary padding;
``shards.redistribute_output_layer`` brings an output layer to that shard.

Shapes: t tokens, v_tp local vocabulary columns, h hidden size (of the teacher), k top-k entries.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import torch

from megatron_s2d.errors import UserError
from megatron_s2d.kl.shards import VocabShard, check_ids
from megatron_s2d.kl.top_k import TAILS, SupportChunk
from megatron_s2d.matrix_products import linear_out

Temperature = float | torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenStates:
    """The teacher's final hidden states and the rows of its output layer that belong to the student's shard."""

    hidden: torch.Tensor  # [t, h]; under sequence_parallel this rank's slice [t / tp, h]
    weight_shard: torch.Tensor  # [>= shard.columns, h]: row i is global id shard.start + i
    temperature: Temperature = 1.0  # float, or [t]
    sequence_parallel: bool = False  # hidden is sharded over the student's tensor-parallel group


@dataclasses.dataclass(frozen=True, eq=False)
class LazyHiddenStates:
    """``HiddenStates`` that are loaded when the loss reads them, and only at the rows of ``response_mask``.

    Each function is called once per pass, by all ranks of the shard's group together. Its result is not modified and is
    released after the pass.
    """

    hidden: Callable[[], torch.Tensor]  # -> [rows of response_mask, h], in their order, on every rank
    weight_shard: Callable[[], torch.Tensor]  # -> as in HiddenStates
    temperature: Temperature = 1.0  # float, or [t]


@dataclasses.dataclass(frozen=True, eq=False)
class Logits:
    """Teacher logits of the student's shard, before temperature."""

    shard_logits: torch.Tensor  # [t, >= shard.columns]
    temperature: Temperature = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class TopK:
    """Teacher log-probabilities (after its temperature) of k distinct tokens per position, the same on all ranks."""

    ids: torch.Tensor  # [t, k] int32 or int64 global ids
    log_probs: torch.Tensor  # [t, k] of the full distribution, not renormalised
    log_tail_mass: torch.Tensor  # [t] log of the remaining mass; -inf for none
    tail: str = "bucket"  # or "renormalise", "truncate": see kl/top_k.py
    support: str = "teacher"  # whose tokens these are: "teacher", "student" or "union"


FullTeacher = HiddenStates | LazyHiddenStates | Logits


@dataclasses.dataclass(frozen=True, eq=False)
class GeometricTarget:
    """q proportional to teacher^reward_scale * reference^(1 - reward_scale) (G-OPD eq. 12, methods.md M4)."""

    teacher: FullTeacher
    reference: FullTeacher | None  # not read at reward_scale 1
    reward_scale: float


TeacherSource = FullTeacher | TopK | GeometricTarget


def kind_of(teacher: TeacherSource | None) -> str | None:
    """Return None, "dense" (a distribution over the vocabulary) or "support" (known on a few tokens)."""
    if teacher is None:
        return None
    return "support" if isinstance(teacher, TopK) else "dense"


class Projection:
    """Logits of blocks of rows: hidden states [t, h] times an output-layer shard [v_tp, h], over temperature."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, temperature: Temperature, dtype: torch.dtype):
        """Prepare the operands. dtype: of the logits; on CUDA half-precision operands give float32 products."""
        if hidden.shape[1] != weight.shape[1]:
            raise UserError(
                f"hidden size {hidden.shape[1]} does not fit an output layer of width {weight.shape[1]}: "
                "hidden states and output layer must come from the same model"
            )
        # A CPU has no product of bfloat16 operands with a float32 result: convert both sides, which is exact.
        same_dtype = hidden.dtype == weight.dtype
        if not same_dtype or (hidden.dtype != dtype and not (hidden.is_cuda and dtype == torch.float32)):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        self.hidden, self.weight, self.temperature = hidden, weight, temperature
        self.mixed = hidden.dtype != dtype

    def logits(self, block: slice, out: torch.Tensor) -> torch.Tensor:
        """Write the logits of rows ``block`` to ``out`` [rows, v_tp]."""
        if out.shape[1] == 0:
            return out
        if self.mixed:
            operands = (self.hidden[block], self.weight.t())
            if not isinstance(self.temperature, torch.Tensor):  # the product divides on its way out
                return torch.addmm(out, *operands, beta=0, alpha=1 / self.temperature, out_dtype=out.dtype, out=out)
            torch.mm(*operands, out_dtype=out.dtype, out=out)
        else:
            linear_out(self.hidden[block], self.weight, out)
        return over_temperature(out, self.temperature, block)


def over_temperature(values: torch.Tensor, temperature: Temperature, block: slice) -> torch.Tensor:
    """Divide ``values`` [rows, ...] in place by a number, or by the rows ``block`` of a per-token temperature [t]."""
    if isinstance(temperature, torch.Tensor):
        return values.div_(temperature[block].view(-1, *[1] * (values.dim() - 1)))
    return values if temperature == 1.0 else values.div_(temperature)


class _StoredLogits:
    def __init__(self, logits: torch.Tensor, temperature: Temperature) -> None:
        self.values, self.temperature = logits, temperature

    def logits(self, block: slice, out: torch.Tensor) -> torch.Tensor:
        return over_temperature(out.copy_(self.values[block, : out.shape[1]]), self.temperature, block)


class _Geometric:
    def __init__(self, teacher: _Dense, reference: _Dense, reward_scale: float) -> None:
        self.teacher, self.reference, self.scale = teacher, reference, reward_scale

    def logits(self, block: slice, out: torch.Tensor) -> torch.Tensor:
        out = self.teacher.logits(block, out)
        reference = self.reference.logits(block, torch.empty_like(out))
        impossible = out == -torch.inf  # by index: scale * (-inf) + (1 - scale) * (-inf) would be NaN
        return out.mul_(self.scale).add_(reference, alpha=1 - self.scale).masked_fill_(impossible, -torch.inf)


_Dense = Projection | _StoredLogits | _Geometric


class _Support:
    def __init__(self, source: TopK, rows: torch.Tensor | None, shard: VocabShard, dtype: torch.dtype) -> None:
        ids, log_probs, log_tail = (
            tensor if rows is None else tensor[rows] for tensor in (source.ids, source.log_probs, source.log_tail_mass)
        )
        self.local, self.owned = shard.local(ids.long())
        self.log_q, self.log_tail, self.tail = log_probs.to(dtype), log_tail.to(dtype), source.tail

    def chunk(self, block: slice) -> SupportChunk:
        return SupportChunk(self.local[block], self.owned[block], self.log_q[block], self.log_tail[block], self.tail)


class PreparedTeacher:
    """A source bound to a shard and to the active rows; returns the teacher's side of each chunk of one pass."""

    def __init__(
        self, source: TeacherSource, *, num_rows: int, rows: torch.Tensor | None, shard: VocabShard, dtype: torch.dtype
    ):
        """Check the source against the student's rows. num_rows: t, before selection; rows: active ones (None: all)."""
        self._source: _Support | _Dense
        if isinstance(source, TopK):
            _check_top_k(source, num_rows, shard)
            self._source = _Support(source, rows, shard, dtype)
        else:
            self._source = _dense(source, num_rows, rows, shard, dtype)

    def chunk(self, block: slice, buffer: torch.Tensor | None) -> torch.Tensor | SupportChunk:
        """Return the distribution of rows ``block``; dense sources write it to ``buffer`` [rows, v_tp]."""
        if isinstance(self._source, _Support):
            return self._source.chunk(block)
        assert buffer is not None
        return self._source.logits(block, buffer)


def _dense(
    source: TeacherSource, num_rows: int, rows: torch.Tensor | None, shard: VocabShard, dtype: torch.dtype
) -> _Dense:
    if isinstance(source, GeometricTarget):
        teacher = _dense(source.teacher, num_rows, rows, shard, dtype)
        if source.reward_scale == 1.0:
            return teacher
        if source.reference is None:
            raise UserError("reward_scale other than 1 needs a reference distribution: see docs/methods.md, G-OPD")
        return _Geometric(teacher, _dense(source.reference, num_rows, rows, shard, dtype), source.reward_scale)
    if isinstance(source, Logits):
        _check_rows(source.shard_logits.shape[0], num_rows)
        _check_columns(source.shard_logits.shape[1], shard)
        logits, temperature = source.shard_logits.detach(), source.temperature
        return _StoredLogits(logits if rows is None else logits[rows], _rows_of(temperature, rows))
    if isinstance(source, LazyHiddenStates):
        hidden, weight = source.hidden(), source.weight_shard()
        _check_rows(hidden.shape[0], num_rows if rows is None else rows.numel())
        _check_columns(weight.shape[0], shard)
        return Projection(hidden, weight[: shard.columns], _rows_of(source.temperature, rows), dtype)
    if not isinstance(source, HiddenStates):
        raise UserError(f"a {type(source).__name__} cannot be part of a full teacher distribution: use HiddenStates")
    hidden = source.hidden.detach()
    if source.sequence_parallel:
        hidden = shard.gather(hidden).flatten(0, 1)
    _check_rows(hidden.shape[0], num_rows)
    _check_columns(source.weight_shard.shape[0], shard)
    hidden = hidden if rows is None else hidden[rows]
    return Projection(hidden, source.weight_shard.detach()[: shard.columns], _rows_of(source.temperature, rows), dtype)


def _rows_of(temperature: Temperature, rows: torch.Tensor | None) -> Temperature:
    return temperature if rows is None or not isinstance(temperature, torch.Tensor) else temperature[rows]


def _check_rows(teacher_rows: int, student_rows: int) -> None:
    if teacher_rows != student_rows:
        raise UserError(
            f"teacher has {teacher_rows} rows, student {student_rows}: both must come from the same tokens in order"
        )


def _check_columns(columns: int, shard: VocabShard) -> None:
    if columns < shard.columns:
        raise UserError(
            f"teacher shard has {columns} columns, the student's shard {shard.columns}: "
            "both need the same vocabulary and the same shards (kl.shards.redistribute_output_layer)"
        )


def _check_top_k(source: TopK, num_rows: int, shard: VocabShard) -> None:
    _check_rows(source.ids.shape[0], num_rows)
    if source.tail not in TAILS:
        raise UserError(f"tail {source.tail!r} of a top-k teacher: choose one of {', '.join(TAILS)}")
    check_ids(source.ids, shard.vocab_size, "TopK.ids")
    ordered = source.ids.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise UserError("TopK.ids names a token twice in one position: its mass would count twice")


def warn_on_narrow_support(teacher: TeacherSource | None, outputs: tuple[str, ...]) -> None:
    """Warn if reverse KL uses the teacher's top-k: student mass elsewhere is one outcome at most, or is not seen."""
    if isinstance(teacher, TopK) and teacher.support == "teacher" and "reverse_kl" in outputs:
        warnings.warn(
            f"reverse KL over the teacher's top-k only (tail: {teacher.tail}): student mass on other tokens gets "
            "almost no gradient; prefer the student's top-k as support, or the full distribution",
            stacklevel=3,
        )
