"""One model and one batch, measured in some precision, and how two measurements differ.

As a script it writes the float32 measurement of a process that sees no GPU: `python parity_case.py OUT`, with
CUDA_VISIBLE_DEVICES empty. Weights are drawn by name, so they are the same bits in every process. Its gradients are
autograd's own: where Transformer Engine is installed, Megatron takes that one's optimizer, which needs a GPU.
"""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import torch

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import Fp8Config
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.packing import MicroBatch, MiniBatch
from megatron_s2d.objectives.distill import divergence_objective, sft_objective
from megatron_s2d.parallel.layout import Layout, build_layout, initialize_distributed
from megatron_s2d.records import Sample
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter
from megatron_s2d.train.megatron_model import MegatronModel

# Widths are multiples of 128, which blockwise FP8 needs; weights are wide enough to make distributions uneven.
SPEC = ModelConfig(
    family="qwen3", num_layers=4, hidden_size=256, ffn_hidden_size=768, num_attention_heads=4, num_query_groups=2,
    head_dim=64, vocab_size=512, max_position_embeddings=512, rope_theta=1e4, initializer_range=0.06,
).resolve()  # fmt: skip


@dataclasses.dataclass
class Measured:
    """Loss, log-probabilities and gradients of one model on the batch."""

    loss: float
    log_probs: list[np.ndarray]
    gradients: dict[str, torch.Tensor]  # float32, by the names of Megatron's own layers


def samples(count: int = 12) -> list[Sample]:
    rng = np.random.default_rng(11)
    batch = []
    for index in range(count):
        prompt, response = int(rng.integers(4, 20)), int(rng.integers(20, 80))
        batch.append(
            Sample(
                id=str(index), prompt_id=str(index), group_id=str(index), domain="d", seed=index,
                token_ids=rng.integers(0, SPEC.vocab_size, prompt + response),
                response_mask=np.arange(prompt + response) >= prompt, temperature=1.0, finish_reason="stop",
            )
        )  # fmt: skip
    return batch


def policy(layout: Layout, precision: str, *, fp8: str | None = None, packed: bool = True, **options) -> MegatronModel:
    options = {"max_tokens": 512} | options
    recipe = None if fp8 is None else Fp8Config(recipe=fp8)
    return MegatronModel(SPEC, layout, precision=precision, seed=7, fp8=recipe, packed=packed, **options)


def weights_of(batch: list[Sample], column: str) -> dict[str, list[float]]:
    return {column: [1 / sum(sample.response_length for sample in batch)] * len(batch)}


def measure(
    layout: Layout, precision: str, *, fp8: str | None = None, packed: bool = True, plain: bool = False
) -> Measured:
    """Scores, then loss and gradients of the mean cross-entropy: through Megatron's buffers, or by autograd alone."""
    model, batch = policy(layout, precision, fp8=fp8, packed=packed), samples()
    scores = model.score(batch)
    batches = model.pack(batch, weights_of(batch, "supervised_weight"))
    if plain:
        return _by_autograd(model, batches, scores)
    model.prepare_training(OptimizerConfig(), 10)
    count = sum(len(sample.token_ids) for sample in batch)
    loss = model.forward_backward(batches, sft_objective(), num_tokens=count)["loss"].value()
    (chunk,) = model.trainable.chunks
    gradients = {_local_name(name): p.main_grad.float().cpu().clone() for name, p in chunk.named_parameters()}
    return Measured(loss, scores, gradients)


def _by_autograd(model: MegatronModel, batches: list[MicroBatch], scores: list[np.ndarray]) -> Measured:
    objective, (chunk,), total = sft_objective(), model.chunks, 0.0
    chunk.train()
    for item in model._passes(batches, objective.needs, None):
        item.objective = objective
        with model.layout.active():
            loss = model._forward(chunk, item)
            loss.backward()
        total += float(loss.detach())
    return Measured(total, scores, {name: parameter.grad for name, parameter in chunk.named_parameters()})


def _local_name(name: str) -> str:
    """Transformer Engine keeps norms inside the products that follow them; Megatron's wrapper has a name as well."""
    name = name.removeprefix("module.")
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


def differences(measured: Measured, expected: Measured) -> dict[str, float]:
    """Gaps of log-probabilities in nats a response token, relative gap of the loss, cosines of the gradients."""
    masks = [sample.response_mask for sample in samples()]
    gaps = np.concatenate(
        [np.abs(a - b)[mask] for a, b, mask in zip(measured.log_probs, expected.log_probs, masks, strict=True)]
    )
    assert measured.gradients.keys() == expected.gradients.keys()
    cosines = {name: _cosine(measured.gradients[name], value) for name, value in expected.gradients.items()}
    gradients = [
        torch.cat([side[name].flatten() for name in cosines]) for side in (measured.gradients, expected.gradients)
    ]
    return {
        "log_prob_mean_gap": float(gaps.mean()),
        "log_prob_largest_gap": float(gaps.max()),
        "loss_relative_gap": abs(measured.loss / expected.loss - 1),
        "gradient_cosine": _cosine(*gradients),
        "least_cosine_of_a_tensor": min(cosines.values()),
    }


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def divergence(layout: Layout, student: MegatronModel, teacher: MegatronModel) -> float:
    """KL of the teacher's from the student's distribution over the whole vocabulary, nats a response token."""
    batch = samples()
    weights = weights_of(batch, "divergence_weight")
    teacher.freeze()
    student.prepare_training(OptimizerConfig(), 10)
    batches = student.pack(batch, weights)
    source = FullTeacher(student, TeacherRouter({None: teacher}))
    distributions = source.distributions(MiniBatch(batch, weights), batches)
    count = sum(len(sample.token_ids) for sample in batch)
    objective = divergence_objective("forward_kl")
    return student.forward_backward(batches, objective, distributions, num_tokens=count)["kl"].value()


def loss_curve(layout: Layout, precision: str, steps: int, *, fp8: str | None = None) -> np.ndarray:
    """Losses of ``steps`` updates on the batch, which the model overfits."""
    model = policy(layout, precision, fp8=fp8, max_tokens=10_000)
    model.prepare_training(OptimizerConfig(lr=1e-4, warmup_steps=10), steps)
    return np.array(train(model, steps))


def train(model: MegatronModel, steps: int) -> list[float]:
    """Losses of ``steps`` updates on the batch of a model prepared for training."""
    batch = samples()
    batches = model.pack(batch, weights_of(batch, "supervised_weight"))
    count = sum(len(sample.token_ids) for sample in batch)
    losses = []
    for _ in range(steps):
        losses.append(model.forward_backward(batches, sft_objective(), num_tokens=count)["loss"].value())
        model.optim_step()
    return losses


def main() -> None:
    initialize_distributed()
    measured = measure(build_layout(ParallelConfig()), "float32", plain=True)
    torch.save(dataclasses.asdict(measured), sys.argv[1])


if __name__ == "__main__":
    main()
