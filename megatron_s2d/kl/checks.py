"""Mistakes that give plausible numbers and wrong gradients: refused, or made visible as metrics."""

from __future__ import annotations

import torch

from megatron_s2d.errors import UserError
from megatron_s2d.kl.outputs import TokenOutputs


def sampled_reverse_kl(log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """k1 = log p(y) - log q(y) [N] of sampled tokens: a metric, and its negative an advantage; never a loss.

    Its derivative is that of log p(y) alone: the teacher drops out, and the expectation of what remains is zero
    (methods.md M3). A ``log_probs`` that carries a gradient is therefore refused.
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
    """What a top-k support sees, as (sum, count) pairs over the rows that count; the caller adds them over ranks.

    captured_mass: teacher mass on the support. student_captured_mass: the student's. topk/dropped_student_mass: student mass
    whose logits get no gradient ("renormalise"), 0 under the other tail rules.
    """
    if outputs.captured_mass is None or outputs.student_captured_mass is None:
        raise UserError("support metrics need the outputs captured_mass and student_captured_mass")
    count = response_mask.sum()
    student = (outputs.student_captured_mass * response_mask).sum()
    zeroed = (count - student) if tail == "renormalise" else torch.zeros_like(student)
    return {
        "topk/teacher_mass": ((outputs.captured_mass * response_mask).sum(), count),
        "topk/student_mass": (student, count),
        "topk/dropped_student_mass": (zeroed, count),
    }
