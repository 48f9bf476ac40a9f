"""Stand-ins for models, engines and rewards, around which the control plane of a training step is measured and tested.

Everything else is the real code: sources of six kinds of stages, packing, balancing and exchange of samples.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.data.stored_samples import ListedSamples, OfflineSamples
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.objectives.distill import divergence_objective, sft_objective
from megatron_s2d.objectives.policy import grpo_objective
from megatron_s2d.objectives.terms import Metric, Objective
from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import AnySample, Prompt, own_samples
from megatron_s2d.rollout.buffer import RolloutBuffer
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_of
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker
from megatron_s2d.stages.grpo import GrpoSource
from megatron_s2d.stages.opd import DivergenceOpdSource, PolicyGradientOpdSource, opd_objective
from megatron_s2d.stages.policy_loss import surrogate_of
from megatron_s2d.stages.sft import OfflineSource
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.train.micro_batches import MicroBatcher
from megatron_s2d.verify import Verdict

VOCAB_SIZE = 1000
GROUPS_PER_RANK, GROUP_SIZE = 2, 4
STEPS = 3  # that are measured, without the first, which connects, and the last, which saves


def stand_in_layout(rank: int, size: int) -> types.SimpleNamespace:
    """The layout of ``size`` data-parallel ranks with one rank each, over the default group."""
    return types.SimpleNamespace(
        config=types.SimpleNamespace(sequence_parallel=False), dp_rank=rank, dp_size=size, cp_rank=0, cp_size=1,
        tp_rank=0, tp_size=1, is_dp_leader=True, is_output_rank=True, is_pipeline_last_stage=True, is_replica_root=True,
        leader_in_replica=0, output_ranks=tuple((other,) for other in range(size)),
        host_dp=HostGroup(dist.group.WORLD if size > 1 else None), host_replica=HostGroup(),
    )  # fmt: skip


class StandInModel(MegatronModel):
    """A model whose log-probabilities are a function of the tokens; everything around it is the real code."""

    def __init__(self, layout: Any, number: float, max_tokens: int):
        self.layout, self.max_tokens, self.packs_by_domain = layout, max_tokens, False
        self._number = number
        self.trainable = types.SimpleNamespace(learning_rate=0.1)
        self.trained: list[Any] = []  # micro-batches of each update

    chunks = ()

    @property
    def _micro_batcher(self) -> MicroBatcher:
        return MicroBatcher(
            self.layout, VOCAB_SIZE, self.max_tokens, packed=True, pad_to_multiple=1, count_multiple=1, by_domain=False
        )

    def _score_own(self, samples: Sequence[AnySample], output: str) -> dict[int, np.ndarray]:
        batches = self.pack(samples, {})
        self._check_counts(len(batches))
        scores = {}
        for batch in batches:
            for index, labels in zip(batch.indices, batch.unpack(batch.labels), strict=True):
                values = -np.abs(np.sin(self._number * (labels.numpy() + 1))).astype(np.float32)
                scores[index] = np.where(own_samples([samples[index]])[0].response_mask, values, np.float32(0))
        return scores

    def forward_backward(self, micro_batches, objective, teachers=None, *, num_tokens, observe=None):
        self._check_counts(len(micro_batches))
        self.trained.append(micro_batches)
        for batch in micro_batches if observe is not None else ():
            observe(batch, TokenOutputs(teacher_log_probs=-torch.ones(batch.labels.numel())))
        return {"loss": Metric.of(0.0)}

    def optim_step(self) -> float:
        return 1.0

    def start_saving(self, *arguments: Any, **options: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(is_written=lambda: True, finish=lambda: None)

    def _check_counts(self, count: int) -> None:
        assert self.layout.host_dp.max(np.array([count]))[0] == count, "ranks have other numbers of micro-batches"


class StandInEngine:
    """Answers each request with tokens from its seed; responses differ in length by a factor of up to 4."""

    version = 0

    def __init__(self, response_length: int):
        self._length = response_length

    def generate(self, requests: Sequence[Request], progress: Any = None) -> list:
        samples = []
        for request in requests:
            random = np.random.default_rng(request.seed)
            length = int(random.integers(self._length // 4, self._length + 1))
            tokens, log_probs = random.integers(0, VOCAB_SIZE, length), -random.random(length).astype(np.float32)
            reason = "stop" if length < self._length else "length"
            samples.append(sample_of(request, tokens, log_probs, reason, self.version))
        return samples

    def sleep(self) -> None:
        pass

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        self.version = version

    def metrics(self) -> dict[str, float]:
        return {}


class StandInRewards:
    """Accepts every other response, by its text."""

    def grade(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Verdict]:
        return [Verdict(float(len(text) % 2), "correct" if len(text) % 2 else "wrong") for text in texts]


def tokenizer() -> types.SimpleNamespace:
    return types.SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))


def worker_of(layout: Any, response_length: int) -> RolloutWorker:
    params = SamplingParams(response_length, (0,))
    return RolloutWorker(layout, StandInEngine(response_length), params, 7, tokenizer(), StandInRewards())


def buffer_of(layout: Any, num_groups: int, response_length: int, steps: int = STEPS + 1) -> RolloutBuffer:
    prompts = [
        Prompt(f"pool/{number}", np.arange(10 + number % 7), "", "math", "math", "1")
        for number in range(num_groups * 2)
    ]
    loader = PromptDataLoader(prompts, num_groups, 5)
    return RolloutBuffer(loader, worker_of(layout, response_length), num_groups, GROUP_SIZE, steps)


def grpo_stage(num_groups: int, response_length: int, **options: Any) -> GrpoConfig:
    return GrpoConfig(
        role="grpo", init="m", prompts="pool", steps=STEPS + 1, train_batch_size=num_groups, num_generations=GROUP_SIZE,
        sampling={"max_response_length": response_length}, rollout_correction={"mode": "off"},
        **({"num_mini_batches": 2} | options),
    )  # fmt: skip


def opd_stage(num_groups: int, response_length: int, **options: Any) -> OpdConfig:
    settings = {"kl_estimator": "sampled_token", "rollout_correction": {"mode": "off"}} | options
    return OpdConfig(
        role="opd", init="m", teacher="t", prompts="pool", steps=STEPS + 1, train_batch_size=num_groups,
        num_generations=GROUP_SIZE, sampling={"max_response_length": response_length}, **settings,
    )  # fmt: skip


class StandInTeachers:
    """Frozen models by domain, of which there is one."""

    def __init__(self, model: StandInModel):
        self._model = model

    def score(self, samples: Sequence[AnySample], *, holders: Any) -> list[np.ndarray | None]:
        return self._model.score(samples, holders=holders)


def grpo_source(layout: Any, num_groups: int, response_length: int, **options: Any) -> GrpoSource:
    stage = grpo_stage(num_groups, response_length, **options)
    return GrpoSource(
        stage, buffer_of(layout, num_groups, response_length), StandInModel(layout, 3.0, 4 * response_length), 1
    )


def opd_source(layout: Any, num_groups: int, response_length: int, **options: Any) -> PolicyGradientOpdSource:
    stage = opd_stage(num_groups, response_length, **options)
    student, teacher, reference = (StandInModel(layout, number, 4 * response_length) for number in (1.0, 2.0, 3.0))
    references = StandInTeachers(reference) if stage.needs_reference else None
    buffer = buffer_of(layout, num_groups, response_length)
    return PolicyGradientOpdSource(stage, student, buffer, StandInTeachers(teacher), references, None, 1)


class StandInDistributions:
    """A teacher without values, for losses that compare distributions."""

    def distributions(self, mini_batch: Any, micro_batches: Sequence[Any]) -> list[None]:
        return [None] * len(micro_batches)

    def metrics(self) -> dict[str, Metric]:
        return {}


def stored_samples(num_groups: int, response_length: int) -> OfflineSamples:
    """Responses that every rank can read, each made when it is asked for; in the order of their numbers."""
    engine, params = StandInEngine(response_length), SamplingParams(response_length, (0,))

    def sample(index: int) -> Any:
        prompt = Prompt(f"stored/{index}", np.arange(10 + index % 7), "", "math", "math", "1")
        (made,) = engine.generate([Request(f"{prompt.id}#0@0", prompt, f"{prompt.id}@0.0", index, params)])
        return made

    return OfflineSamples(ListedSamples(sample), lambda start, count: range(start, start + count))


def offline_source(layout: Any, num_groups: int, response_length: int, weight_column: str) -> OfflineSource:
    stored = stored_samples(num_groups, response_length)
    return OfflineSource(stored, num_groups * GROUP_SIZE, "token_mean", response_length, weight_column, layout)


def gkd_source(layout: Any, num_groups: int, response_length: int) -> DivergenceOpdSource:
    options = {"kl_estimator": "full_vocab", "divergence": "forward_kl", "on_policy_fraction": 0.5, "cache": "c"}
    stage = opd_stage(num_groups, response_length, **options, token_weighting="entropy")
    student, teacher = (StandInModel(layout, number, 4 * response_length) for number in (1.0, 2.0))
    buffer = buffer_of(layout, num_groups // 2, response_length)
    cached = stored_samples(num_groups, response_length)
    return DivergenceOpdSource(stage, student, buffer, StandInTeachers(teacher), cached, 1)


GATE = {"lambda_high": 1.8, "conflict_fallback": "interp", "conflict_beta": 0.5, "stability_clip": 0.3}
# Kind of stage -> a source for (layout, groups, longest response).
SOURCES: dict[str, Callable[[Any, int, int], Any]] = {
    "grpo": grpo_source,
    "opd": opd_source,
    "sg_opd": functools.partial(opd_source, reference="r", sign_gate=GATE),
    "gkd": gkd_source,
    "sft": functools.partial(offline_source, weight_column="supervised_weight"),
    "forward_kl": functools.partial(offline_source, weight_column="divergence_weight"),
}


def objective_of(source: Any) -> Objective:
    """The loss of the source's kind of stage."""
    if isinstance(source, OfflineSource):
        supervised = source.weight_column == "supervised_weight"
        return sft_objective() if supervised else divergence_objective("forward_kl")
    if isinstance(source.stage, OpdConfig):
        return opd_objective(source.stage)
    return grpo_objective(surrogate_of(source.stage), kl_loss_coef=0.0)
