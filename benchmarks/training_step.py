"""Training step on one CPU thread: as a stage makes it, with Megatron's model and optimizer, against plain PyTorch.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py [--repeats 7] [--model DIR]

DIR: a Hugging Face directory such as real-model/student of benchmarks/real_model.py, instead of small random models.

Both sides compute the mean cross-entropy of the same micro-batches on the same weights, accumulate gradients, clip them
and update with AdamW. The plain side is transformers' model with ``torch.optim.AdamW``. The losses of the first three
steps and the gradient norms are compared first; a difference stops the benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import interleaved_minima, published_model_twice, same_model_twice, start

from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Sample
from megatron_s2d.train.megatron_model import MegatronModel

OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.0, grad_clip=1.0)
REAL_OPTIMIZER = OptimizerConfig(lr=1e-6, weight_decay=0.0, grad_clip=1.0)  # pretrained weights stay where they are


@dataclasses.dataclass(frozen=True)
class Case:
    """An update over ``micro_batches`` of ``rows`` sequences each."""

    preset: str
    vocab_size: int
    micro_batches: int
    rows: int
    length: int


CASES = (
    Case("small-teacher", 512, 1, 64, 128),
    Case("small-teacher", 512, 4, 16, 128),
    Case("small-teacher", 512, 1, 128, 32),
    Case("tiny-teacher", 25, 1, 512, 18),
    Case("tiny-student", 25, 1, 512, 18),
    Case("tiny-student", 25, 1, 128, 18),
)

Step = Callable[[], tuple[float, float]]


def step_of_a_stage(model: MegatronModel, batches: list[torch.Tensor], optimizer: OptimizerConfig) -> Step:
    """Return a function that runs one update as a stage does, and returns (mean loss, gradient norm)."""
    model.prepare_training(optimizer, 10**6)
    count = sum(batch[:, 1:].numel() for batch in batches)
    samples = [
        Sample(
            id=f"{number}-{row}", prompt_id="p", group_id="p", domain="math", seed=0, token_ids=tokens,
            response_mask=np.arange(len(tokens)) > 0, temperature=1.0, finish_reason="length",
        )
        for number, batch in enumerate(batches)
        for row, tokens in enumerate(batch.numpy())
    ]  # fmt: skip
    weights, objective = {"supervised_weight": [1 / count] * len(samples)}, sft_objective()
    num_tokens = sum(sample.length for sample in samples)
    assert len(model.pack(samples, weights)) == len(batches)

    def step() -> tuple[float, float]:
        metrics = model.forward_backward(model.pack(samples, weights), objective, num_tokens=num_tokens)
        return metrics["loss"].value(), model.optim_step()

    return step


def plain_step(model: torch.nn.Module, batches: list[torch.Tensor], config: OptimizerConfig) -> Step:
    """Return the same in plain PyTorch."""
    count = sum(batch[:, 1:].numel() for batch in batches)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas, config.adam_eps, config.weight_decay)
    model.train()

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        total = 0.0
        for tokens in batches:
            loss = cross_entropy(model(tokens, use_cache=False).logits, tokens)
            (loss / count).backward()
            total += float(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        return total / count, float(norm)

    return step


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def measure(case: Case, layout: Layout, repeats: int, models, optimizer: OptimizerConfig = OPTIMIZER) -> str:
    """Return one row of the table. models: of ``same_model_twice``."""
    spec, chunks, reference = models
    model = MegatronModel(spec, layout, precision="float32", max_tokens=case.rows * case.length)
    with torch.no_grad():
        for own, given in zip(model.parameters(), chunks[0].parameters(), strict=True):
            own.copy_(given)
    generator = torch.Generator().manual_seed(0)
    shape = (case.rows, case.length)
    batches = [torch.randint(0, case.vocab_size, shape, generator=generator) for _ in range(case.micro_batches)]
    ours = step_of_a_stage(model, batches, optimizer)
    plain = plain_step(reference, batches, optimizer)
    for _ in range(3):
        results, expected = ours(), plain()
        agree = all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(results, expected, strict=True))
        assert agree, f"(loss, gradient norm) {results} against {expected}"
    seconds = interleaved_minima({"ours": ours, "plain": plain}, repeats)
    tokens = case.micro_batches * case.rows * case.length
    return (
        f"| {case.preset} ({spec.num_layers} x {spec.hidden_size}) "
        f"| {case.micro_batches} x {case.rows} x {case.length} | {1e3 * seconds['ours']:.1f} "
        f"| {1e3 * seconds['plain']:.1f} | {tokens / seconds['ours']:,.0f} | {seconds['ours'] / seconds['plain']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", type=Path, help="Hugging Face directory to measure instead")
    arguments = parser.parse_args()
    layout = start()
    print("| model | micro-batches x rows x tokens | ours, ms | plain, ms | ours, tokens/s | time ratio |")
    print("|---|---|---|---|---|---|")
    if arguments.model is not None:
        models = published_model_twice(arguments.model, layout)
        case = Case(arguments.model.name, models[0].vocab_size, 2, 4, 128)
        print(measure(case, layout, arguments.repeats, models, REAL_OPTIMIZER), flush=True)
        return
    for case in CASES:
        models = same_model_twice(case.preset, case.vocab_size, layout)
        print(measure(case, layout, arguments.repeats, models), flush=True)


if __name__ == "__main__":
    main()
