"""Per-token inputs of a loss (log-probabilities, advantages, loss weights) as aligned tensors.

Shapes: t tokens of a micro-batch (or of a chunk of one).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from megatron_s2d.errors import UserError

# Column -> the step that writes it.
_WRITERS = {
    "old_log_probs": "scoring by the trainer with the weights before the update",
    "rollout_log_probs": "an engine that returns the log-probabilities of the tokens it samples",
    "advantages": "the computation of advantages",
    "teacher_log_probs": "scoring by the teacher",
    "reference_log_probs": "scoring by the reference",
    "sequence_log_ratios": "the pass over the output layer that GSPO makes before its loss",
    "policy_weight": "packing with policy weights",
    "supervised_weight": "packing with supervised weights",
    "divergence_weight": "packing with divergence weights",
}


@dataclasses.dataclass(frozen=True, eq=False)
class TokenColumns:
    """Per-token data aligned with the rows of ``TokenOutputs``: float32 [t] each, None if it was not computed.

    Log-probabilities are natural, of the sampled token, at the sampling temperature. Columns are constants of the loss:
    a tensor that requires a gradient raises ``UserError``.
    """

    old_log_probs: torch.Tensor | None = None  # of the trained model, weights before the update
    rollout_log_probs: torch.Tensor | None = None  # as reported by the engine; NaN: not sampled by it
    advantages: torch.Tensor | None = None
    teacher_log_probs: torch.Tensor | None = None
    reference_log_probs: torch.Tensor | None = None
    sequence_log_ratios: torch.Tensor | None = None  # of the response that the token belongs to, averaged over it
    policy_weight: torch.Tensor | None = None  # zero outside the responses of the policy
    supervised_weight: torch.Tensor | None = None
    divergence_weight: torch.Tensor | None = None

    def __post_init__(self) -> None:
        present = self._present()
        shapes = {name: tuple(column.shape) for name, column in present.items()}
        if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) > 1:
            raise ValueError(f"token columns must all have one shape [t]: {shapes}")
        for name, column in present.items():
            refuse_sampled_k1(column, name)

    def select(self, rows: torch.Tensor) -> TokenColumns:
        """Return the columns at ``rows`` (int64 indices)."""
        return TokenColumns(**{name: column[rows] for name, column in self._present().items()})

    def get(self, name: str) -> torch.Tensor:
        """Return the column ``name`` [t], or raise a ``UserError`` that names the step that computes it."""
        column: torch.Tensor | None = getattr(self, name)
        if column is None:
            raise UserError(f"the loss needs {name}: run {_WRITERS[name]} before the update")
        return column

    def require(self, names: Iterable[str]) -> None:
        """Raise a ``UserError`` that names the step to run if one of the columns ``names`` is missing."""
        for name in sorted(names):
            self.get(name)

    def with_missing(self, names: Iterable[str]) -> TokenColumns:
        """Return columns of no token with empty ones for those of ``names`` that this rank did not compute."""
        empty = torch.zeros(0, device=next(iter(self._present().values())).device)
        return dataclasses.replace(self, **{name: empty for name in names if getattr(self, name) is None})

    def neutral_outside(self, active: torch.Tensor, log_probs: torch.Tensor | None) -> TokenColumns:
        """Return the columns with harmless values where ``active`` (bool [t]) is False.

        Tokens of another term may hold any value there, and a weight of zero would not remove a NaN or an infinity.
        Log-probabilities become those of the model itself (``log_probs``), which makes every ratio 1.
        """
        fill = 0.0 if log_probs is None else log_probs.detach()
        neutral = {
            name: torch.where(active, column, fill if name.endswith("log_probs") else 0.0)
            for name, column in self._present().items()
            if not name.endswith("weight")
        }
        return dataclasses.replace(self, **neutral)

    def _present(self) -> dict[str, torch.Tensor]:
        columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: column for name, column in columns.items() if column is not None}


def refuse_sampled_k1(values: torch.Tensor, name: str) -> None:
    """Raise ``UserError`` if ``values`` carries a gradient through the student (methods.md M3).

    The case that matters is log pi_S - log pi_T of sampled tokens.
    """
    if values.requires_grad:
        raise UserError(
            f"{name} carries a gradient: back-propagating through the sampled log pi_S - log pi_T is wrong, because "
            "its gradient does not depend on the teacher and its expectation is zero; detach it and use it as an "
            "advantage, or use a divergence over the vocabulary"
        )
