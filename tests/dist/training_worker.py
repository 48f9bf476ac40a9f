"""Trains tiny models at the layouts named on the command line and writes metrics and outputs as JSON.

Started by test_training_layouts.py through torchrun. Every layout sees the same samples, seeds and objectives:
arguments are the output file and layouts such as tp2, tp2sp, pp2, dp2, tp2pp2, ep2, cp2; STUDENT:TEACHER is a
distillation in which the two have layouts of their own, STUDENT:TEACHER+TEACHER one from two teachers by domain. Names
that end in "packed", and those with context-parallel ranks, use sequence packing.
"""

import dataclasses
import json
import re
import sys

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.cache import CacheHeader
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.objectives.distill import divergence_objective, sft_objective
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.objectives.terms import ResponseCounts, token_weights
from megatron_s2d.parallel.layout import Layout, build_layout, initialize_distributed, shutdown_distributed
from megatron_s2d.records import Sample
from megatron_s2d.stages.teacher_cache import distributions_of
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter
from megatron_s2d.train.megatron_model import MegatronModel

VOCAB = 27  # no multiple of any tensor-parallel size
STEPS = 2
BALANCED = ("tp1", "tp2sp", "cp2", "ep2", "dp2")  # layouts of the load-balancing loss
OPTIMIZER = OptimizerConfig(lr=3e-3, weight_decay=0.01)
PACKED = False  # of the current layout


def parse_layout(name: str) -> ParallelConfig:
    sizes = {key: int(value) for key, value in re.findall(r"(tp|pp|dp|ep|cp)(\d)", name)}
    data = sizes.get("dp", 1) * sizes.get("ep", 1)  # experts are shared over data ranks
    return ParallelConfig(
        tensor_model_parallel_size=sizes.get("tp", 1),
        pipeline_model_parallel_size=sizes.get("pp", 1),
        context_parallel_size=sizes.get("cp", 1),
        expert_model_parallel_size=sizes.get("ep", 1),
        data_parallel_size=data,
        sequence_parallel="sp" in name,
    )


