"""Print the errors of the kernels in Triton's interpreter as JSON on the last line; started by test_kl_triton.py."""

from __future__ import annotations

import json

import torch
from kl_problems import make_problem, reference, relative

from megatron_s2d.kl import torch_backend as plain
from megatron_s2d.kl import triton_backend as kernels
from megatron_s2d.kl.chunk import make_plan
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.merge import merge
from megatron_s2d.kl.shards import VocabShard

ALL = ("log_probs", "entropy", "forward_kl", "reverse_kl")
MIXTURES = ("jsd", "skew_forward_kl", "skew_reverse_kl")


def logits(rows: int, columns: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(columns)
    z = torch.randn(rows, columns, generator=generator)
    y = z + 0.2 * torch.randn(rows, columns, generator=generator)
    if kind == "confident":
        z[:, columns // 2] += 12
        y[:, columns // 2] += 12.37
    if kind == "forbidden":
        y[:, ::3] = z[:, ::3] = -torch.inf
    if kind == "rising":  # every block of columns has a new maximum
        z, y = z + torch.linspace(0, 60, columns), y + torch.linspace(0, 60, columns)
    return z, y


def compare(rows: int, columns: int, kind: str, mixture: str) -> dict[str, float]:
    z, y = logits(rows, columns, kind)
    target = torch.arange(rows) % columns
    owned = torch.arange(rows) % 3 != 0
    names = (mixture, *ALL)
    plan = make_plan(names, teacher="dense", beta=0.3, has_target=True)
    exact, masked = plain.statistics(z.double(), y.double(), target, owned, plan)
    statistics, _ = kernels.statistics(z, y, target, owned, plan)
    errors = {"statistics": relative(statistics, exact)}
    merged, triton_merged = merge(exact.unsqueeze(0), plan), merge(statistics.unsqueeze(0), plan)
    sums, _ = plain.divergence_sums(z.double(), y.double(), merged, plan, masked)
    triton_sums, _ = kernels.divergence_sums(z, y, triton_merged, plan, True)
    errors["sums"] = relative(triton_sums, sums)
    for side, values in ((merged, sums), (triton_merged, triton_sums)):
        side.outputs[mixture], side.expected_slope = values.unbind(1)
    for name in names:
        errors[name] = relative(triton_merged.outputs[name], merged.outputs[name])
    generator = torch.Generator().manual_seed(0)
    for selected in (names, ("forward_kl",), ("reverse_kl",), (mixture,), ("entropy",), ("log_probs",)):
        cotangents = {name: torch.rand(rows, generator=generator) for name in selected}
        wide = {name: value.double() for name, value in cotangents.items()}
        delta = plain.logits_gradient(
            z.double(), y.double(), target, owned, merged, wide, plan, masked, torch.empty(z.shape, dtype=torch.float64)
        )
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(z.shape, dtype=dtype)
            got = kernels.logits_gradient(z, y, target, owned, triton_merged, cotangents, plan, True, out)
            assert got is out
            key = f"gradient {'of all' if len(selected) > 1 else selected[0]} {dtype}"
            errors[key] = relative(got, delta)
    return errors


def errors_of_call() -> dict[str, float]:
    problem = make_problem(rows=9, vocab=301, width=16, teacher_width=12).rounded()
    names = ("jsd", *ALL)
    hidden = problem.hidden.float().requires_grad_()
    weight = problem.weight.float().requires_grad_()
    loss, _ = linear_divergence(
        hidden, weight, shard=VocabShard.unsharded(301), outputs=names, beta=0.3, backend="triton",
        teacher=problem.teacher(torch.float32), temperature=problem.temperature, target_ids=problem.target,
        token_loss=problem.token_loss, response_mask=problem.mask, chunk_bytes=301 * 8 * 4,
    )  # fmt: skip
    loss.backward()
    expected = reference(problem, names, 0.3)
    results = (loss.detach(), hidden.grad, weight.grad)
    errors = [relative(a, b) for a, b in zip(results, (expected[0], *expected[2:]), strict=True)]
    return dict(zip(("loss", "hidden", "weight"), errors, strict=True))


def main() -> None:
    results = {"call": errors_of_call()}
    for columns in (1, 5, 300, 5003):
        for kind in ("flat", "confident", "forbidden", "rising"):
            if kind == "forbidden" and columns < 5:
                continue
            mixture = MIXTURES[(columns + len(kind)) % 3]
            results[f"{columns} {kind} {mixture}"] = compare(2, columns, kind, mixture)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
