"""The gap between trainer and engine: two forward passes of the same weights that should give the same numbers.

With p = log pi of a sampled token under the trainer and r the engine's, both at the sampling temperature and before
top-k and top-p: gap |p - r|, and exp(p - r) - (p - r) - 1, the k3 estimate of KL(pi_engine || pi_trainer). Tokens
without an engine's log-probability (NaN: a teacher or a data set wrote them) are left out.

Left out: what is done about the gap (``policy.py``), and what stops a run (``train/loop.py``).
"""

from __future__ import annotations

import torch

from megatron_s2d.objectives.terms import Metric

GAP_PREFIX = "mismatch/hist/"  # of the histogram: share of tokens whose gap is at least this, and below the next
# Half a decade apart, rounded; float32 rounding is at the low end, bfloat16 in the middle, other weights at the top.
GAP_EDGES = (0.0, *(float(f"{digit}e{power}") for power in range(-7, 1) for digit in (1, 3)), 10.0)


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1 [C], d = ``log_ratio`` = log q - log p at tokens sampled from p: an estimate of KL(p || q).

    Unbiased, never negative; expm1 keeps small values accurate. As a loss on log p its expected gradient on policy is
    that of KL(q || p), the mass-covering direction: the usual GRPO penalty all the same (methods.md M1).
    """
    return torch.expm1(log_ratio) - log_ratio


def gap_metrics(log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, active: torch.Tensor) -> dict[str, Metric]:
    """mismatch/log_prob_abs_diff_mean, mismatch/log_prob_abs_diff_max and the histogram in nats, and mismatch/k3_kl, over ``active`` tokens (bool [C]).

    log_probs: [C] of the trainer under the weights that sampled. rollout_log_probs: [C] of the engine, or NaN.
    """
    active = active & ~rollout_log_probs.isnan()
    log_ratio = torch.where(active, log_probs.detach() - rollout_log_probs, 0.0)
    gap = log_ratio.abs()
    edges = torch.tensor(GAP_EDGES, dtype=torch.float64, device=gap.device)
    bins = torch.bucketize(gap.double(), edges, right=True) - 1
    counts = torch.bincount(bins[active], minlength=len(GAP_EDGES)).double()
    total = active.sum(dtype=torch.float64)
    return {
        "mismatch/log_prob_abs_diff_mean": Metric.over(gap, active),
        "mismatch/log_prob_abs_diff_max": Metric.over(gap, active, "max"),
        "mismatch/k3_kl": Metric.over(k3(log_ratio), active),
    } | {
        f"{GAP_PREFIX}{edge:g}": Metric(count, total, "mean", omit="zero")
        for edge, count in zip(GAP_EDGES, counts, strict=True)
    }
