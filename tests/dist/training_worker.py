"""Trains tiny models at the layouts named on the command line and writes metrics and outputs as JSON.

Started by test_training_layouts.py through torchrun. Every layout sees the same samples, seeds and objectives:
arguments are the output file and layouts such as tp2, tp2sp, pp2, dp2, tp2pp2, ep2, cp2; STUDENT:TEACHER is a
distillation in which the two have layouts of their own, STUDENT:TEACHER+TEACHER one from two teachers by domain. Names
that end in "packed", and those with context-parallel ranks, use sequence packing. A layout is followed by = and the
scenarios to train, of those that are chosen.
"""

import contextlib
import dataclasses
import json
import re
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from ema_scenario import ema
from episode_scenario import episodes
from open_layout import open_layout
from validation_scenario import validated
from view_layouts import ONLY_VIEWS

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.cache import CacheHeader, TeacherCache
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.data.sample_exchange import keep_own
from megatron_s2d.data.stored_samples import OfflineSamples
from megatron_s2d.objectives.distill import divergence_objective, sft_objective
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.objectives.terms import ResponseCounts, token_weights
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.layout import Layout, initialize_distributed, shutdown_distributed
from megatron_s2d.records import AnySample, RemoteSample, Sample, own_samples
from megatron_s2d.stages import teacher_cache
from megatron_s2d.stages.sft import OfflineSource
from megatron_s2d.stages.teacher_cache import distributions_of
from megatron_s2d.teachers.cached import CachedTeacher
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.train.shown_responses import TeacherLogProbs

VOCAB = 27  # no multiple of any tensor-parallel size
STEPS = 2
BALANCED = ("tp1", "tp2sp", "pp2", "cp2", "ep2", "dp2")  # layouts of the load-balancing loss
REPLAYED = (*BALANCED, "tp1packed", "tp2sppacked", "pp2packed")  # layouts of routing replay
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


def policy(
    preset: str, layout: Layout, seed: int, max_tokens: int = 40, routing_replay: bool = False, **options
) -> MegatronModel:
    config = ModelConfig(preset=preset, vocab_size=VOCAB, **options)
    packed = PACKED or layout.cp_size > 1
    return MegatronModel(
        config.resolve(), layout, precision="float32", max_tokens=max_tokens, seed=seed, packed=packed, options=config,
        routing_replay=routing_replay,
    )  # fmt: skip


def weights(batch: list[Sample], loss_agg_mode: str) -> np.ndarray:
    lengths = [sample.response_length for sample in batch]
    return token_weights(lengths, loss_agg_mode, ResponseCounts.of(lengths), 8)


def train(
    model: MegatronModel, batch: list[Sample], objective, columns: dict, teacher=None, *, pickles: bool = False
) -> list[dict[str, float]]:
    """pickles: whether the teacher may use object collectives."""
    model.prepare_training(OPTIMIZER, STEPS)
    batch = keep_own(batch, model.layout)
    with contextlib.nullcontext() if pickles else no_object_collectives():
        return [update(model, batch, objective, columns, teacher) for _ in range(STEPS)]


def update(model: MegatronModel, batch: list[AnySample], objective, columns: dict, teacher) -> dict[str, float]:
    batches = model.pack(batch, columns)
    distributions = teacher.distributions(MiniBatch(batch, columns), batches) if teacher else None
    count = sum(sample.length for sample in batch)
    metrics = model.forward_backward(batches, objective, distributions, num_tokens=count)
    return {name: metric.value() for name, metric in metrics.items()} | {"grad_norm": model.optim_step()}


@contextlib.contextmanager
def no_object_collectives():
    """Make collectives that pickle fail: a step sends tensors only."""
    with contextlib.ExitStack() as stack:
        for name in ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"):
            refused = mock.Mock(side_effect=AssertionError(f"torch.distributed.{name} in a training step"))
            stack.enter_context(mock.patch.object(dist, name, refused))
        yield


def supervised(layout: Layout, preset: str = "tiny-teacher"):
    batch = samples()
    return train(policy(preset, layout, 1), batch, sft_objective(), {"supervised_weight": weights(batch, "token_mean")})


def one_update(model: MegatronModel) -> None:
    if model.trainable is None:
        model.prepare_training(OPTIMIZER, 2)
    columns = {"supervised_weight": weights(samples(), "token_mean")}
    update(model, keep_own(samples(), model.layout), sft_objective(), columns, None)


def balanced(layout: Layout):
    """Experts with a load-balancing loss, one sample per micro-batch: the loss is of a micro-batch and so the same."""
    batch = samples()
    model = policy("tiny-moe", layout, 1, max_tokens=1, moe_aux_loss_coeff=0.1)
    return train(model, batch, sft_objective(), {"supervised_weight": weights(batch, "token_mean")})


