"""Divergences to a mixture M of student p and teacher q, column by column: generalized JSD and the skew KLs.

A mixture of normalised probabilities is not a function of a few un-normalised sums, so these divergences need the
normalisers first and then a second all-gather, of the sums of the terms computed here.
"""

from __future__ import annotations

import torch

MIXTURES = ("jsd", "skew_forward_kl", "skew_reverse_kl")


def mixture_terms(
    log_p: torch.Tensor, log_q: torch.Tensor, difference: torch.Tensor, name: str, beta: float, masked: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return terms F >= 0 whose sum over the vocabulary is the mixture divergence, and c = dF/dp up to a constant.

    difference: log q - log p. Every expression starts from expm1(-|difference|), and F carries the first-order terms
    that sum to zero (such as M - q), so neither loses its digits where p and q nearly agree.
    """
    if name == "skew_reverse_kl":
        # KL(p || beta p + (1 - beta) q) is the skew forward form with the roles exchanged
        log_p, log_q, difference = log_q, log_p, -difference
    if masked:
        difference = difference.masked_fill((log_p == -torch.inf) & (log_q == -torch.inf), 0.0)
    decay = torch.expm1(-difference.abs())  # min(p, q) / max(p, q) - 1
    smaller_weight = (difference > 0).to(decay.dtype).mul_(1 - 2 * beta).add_(beta)  # of the smaller side in M
    mixed = smaller_weight.mul_(decay)  # M / max(p, q) - 1, M = beta q + (1 - beta) p
    log_mixed = torch.log1p(mixed)
    log_q_over_m = difference.clamp(max=0).sub_(log_mixed)
    log_p_over_m = difference.clamp(min=0).add_(log_mixed).neg_()
    q = log_q.exp()
    if name == "jsd":
        p = log_p.exp()
        terms = _product(q, log_q_over_m, masked).mul_(beta).add_(_product(p, log_p_over_m, masked), alpha=1 - beta)
        return terms, log_p_over_m.mul_(1 - beta)
    signed = torch.copysign(decay, difference).mul_(1 - beta)  # (q - M) / max(p, q)
    larger = torch.maximum(log_p, log_q).exp_()
    terms = _product(q, log_q_over_m, masked).sub_(larger.mul_(signed))
    excess = signed.div_(mixed.add_(1))  # (q - M) / M
    if name == "skew_forward_kl":
        return terms, excess.mul_(beta - 1)
    return terms, log_q_over_m.sub_(excess, alpha=beta)


def _product(weight: torch.Tensor, value: torch.Tensor, masked: bool) -> torch.Tensor:
    product = weight * value
    return product.masked_fill_(weight == 0, 0.0) if masked else product
