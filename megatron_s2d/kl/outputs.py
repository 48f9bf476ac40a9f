"""Per-token results of one pass over the vocabulary: what ``kl`` produces and ``objectives`` consume."""

from __future__ import annotations

import dataclasses

import torch

# The divergences of methods.md M2/M3. p: student, q: teacher.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")


@dataclasses.dataclass(frozen=True)
class TokenOutputs:
    """One row per token, natural logarithms, float32 (float64 for float64 inputs); ``None`` where it was not asked for.

    All ranks of a tensor-parallel group hold identical values. beta is strictly between 0 and 1.
    """

    log_probs: torch.Tensor | None = None  # [N] log p(target) of the student at its temperature
    entropy: torch.Tensor | None = None  # [N] H(p) of the student
    forward_kl: torch.Tensor | None = None  # [N] KL(q || p)
    reverse_kl: torch.Tensor | None = None  # [N] KL(p || q)
    jsd: torch.Tensor | None = None  # [N] beta KL(q || M) + (1 - beta) KL(p || M), M = beta q + (1 - beta) p
    skew_forward_kl: torch.Tensor | None = None  # [N] KL(q || beta q + (1 - beta) p)
    skew_reverse_kl: torch.Tensor | None = None  # [N] KL(p || beta p + (1 - beta) q)
    # Numbers for metrics; never differentiated:
    captured_mass: torch.Tensor | None = None  # [N] teacher probability on a top-k support; None for a full teacher
    student_captured_mass: torch.Tensor | None = None  # [N] student probability on that support
