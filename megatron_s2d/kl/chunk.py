"""One chunk of tokens on one shard: logits to per-token outputs, and cotangents of the outputs back to logits.

The communication between shards is complete here: one all-gather of a few numbers per token (two for a mixture, whose
terms need the normalisers first), and none in the backward pass. Autograd never crosses a collective.

Shapes: c tokens of the chunk, v_tp local vocabulary columns.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from megatron_s2d.errors import UserError
from megatron_s2d.kl import torch_backend
from megatron_s2d.kl.jsd import MIXTURES
from megatron_s2d.kl.merge import Merged, Plan, merge
from megatron_s2d.kl.outputs import DIVERGENCES, TokenOutputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.top_k import SupportChunk, SupportMerged, support_gradient, support_merge, support_statistics

_FIELDS = tuple(field.name for field in dataclasses.fields(TokenOutputs))
MASSES = ("captured_mass", "student_captured_mass")
MEASURED = ("teacher_log_probs", *MASSES)  # outputs without a gradient
Target = tuple[torch.Tensor, torch.Tensor]  # [c] local columns of the target ids, and which are this shard's


class Backend(Protocol):
    """The shard-local arithmetic, implemented by the modules ``torch_backend`` and ``triton_backend``."""

    def statistics(
        self,
        z: torch.Tensor,
        y: torch.Tensor | None,
        target: torch.Tensor | None,
        owned: torch.Tensor | None,
        plan: Plan,
    ) -> tuple[torch.Tensor, bool]:
        """Return the statistics of a shard, and whether minus infinities occurred."""

    def divergence_sums(
        self, z: torch.Tensor, y: torch.Tensor, merged: Merged, plan: Plan, masked: bool
    ) -> tuple[torch.Tensor, bool]:
        """Return the sums of a mixture divergence, and whether minus infinities occurred."""

    def logits_gradient(
        self,
        z: torch.Tensor,
        y: torch.Tensor | None,
        target: torch.Tensor | None,
        owned: torch.Tensor | None,
        merged: Merged,
        cotangents: dict[str, torch.Tensor],
        plan: Plan,
        masked: bool,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Write the gradient by the shard's logits to ``out``."""


def make_plan(outputs: tuple[str, ...], *, teacher: str | None, beta: float | None, has_target: bool) -> Plan:
    """Return the plan for ``outputs``; raise ``UserError`` for a combination that has no meaning.

    teacher: None, "dense" (a distribution over the vocabulary) or "support" (known on a few tokens).
    """
    unknown = [name for name in outputs if name not in _FIELDS]
    if unknown:
        raise UserError(f"unknown per-token output {unknown[0]!r}: choose from {', '.join(_FIELDS)}")
    divergences = [name for name in outputs if name in DIVERGENCES]
    mixtures = [name for name in outputs if name in MIXTURES]
    if divergences and teacher is None:
        raise UserError(f"{divergences[0]} needs a teacher: pass HiddenStates, Logits, TopK or a GeometricTarget")
    for name in ("log_probs", "teacher_log_probs"):
        if name in outputs and not has_target:
            raise UserError(f"{name} needs target_ids: pass the id of the token that each position predicts")
    of_target = "teacher_log_probs" in outputs
    if of_target and teacher != "dense":
        raise UserError("teacher_log_probs needs a full teacher: pass HiddenStates, Logits or a GeometricTarget")
    if teacher == "support" and mixtures:
        raise UserError(f"{mixtures[0]} is not defined on a top-k support here: use a full teacher, or forward_kl")
    if teacher != "support" and any(name in MASSES for name in outputs):
        raise UserError("captured_mass belongs to a TopK teacher: leave it out for a full distribution")
    if len(mixtures) > 1:
        raise UserError(f"one pass computes one mixture, not {' and '.join(mixtures)}: make two passes")
    if mixtures and (beta is None or not 0 < beta < 1):
        raise UserError(f"{mixtures[0]} needs beta strictly between 0 and 1, got {beta}: the ends are plain KLs")
    if beta is not None and not mixtures:
        raise UserError("beta belongs to jsd and the skew divergences: leave it out")
    return Plan(tuple(outputs), bool(divergences) or of_target, beta)


@dataclasses.dataclass
class Evaluated:
    """Outputs [c] by name, identical on all ranks of the shard's group, and what ``gradient`` needs besides logits."""

    outputs: dict[str, torch.Tensor]
    merged: Merged
    masked: bool


def evaluate(
    z: torch.Tensor,
    teacher: torch.Tensor | SupportChunk | None,
    target: Target | None,
    plan: Plan,
    shard: VocabShard,
    backend: Backend = torch_backend,
) -> Evaluated:
    """Return the per-token outputs of a chunk.

    z: student logits [c, v_tp] after temperature. teacher: logits like z, or a support. target: from
    ``VocabShard.local``.
    """
    ids, owned = target if target is not None else (None, None)
    if isinstance(teacher, SupportChunk):
        local = support_statistics(z, teacher, ids, owned, plan)
        merged: Merged = support_merge(shard.gather(local), teacher, plan)
        return Evaluated(_outputs(merged, plan, z.dtype), merged, True)
    local, masked = backend.statistics(z, teacher, ids, owned, plan)
    if "teacher_log_probs" in plan.outputs:
        local = torch.cat([local, _at_target(teacher, target).to(local.dtype).unsqueeze(1)], dim=1)
    gathered = shard.gather(local)
    merged = merge(gathered[..., : len(plan.columns)], plan)
    if "teacher_log_probs" in plan.outputs:
        assert merged.max_y is not None and merged.log_sum_y is not None
        merged.outputs["teacher_log_probs"] = (gathered[..., -1].sum(0) - merged.max_y) - merged.log_sum_y
    if plan.mixture is not None:
        assert teacher is not None
        local, masked = backend.divergence_sums(z, teacher, merged, plan, masked)
        sums = shard.gather(local).sum(0)
        merged.outputs[plan.mixture], merged.expected_slope = sums.unbind(1)
    return Evaluated(_outputs(merged, plan, z.dtype), merged, masked)