def replayed(layout: Layout, num_layers: int = 2):
    """Replay experts that no router chose, recomputing, in several micro-batches: a row off by one would show."""
    rng = np.random.default_rng(8)
    batch = []
    for sample in samples()[:-1]:
        scores = rng.random((len(sample.token_ids) - 1, num_layers, 4))  # of the layers' experts
        experts = np.argsort(scores, axis=2)[:, :, :2].astype(np.uint8)
        batch.append(dataclasses.replace(sample, routed_experts=experts))
    batch.append(samples()[-1])  # without routes
    model = policy("tiny-moe", layout, 1, recompute="full", routing_replay=True, num_layers=num_layers)
    columns = {"policy_weight": weights(batch, "token_mean")}
    scored = [
        dataclasses.replace(sample, old_log_probs=score)
        for sample, score in zip(batch, model.score_replicated(batch), strict=True)
    ]
    return train(model, scored, grpo_objective(Surrogate(), kl_loss_coef=0.0), columns)


def with_rollouts(model: MegatronModel, batch: list[Sample]) -> list[Sample]:
    """Add rollout log-probabilities that are off by up to 0.05 nats; the last sample has none."""
    rng = np.random.default_rng(6)
    scored = []
    for sample, score in zip(batch, model.score_replicated(batch), strict=True):
        noise = np.where(sample.response_mask, rng.uniform(-0.05, 0.05, len(score)), 0)
        scored.append(dataclasses.replace(sample, rollout_log_probs=(score + noise).astype(np.float32)))
    return [*scored[:-1], dataclasses.replace(scored[-1], rollout_log_probs=None)]


def grpo(layout: Layout):
    model, reference = policy("tiny-llama", layout, 2), policy("tiny-llama", layout, 3)
    reference.freeze()
    batch = samples()
    old, other = model.score_replicated(batch), reference.score_replicated(batch)
    batch = [
        dataclasses.replace(sample, old_log_probs=a - np.float32(0.05), reference_log_probs=b)
        for sample, a, b in zip(batch, old, other, strict=True)
    ]
    batch = with_rollouts(model, batch)[:-1]
    columns = {"policy_weight": weights(batch, "seq_mean_token_mean")}
    return train(model, batch, grpo_objective(Surrogate(), kl_loss_coef=0.1), columns)


def gspo(layout: Layout):
    """Ratios of whole responses, which context-parallel ranks have parts of, within the clip range and beyond it."""
    model = policy("tiny-llama", layout, 2)
    batch, rng = samples(), np.random.default_rng(7)
    batch = [
        dataclasses.replace(sample, old_log_probs=np.where(sample.response_mask, score + rng.normal(0, 0.1), 0))
        for sample, score in zip(batch, model.score_replicated(batch), strict=True)
    ]
    surrogate = Surrogate(policy_loss="gspo", clip_ratio_low=0.05, clip_ratio_high=0.05)
    columns = {"policy_weight": weights(batch, "seq_mean_token_mean")}
    return train(model, batch, grpo_objective(surrogate, kl_loss_coef=0, entropy_coeff=0.1), columns)


def opd(layout: Layout, teacher_layout: Layout | None = None):
    teacher = policy("tiny-teacher", teacher_layout or layout, 4)
    teacher.freeze()
    batch = samples()
    columns = {"divergence_weight": weights(batch, "token_mean")}
    student = policy("tiny-student", layout, 5)
    source = FullTeacher(student, TeacherRouter({None: teacher}))
    objective = divergence_objective("reverse_kl", measure_rollouts=True)
    check_teacher_log_probs(policy("tiny-student", layout, 5), batch, objective, columns, teacher)
    return train(student, with_rollouts(student, batch), objective, columns, source)


def check_teacher_log_probs(student, batch, objective, columns, teacher):
    """Compare the teacher's log-probabilities out of a training pass, of samples that were moved, with its scores."""
    layout, source = student.layout, FullTeacher(student, TeacherRouter({None: teacher}))
    student.prepare_training(OPTIMIZER, STEPS)
    held = [sample if layout.dp_rank == 0 else RemoteSample.of(sample, 0) for sample in batch]
    shown = types.SimpleNamespace(samples=held[::2], lines=lambda values: values)
    mini_batch, _ = student.balance(MiniBatch(held, columns))
    batches, passes = (
        student.pack(mini_batch.samples, mini_batch.loss_weights),
        TeacherLogProbs(shown, objective, student),
    )
    student.forward_backward(
        batches, objective, source.distributions(mini_batch, batches),
        num_tokens=mini_batch.num_tokens, **passes.observer(mini_batch),
    )  # fmt: skip
    passes.collect(mini_batch)
    scores = dict(zip([sample.id for sample in held], teacher.score(held, holders=layout), strict=True))
    assert sorted(passes.lines()) == sorted(sample.id for sample in own_samples(held[::2]))
    for name, values in passes.lines().items():
        np.testing.assert_allclose(values, scores[name], atol=2e-5)


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
    """Of the samples that each data-parallel rank holds, from all of them."""
    own = policy("tiny-llama", layout, 2).score(keep_own(samples(), layout))
    local = {index: score.tolist() for index, score in enumerate(own) if score is not None and layout.is_dp_leader}
    gathered = union(local)
    return [gathered[index] for index in range(len(own))]


