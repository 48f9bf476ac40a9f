"""Per-token results of one pass over the vocabulary, their metrics, and the sampled reverse KL.

Shapes: t tokens.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_s2d.errors import UserError

# The divergences of methods.md M2/M3. p: student, q: teacher.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")


@dataclasses.dataclass(frozen=True)
class TokenOutputs:
    """One entry per token, in nats, float32 (float64 for float64 inputs); ``None`` for outputs not requested.

    All ranks of a tensor-parallel group hold identical values. p: student, q: teacher; 0 < beta < 1.
    """

    log_probs: torch.Tensor | None = None  # [t] log p(target) of the student at its temperature
    entropy: torch.Tensor | None = None  # [t] H(p) of the student
    forward_kl: torch.Tensor | None = None  # [t] KL(q || p)
    reverse_kl: torch.Tensor | None = None  # [t] KL(p || q)
    jsd: torch.Tensor | None = None  # [t] beta KL(q || M) + (1 - beta) KL(p || M), M = beta q + (1 - beta) p
    skew_forward_kl: torch.Tensor | None = None  # [t] KL(q || beta q + (1 - beta) p)
    skew_reverse_kl: torch.Tensor | None = None  # [t] KL(p || beta p + (1 - beta) q)
    # Measured only; never differentiated:
    teacher_log_probs: torch.Tensor | None = None  # [t] log q(target) of a full teacher at its temperature
    captured_mass: torch.Tensor | None = None  # [t] teacher probability on a top-k support; None for a full teacher
    student_captured_mass: torch.Tensor | None = None  # [t] student probability on that support

    def require(self, name: str) -> torch.Tensor:
        """Return the output ``name``, or raise ``UserError`` if this pass did not compute it."""
        value: torch.Tensor | None = getattr(self, name)
        if value is None:
            raise UserError(f"the per-token output {name} was not computed: add it to `outputs` of the divergence")
        return value


def sampled_reverse_kl(log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """Return k1 = log p(y) - log q(y) [t] of sampled tokens: a metric, and its negative an advantage; never a loss.

    Its derivative is that of log p(y) alone: it does not contain the teacher, and its expectation is zero (methods.md
    M3). Raises ``UserError`` for ``log_probs`` that carry a gradient.
    """
    if log_probs.requires_grad:
        raise UserError(
            "the sampled reverse KL log p - log q must not be back-propagated (its gradient does not depend on the "
            "teacher): use -(log p - log q), detached, as the advantage of a policy loss, or kl_estimator: full_vocab"
        )
    return log_probs - teacher_log_probs.detach()


def support_metrics(
    outputs: TokenOutputs, response_mask: torch.Tensor, tail: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return how much probability a top-k support covers, as (sum, count) pairs over the tokens of ``response_mask``.

    The caller sums them over ranks. topk/teacher_mass and topk/student_mass: probability on the support.
    topk/dropped_student_mass: student probability whose logits get no gradient (tail "renormalise"; 0 otherwise).
    """
    if outputs.captured_mass is None or outputs.student_captured_mass is None:
        raise UserError("support metrics need the outputs captured_mass and student_captured_mass")
    count = response_mask.sum()
    student = (outputs.student_captured_mass * response_mask).sum()
    dropped = (count - student) if tail == "renormalise" else torch.zeros_like(student)
    return {
        "topk/teacher_mass": ((outputs.captured_mass * response_mask).sum(), count),
        "topk/student_mass": (student, count),
        "topk/dropped_student_mass": (dropped, count),
    }