def _at_target(y: torch.Tensor | None, target: Target | None) -> torch.Tensor:
    """Return the teacher's logits [c] of the target ids, 0 for ids of other shards."""
    assert y is not None and target is not None
    ids, owned = target
    if y.shape[1] == 0:
        return y.new_zeros(len(y))
    return y.gather(1, ids.unsqueeze(1)).squeeze(1).masked_fill(~owned, 0.0)


def _outputs(merged: Merged, plan: Plan, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: merged.outputs[name].to(dtype) for name in plan.outputs}


def gradient(
    z: torch.Tensor,
    teacher: torch.Tensor | SupportChunk | None,
    target: Target | None,
    evaluated: Evaluated,
    cotangents: dict[str, torch.Tensor],
    plan: Plan,
    backend: Backend = torch_backend,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write d(sum over tokens and outputs of cotangent * output)/dz for this shard's columns to ``out``.

    out: [c, v_tp] of any dtype; None: over ``z``, which may be overwritten in any case.
    """
    out = z if out is None else out
    ids, owned = target if target is not None else (None, None)
    if isinstance(teacher, SupportChunk):
        assert isinstance(evaluated.merged, SupportMerged)
        return out.copy_(support_gradient(z, teacher, ids, owned, evaluated.merged, cotangents))
    merged, masked = evaluated.merged, evaluated.masked
    return backend.logits_gradient(z, teacher, ids, owned, merged, cotangents, plan, masked, out)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return float64 for float64 operands, float32 for float32 and bfloat16; raise ``UserError`` for other types."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16):
        raise UserError(f"divergences take float32, bfloat16 or float64 operands, not {tensor.dtype}")
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return the module with the shard-local functions for logits of ``dtype`` (float32 or float64) on ``device``.

    auto: Triton's for float32 on CUDA where Triton can compile, PyTorch's otherwise.
    """
    if name not in ("auto", "torch", "triton"):
        raise UserError(f"backend {name!r}: choose auto, torch or triton")
    if name == "torch" or (name == "auto" and (device.type != "cuda" or dtype != torch.float32)):
        return torch_backend
    if problem := triton_problem():
        if name == "triton":
            raise UserError(f"backend triton: {problem}, or choose backend torch")
        return torch_backend
    from megatron_s2d.kl import triton_backend

    triton_backend.require(device, dtype)
    return triton_backend


@functools.cache
def triton_problem() -> str:
    """Return why Triton cannot compile kernels here and what to do, in one line that is logged once; empty if it can.

    Triton compiles the function that launches a kernel with a C compiler, at run time.
    """
    problem = ""
    if importlib.util.find_spec("triton") is None:
        problem = "triton is not installed: pip install triton"
    else:
        from triton.runtime.build import _build  # what compiles the launchers

        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory) / "probe.c"
            source.write_text("#include <Python.h>\n", encoding="ascii")
            try:
                _build("probe", str(source), directory, [], [], [], [])
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                reason = str(error).partition("\n")[0]
                problem = f"Triton cannot compile ({reason}): install gcc and the headers of this Python (python3-dev)"
    if problem:
        logging.getLogger(__name__).warning("divergences are computed by PyTorch, in several passes: %s", problem)
    return problem


def any_infinite(
    results: Sequence[Mapping[str, torch.Tensor | None]], device: torch.device | None = None
) -> torch.Tensor:
    """Return whether a divergence among the results (output -> [t]) of several calls is infinite: bool scalar.

    device: of the answer where there is no divergence.
    """
    values = [value for each in results for name in DIVERGENCES if (value := each.get(name)) is not None]
    if not values:
        return torch.zeros((), dtype=torch.bool, device=device)
    return torch.stack([torch.isinf(value).any() for value in values]).any()


def refuse_infinite(results: Sequence[Mapping[str, torch.Tensor | None]]) -> None:
    """Raise ``UserError`` if a divergence is infinite; all ranks hold the same values and raise together."""
    if not bool(any_infinite(results)):
        return
    for name in DIVERGENCES:
        values = [value for each in results if (value := each.get(name)) is not None]
        count = sum(int(torch.isinf(value).sum()) for value in values)
        if count:
            side, other = ("student", "teacher") if name == "forward_kl" else ("teacher", "student")
            raise UserError(
                f"{name} is infinite at {count} of {sum(value.numel() for value in values)} tokens: the {side} gives "
                f"probability zero to tokens that the {other} allows; use jsd or a skew divergence, or tail: bucket "
                "for a top-k teacher"
            )