def union(local: dict) -> dict:
    """The entries of all ranks, each of which has others."""
    parts: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, local)
    assert sum(map(len, parts)) == len({key for part in parts for key in part})
    return {key: value for part in parts for key, value in part.items()}


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
        with no_object_collectives():
            local = distributions_of(model, keep_own(samples(), layout), header)
        rows = union(local)
        tensor = "hidden" if representation == "hidden_states" else "log_probs"
        by_representation[representation] = [rows[index][1].tensors()[tensor].tolist() for index in sorted(rows)]
    return by_representation


def forward_kl(layout: Layout):
    """A teacher cache that the data-parallel ranks write and read, each its share."""
    teacher, student = policy("tiny-teacher", layout, 4), policy("tiny-student", layout, 5)
    header = CacheHeader(
        representation="hidden_states", teacher_digest="t", tokenizer_fingerprint="f", template_fingerprint="c",
        temperature=1.0, vocab_size=VOCAB, hidden_size=teacher.spec.hidden_size,
    )  # fmt: skip
    directory = Path(broadcast_from_rank0(tempfile.mkdtemp))
    batch = keep_own(samples(), layout)
    with no_object_collectives():
        for number, part in enumerate((batch[:4], batch[4:]), start=1):
            path = teacher_cache.batch_path(directory / "partial", number)
            teacher_cache.write_batch(path, len(part), distributions_of(teacher, part, header), header, layout)
        teacher_cache.save_output_layer(teacher, directory / "output.safetensors")
        teacher_cache.merge_batches(directory / "partial", 2, directory / "cache", header, layout)
        cache = TeacherCache.open(directory / "cache", expect=header)
        assert cache.num_parts == layout.dp_size and [s.id for s in cache.samples] == [s.id for s in batch]
        stored = OfflineSamples(cache.stored(temperature=1.0), lambda start, count: range(start, start + count))
        source = OfflineSource(stored, len(cache), "token_mean", 8, "divergence_weight", layout)
        (mini_batch,) = source.step(1).mini_batches
    student.prepare_training(OPTIMIZER, STEPS)
    cached = CachedTeacher(cache, directory / "output.safetensors", student, tail="bucket", temperature=1.0)
    objective, columns = divergence_objective("forward_kl"), dict(mini_batch.loss_weights)
    with no_object_collectives():
        return [update(student, mini_batch.samples, objective, columns, cached) for _ in range(STEPS)]


def results_of_pair(name: str, wanted: list[str], student: Layout, *teachers: Layout) -> dict:
    import view_scenarios  # imports this file, a second time

    if len(teachers) > 1:
        return {"opd_by_domain": opd_by_domain(student, teachers)}
    results = {"opd": opd(student, *teachers)}
    if any(scenario.startswith("view") for scenario in wanted):
        results |= {key: scenario(student, *teachers) for key, scenario in view_scenarios.SCENARIOS.items()}
    return results


def results_of_layout(name: str, wanted: list[str], layout: Layout) -> dict:
    import view_scenarios

    results = {}
    if "ep" in name or name in ("tp1", "tp2sp", "cp2"):
        results["moe"] = supervised(layout, "tiny-moe")
    if name in BALANCED:
        results["balanced"] = balanced(layout)
    if name in REPLAYED:
        results["replayed"] = replayed(layout)
    if "ep" not in name and name not in ONLY_VIEWS:
        chosen = (supervised, grpo, gspo, opd, opd_by_domain, forward_kl)
        for scenario in (*(scenario for scenario in chosen if scenario.__name__ in wanted), scores, cached):
            results[scenario.__name__] = scenario(layout)
    if "ema" in wanted:
        results["ema"] = ema(layout)
    if "episodes" in wanted:
        results["episodes"] = episodes(layout, policy, update, OPTIMIZER)
        results["validation"] = validated(layout, policy, one_update)
    if any(scenario.startswith("view") for scenario in wanted):
        results |= {key: scenario(layout) for key, scenario in view_scenarios.SCENARIOS.items()}
    if name == "tp1":
        results["float64"] = view_scenarios.reference(layout)
    return results


def main() -> None:
    import view_scenarios

    torch.set_num_threads(1)
    output, *names = sys.argv[1:]
    initialize_distributed()
    results = {}
    global PACKED
    for argument in names:
        name, _, wanted = argument.partition("=")
        PACKED = view_scenarios.worker.PACKED = name.endswith("packed")
        with contextlib.ExitStack() as stack:
            layouts = [stack.enter_context(open_layout(parse_layout(part))) for part in re.split("[:+]", name)]
            scenarios = results_of_pair if ":" in name else results_of_layout
            results |= {
                f"{name}/{scenario}": result
                for scenario, result in scenarios(name, wanted.split(","), *layouts).items()
            }
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results), encoding="utf-8")
    shutdown_distributed()


if __name__ == "__main__":
    main()