def samples(count: int = 13) -> list[Sample]:
    rng = np.random.default_rng(5)
    batch = []
    for index in range(count):
        prompt, response = int(rng.integers(2, 7)), int(rng.integers(1, 9))
        mask = np.arange(prompt + response) >= prompt
        batch.append(
            Sample(
                id=str(index),
                prompt_id=str(index // 3),
                group_id=str(index // 3),
                domain="test",
                seed=index,
                token_ids=rng.integers(0, VOCAB, prompt + response),
                response_mask=mask,
                temperature=1.0,
                finish_reason="stop",
                advantages=np.where(mask, rng.normal(), 0).astype(np.float32),
            )
        )
    return batch


def policy(preset: str, layout: Layout, seed: int, max_tokens: int = 40, **options) -> MegatronModel:
    config = ModelConfig(preset=preset, vocab_size=VOCAB, **options)
    packed = PACKED or layout.cp_size > 1
    return MegatronModel(
        config.resolve(), layout, precision="float32", max_tokens=max_tokens, seed=seed, packed=packed, options=config
    )


def weights(batch: list[Sample], loss_agg_mode: str) -> np.ndarray:
    lengths = [sample.response_length for sample in batch]
    return token_weights(lengths, loss_agg_mode, ResponseCounts.of(lengths), 8)


def train(model: MegatronModel, batch: list[Sample], objective, columns: dict, teacher=None) -> list[dict[str, float]]:
    model.prepare_training(OPTIMIZER, STEPS)
    rows = []
    for _ in range(STEPS):
        batches = model.pack(batch, columns)
        distributions = teacher.distributions(MiniBatch(batch, columns), batches) if teacher else None
        count = sum(len(sample.token_ids) for sample in batch)
        metrics = model.forward_backward(batches, objective, distributions, num_tokens=count)
        row = {name: metric.value() for name, metric in metrics.items()}
        rows.append(row | {"grad_norm": model.optim_step()})
    return rows


def supervised(layout: Layout, preset: str = "tiny-teacher"):
    batch = samples()
    return train(policy(preset, layout, 1), batch, sft_objective(), {"supervised_weight": weights(batch, "token_mean")})


def balanced(layout: Layout):
    """Experts with a load-balancing loss, one sample per micro-batch: the loss is of a micro-batch and so the same."""
    batch = samples()
    model = policy("tiny-moe", layout, 1, max_tokens=1, moe_aux_loss_coeff=0.1)
    return train(model, batch, sft_objective(), {"supervised_weight": weights(batch, "token_mean")})


def with_rollouts(model: MegatronModel, batch: list[Sample]) -> list[Sample]:
    """Add rollout log-probabilities that are off by up to 0.05 nats; the last sample has none."""
    rng = np.random.default_rng(6)
    scored = []
    for sample, score in zip(batch, model.score(batch), strict=True):
        noise = np.where(sample.response_mask, rng.uniform(-0.05, 0.05, len(score)), 0)
        scored.append(dataclasses.replace(sample, rollout_log_probs=(score + noise).astype(np.float32)))
    return [*scored[:-1], dataclasses.replace(scored[-1], rollout_log_probs=None)]


def grpo(layout: Layout):
    model, reference = policy("tiny-llama", layout, 2), policy("tiny-llama", layout, 3)
    reference.freeze()
    batch = samples()
    old, other = model.score(batch), reference.score(batch)
    batch = [
        dataclasses.replace(sample, old_log_probs=a - np.float32(0.05), reference_log_probs=b)
        for sample, a, b in zip(batch, old, other, strict=True)
    ]
    batch = with_rollouts(model, batch)[:-1]
    columns = {"policy_weight": weights(batch, "seq_mean_token_mean")}
    return train(model, batch, grpo_objective(Surrogate(), kl_loss_coef=0.1), columns)


def opd(layout: Layout, teacher_layout: Layout | None = None):
    teacher = policy("tiny-teacher", teacher_layout or layout, 4)
    teacher.freeze()
    batch = samples()
    columns = {"divergence_weight": weights(batch, "token_mean")}
    student = policy("tiny-student", layout, 5)
    source = FullTeacher(student, TeacherRouter({None: teacher}))
    objective = divergence_objective("reverse_kl", measure_rollouts=True)
    return train(student, with_rollouts(student, batch), objective, columns, source)


def opd_by_domain(layout: Layout, teacher_layouts: tuple[Layout, Layout] | None = None):
    """Two teachers; every other sample belongs to the second one's domain."""
    teacher_specs = zip(("test", "other"), (4, 6), teacher_layouts or (layout, layout), strict=True)
    teachers = {name: policy("tiny-teacher", teacher_layout, seed) for name, seed, teacher_layout in teacher_specs}
    for teacher in teachers.values():
        teacher.freeze()
    batch = [dataclasses.replace(s, domain=("test", "other")[i % 2]) for i, s in enumerate(samples())]
    columns = {"divergence_weight": weights(batch, "token_mean")}
    student = policy("tiny-student", layout, 5)
    student.packs_by_domain = True
    return train(
        student, batch, divergence_objective("reverse_kl"), columns, FullTeacher(student, TeacherRouter(teachers))
    )


def scores(layout: Layout):
    return [score.tolist() for score in policy("tiny-llama", layout, 2).score(samples())]


def cached(layout: Layout):
    model = policy("tiny-teacher", layout, 4)
    by_representation = {}
    for representation, extra in (
        ("full_vocab", {}),
        ("top_k", {"k": 5}),
        ("hidden_states", {"hidden_size": model.spec.hidden_size}),
    ):
        header = CacheHeader(
            representation=representation,
            teacher_digest="t",
            tokenizer_fingerprint="f",
            template_fingerprint="c",
            temperature=1.0,
            vocab_size=VOCAB,
            **extra,
        )
        rows = distributions_of(model, samples(), header)
        tensor = "hidden" if representation == "hidden_states" else "log_probs"
        by_representation[representation] = [rows[index].tensors()[tensor].tolist() for index in sorted(rows)]
    return by_representation


def main() -> None:
    torch.set_num_threads(1)
    output, *names = sys.argv[1:]
    initialize_distributed()
    results = {}
    layouts = {part: build_layout(parse_layout(part)) for name in names for part in re.split("[:+]", name)}
    global PACKED
    for name in names:
        PACKED = name.endswith("packed")
        if ":" in name:
            student, teacher = name.split(":")
            if "+" in teacher:
                pair = tuple(layouts[part] for part in teacher.split("+"))
                results[f"{name}/opd_by_domain"] = opd_by_domain(layouts[student], pair)
            else:
                results[f"{name}/opd"] = opd(layouts[student], layouts[teacher])
            continue
        layout = layouts[name]
        if "ep" in name or name in ("tp1", "cp2"):
            results[f"{name}/moe"] = supervised(layout, "tiny-moe")
        if name in BALANCED:
            results[f"{name}/balanced"] = balanced(layout)
        if "ep" not in name:
            for scenario in (supervised, grpo, opd, opd_by_domain, scores, cached):
                results[f"{name}/{scenario.__name__}"] = scenario(layout)
    if dist.get_rank() == 0:
        with open(output, "w") as file:
            json.dump(results, file)
    shutdown_distributed()


if __name__ == "__main__":
    main()
