"""The definitions, unsharded and with plain autograd: what every other path in ``kl`` has to equal.

For tests, for benchmarks and for reading. Not for training: whole logits, several copies of them, and in float32 the
lost digits that ``kl/torch_backend.py`` takes care to keep. Logits are [N, V] after temperature, padding cut off.
"""

from __future__ import annotations

import torch

from megatron_s2d.kl.outputs import TokenOutputs


def dense_outputs(
    z: torch.Tensor,
    y: torch.Tensor | None,
    outputs: tuple[str, ...],
    *,
    beta: float | None = None,
    target_ids: torch.Tensor | None = None,
) -> TokenOutputs:
    """Every quantity as its definition, differentiable in the student's logits ``z``; ``y``: the teacher's."""
    log_p = torch.log_softmax(z, dim=-1)
    log_q = None if y is None else torch.log_softmax(y, dim=-1)

    def mixture(share_of_q: float) -> torch.Tensor:
        return torch.logaddexp(log_q + _log(share_of_q, z), log_p + _log(1 - share_of_q, z))

    found = {}
    for name in outputs:
        if name == "log_probs":
            found[name] = log_p.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
        elif name == "entropy":
            found[name] = -_expect(log_p, log_p)
        elif name == "forward_kl":
            found[name] = _expect(log_q, log_q - log_p)
        elif name == "reverse_kl":
            found[name] = _expect(log_p, log_p - log_q)
        elif name == "jsd":
            m = mixture(beta)
            found[name] = beta * _expect(log_q, log_q - m) + (1 - beta) * _expect(log_p, log_p - m)
        elif name == "skew_forward_kl":
            found[name] = _expect(log_q, log_q - mixture(beta))
        elif name == "skew_reverse_kl":
            found[name] = _expect(log_p, log_p - mixture(1 - beta))
        else:
            raise ValueError(f"no dense definition of {name}")
    return TokenOutputs(**found)


def _log(share: float, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(share, dtype=like.dtype, device=like.device).log()


def _expect(log_weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sum of exp(log_weight) value over the vocabulary; a weight of zero contributes zero and takes no gradient."""
    impossible = log_weight == -torch.inf
    return (log_weight.exp() * value.masked_fill(impossible, 0.0)).sum(-1)


def dense_support_outputs(
    z: torch.Tensor,
    ids: torch.Tensor,
    log_q: torch.Tensor,
    log_tail_mass: torch.Tensor,
    tail: str,
    outputs: tuple[str, ...],
) -> TokenOutputs:
    """Divergences to a teacher known on ``ids`` [N, k]; the tail rules are those of ``kl/top_k.py``."""
    log_p = torch.log_softmax(z, dim=-1)
    on = log_p.gather(-1, ids)
    inside = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, ids, True)
    off = torch.logsumexp(log_p.masked_fill(inside, -torch.inf), dim=-1, keepdim=True)
    if tail == "bucket":
        a, b = torch.cat([on, off], -1), torch.cat([log_q, log_tail_mass.unsqueeze(-1)], -1)
    elif tail == "renormalise":
        a, b = torch.log_softmax(on, -1), torch.log_softmax(log_q, -1)
    else:
        a, b = on, log_q
    found = {
        "forward_kl": lambda: _expect(b, b - a),
        "reverse_kl": lambda: _expect(a, a - b),
        "captured_mass": lambda: log_q.exp().sum(-1),
        "student_captured_mass": lambda: on.exp().sum(-1),
    }
    return TokenOutputs(**{name: found[name]() for name in outputs})
