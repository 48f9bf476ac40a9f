"""The compiled Triton kernels of the divergences against the float64 reference, and in bf16 next to PyTorch."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "kl"))

from kl_problems import ALL, MIXTURES, make_problem, reference, relative

from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import HiddenStates


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("vocab", [301, 5003])
def test_loss_and_gradients_against_float64(vocab, mixture, record_property):
    problem, names = make_problem(rows=9, vocab=vocab, width=16, teacher_width=12).rounded(), (mixture, *ALL)
    expected = reference(problem, names, 0.3)
    hidden, weight = (tensor.float().cuda().requires_grad_() for tensor in (problem.hidden, problem.weight))
    teacher = HiddenStates(
        problem.teacher_hidden.float().cuda(), problem.teacher_weight.float().cuda(), problem.teacher_temperature
    )
    loss, _ = linear_divergence(
        hidden, weight, shard=VocabShard.unsharded(vocab), outputs=names, teacher=teacher, beta=0.3,
        temperature=problem.temperature, target_ids=problem.target.cuda(), token_loss=problem.token_loss,
        response_mask=problem.mask.cuda(), backend="triton",
    )  # fmt: skip
    loss.backward()
    results = (loss.detach().cpu(), hidden.grad.cpu(), weight.grad.cpu())
    errors = [relative(a, b) for a, b in zip(results, (expected[0], *expected[2:]), strict=True)]
    for name, error in zip(("loss", "hidden", "weight"), errors, strict=True):
        record_property(name, f"{error:.3g}")
    assert max(errors) <= 2e-4  # float32 products on a GPU; 1e-5 in the interpreter


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_bfloat16_operands_against_float64_of_the_same_operands(name, record_property):
    generator = torch.Generator(device="cuda").manual_seed(0)
    rows, vocab, width = 512, 32_000, 256

    def normal(count: int, scale: float) -> torch.Tensor:
        return (torch.randn(count, width, generator=generator, device="cuda") * scale).bfloat16()

    hidden, weight = normal(rows, 1.0), normal(vocab, width**-0.5)
    teacher_hidden, teacher_weight = normal(rows, 1.0), normal(vocab, width**-0.5)
    z, y = hidden.double() @ weight.double().T, teacher_hidden.double() @ teacher_weight.double().T
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    forward = (log_q.exp() * (log_q - log_p)).sum(-1)
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    slope = log_p.exp() - log_q.exp()
    if name == "reverse_kl":
        slope = log_p.exp() * (log_p - log_q - reverse[:, None])
    errors = {}
    for backend in ("triton", "torch"):
        leaf = hidden.detach().requires_grad_()
        loss, outputs = linear_divergence(
            leaf, weight, shard=VocabShard.unsharded(vocab), outputs=(name,),
            teacher=HiddenStates(teacher_hidden, teacher_weight),
            token_loss=lambda outputs, rows: getattr(outputs, name), backend=backend,
        )  # fmt: skip
        loss.backward()
        errors[f"value {backend}"] = relative(getattr(outputs, name), forward if name == "forward_kl" else reverse)
        errors[f"gradient {backend}"] = relative(leaf.grad, slope @ weight.double())
    for key, error in errors.items():
        record_property(key, f"{error:.3g}")
    assert max(errors["value triton"], errors["value torch"]) <= 1e-3
    # The logits gradient is rounded to bf16 for the product, and so is the result.
    assert max(errors["gradient triton"], errors["gradient torch"]) <= 1e-2
