"""Test problems of the KL layer: operands, a loss over all outputs, and the float64 reference by autograd."""

from __future__ import annotations

import dataclasses

import torch

from megatron_s2d.kl.reference import dense_outputs
from megatron_s2d.kl.teachers import HiddenStates

ALL = ("log_probs", "entropy", "forward_kl", "reverse_kl")
WITH_TEACHER = (*ALL, "teacher_log_probs")
_OPERANDS = ("hidden", "weight", "teacher_hidden", "teacher_weight", "loss_weights")
MIXTURES = ("jsd", "skew_forward_kl", "skew_reverse_kl")


@dataclasses.dataclass
class Problem:
    """Float64 operands of one call; ``teacher_logits`` returns the full logits after temperature."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    target: torch.Tensor
    loss_weights: torch.Tensor
    mask: torch.Tensor
    vocab_size: int
    temperature: float = 0.7
    teacher_temperature: float = 1.3

    def rounded(self) -> Problem:
        """Return the operands rounded to float32, so that both precisions start from the same numbers."""
        fields = vars(self)
        return Problem(**{k: v.float().double() if k in _OPERANDS else v for k, v in fields.items()})

    def token_loss(self, outputs, rows):
        """Return ``combined`` times the loss weights."""
        losses = combined(outputs, rows)
        return losses * self.loss_weights.to(losses)[rows]

    def teacher(self, dtype=torch.float64) -> HiddenStates:
        return HiddenStates(self.teacher_hidden.to(dtype), self.teacher_weight.to(dtype), self.teacher_temperature)

    def teacher_logits(self) -> torch.Tensor:
        return self.teacher_hidden @ self.teacher_weight[: self.vocab_size].T / self.teacher_temperature


def make_problem(rows=7, vocab=37, width=5, teacher_width=6, padding=3, seed=0, masked=(2,)) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.ones(rows, dtype=torch.bool)
    mask[[row for row in masked if row < rows]] = False
    return Problem(
        normal(rows, width), normal(vocab + padding, width), normal(rows, teacher_width),
        normal(vocab + 2 * padding, teacher_width), torch.randint(0, vocab, (rows,), generator=generator),
        torch.rand(rows, generator=generator, dtype=torch.float64), mask, vocab,
    )  # fmt: skip


def combined(outputs, rows):
    """Return a loss in which every output has its own value-dependent cotangent."""
    total = 0.0
    for index, field in enumerate(dataclasses.fields(outputs)):
        value = getattr(outputs, field.name)
        if value is not None and value.requires_grad:
            total = total + (index + 1) * (value.abs() + 0.1 * value**2) * (1 + 0.5 * torch.sin(rows + index))
    return total


def reference(problem: Problem, names, beta):
    """Return loss, outputs, hidden gradient and weight gradient of ``combined`` by autograd in float64."""
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    z = hidden @ weight[: problem.vocab_size].T / problem.temperature
    outputs = dense_outputs(z, problem.teacher_logits(), names, beta=beta, target_ids=problem.target)
    losses = combined(outputs, torch.arange(len(hidden)))
    loss = (losses * problem.loss_weights * problem.mask).sum()
    loss.backward()
    return loss.detach(), outputs, hidden.grad, weight.grad


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))
