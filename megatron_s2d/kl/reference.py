"""Reference definitions of every per-token output, unsharded and with plain autograd; all of ``kl`` must equal them.

For tests, benchmarks and reading, not for training: it holds several copies of full logits, and in float32 it loses
digits that ``kl/torch_backend.py`` keeps.

Shapes: t tokens, v vocabulary, k top-k entries. Logits are [t, v] after temperature, without padding.
"""

from __future__ import annotations

from collections.abc import Callable

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
    """Return ``outputs`` by their definitions, differentiable in the student's logits ``z``; ``y``: the teacher's."""
    log_p = torch.log_softmax(z, dim=-1)
    log_q = log_p if y is None else torch.log_softmax(y, dim=-1)

    def mixture(weight_of_q: float) -> torch.Tensor:
        return torch.logaddexp(log_q + _log(weight_of_q, z), log_p + _log(1 - weight_of_q, z))

    results = {}
    for name in outputs:
        if y is None and name not in ("log_probs", "entropy"):
            raise ValueError(f"{name} needs teacher logits")
        if name == "log_probs":
            assert target_ids is not None
            results[name] = log_p.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
        elif name == "teacher_log_probs":
            assert target_ids is not None
            results[name] = log_q.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
        elif name == "entropy":
            results[name] = -_expect(log_p, log_p)
        elif name == "forward_kl":
            results[name] = _expect(log_q, log_q - log_p)
        elif name == "reverse_kl":
            results[name] = _expect(log_p, log_p - log_q)
        elif name == "jsd":
            assert beta is not None
            m = mixture(beta)
            results[name] = beta * _expect(log_q, log_q - m) + (1 - beta) * _expect(log_p, log_p - m)
        elif name == "skew_forward_kl":
            assert beta is not None
            results[name] = _expect(log_q, log_q - mixture(beta))
        elif name == "skew_reverse_kl":
            assert beta is not None
            results[name] = _expect(log_p, log_p - mixture(1 - beta))
        else:
            raise ValueError(f"no dense definition of {name}")
    return TokenOutputs(**results)


def _log(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device).log()


def _expect(log_weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the sum of exp(log_weight) * value over the vocabulary; a weight of 0 adds 0 and gets no gradient."""
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
    """Return divergences to a teacher known on ``ids`` [t, k]; the tail rules are those of ``kl/top_k.py``."""
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
    definitions: dict[str, Callable[[], torch.Tensor]] = {
        "forward_kl": lambda: _expect(b, b - a),
        "reverse_kl": lambda: _expect(a, a - b),
        "captured_mass": lambda: log_q.exp().sum(-1),
        "student_captured_mass": lambda: on.exp().sum(-1),
    }
    return TokenOutputs(**{name: definitions[name]() for name in outputs})
