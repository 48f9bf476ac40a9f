"""THE loop: samples, old log-probabilities, micro-batches, gradients, update, push, metrics, checkpoint.

Every stage that trains calls ``train`` with a source of samples and an objective; the loop knows neither the method nor
the layout, and all ranks run the same lines. What a step trains on is a function of its number and of the weights
alone, so a run that was killed goes on from its last checkpoint with the same result as an unbroken one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from megatron_s2d.artifacts.files import append_line, truncate_jsonl_after
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.training import CheckpointConfig
from megatron_s2d.data.packing import MicroBatch, MiniBatch
from megatron_s2d.errors import UserError
from megatron_s2d.kl.teachers import TeacherSource
from megatron_s2d.objectives.mismatch import GAP_PREFIX
from megatron_s2d.objectives.terms import Objective
from megatron_s2d.parallel.collectives import broadcast_flag
from megatron_s2d.rollout.engine import RolloutEngine
from megatron_s2d.train.checkpoints import CheckpointManager
from megatron_s2d.train.metrics import MetricsLog, Timer
from megatron_s2d.train.policy import MegatronModel

ROLLOUTS_NAME = "rollouts.jsonl"


class Stopped(Exception):
    """The run was asked to stop; its checkpoint is on disk and the same command goes on from it."""


@dataclasses.dataclass(frozen=True, eq=False)
class StepData:
    """What one step trains on: the same on every rank."""

    mini_batches: Sequence[MiniBatch]
    metrics: Mapping[str, float]  # of the samples, such as reward and response_length
    examples: Sequence[str] = ()  # JSON lines of a few responses, for people; each has a "step"
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON; what ``resume`` needs after this step


class SampleSource(Protocol):
    """Where samples come from: data, a cache, or the live policy with verifier and scorers."""

    def step(self, step: int) -> StepData:
        """The samples of ``step`` (counted from 1); a function of the step and the weights. Collective."""
        ...

    def resume(self, position: Mapping[str, Any]) -> None:
        """Go on after the step whose ``StepData.position`` this is; empty at the start."""
        ...


class Teacher(Protocol):
    """A frozen distribution over the vocabulary, asked for per micro-batch."""

    def distributions(self, update: MiniBatch, batches: Sequence[MicroBatch]) -> Sequence[TeacherSource | None]:
        """One source for each micro-batch of this rank (None where the rank has no output layer). Collective."""
        ...

    def metrics(self) -> dict[str, float]:
        """What ``distributions`` measured in its last call, over all ranks. Collective."""
        ...


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How long, and where to."""

    steps: int
    checkpoint: CheckpointConfig
    stop: Callable[[], bool] = lambda: False  # asked after every step on rank 0
    tensorboard: Path | None = None
    max_kl: float | None = None  # largest mean KL to the teacher, in nats a token; beyond it the run is stopped
    max_mismatch_kl: float | None = None  # largest mean KL between engine and trainer, in nats a token; likewise


def train(
    policy: MegatronModel,
    source: SampleSource,
    objective: Objective,
    stage: StageDirectory,
    settings: LoopSettings,
    *,
    teacher: Teacher | None = None,
    engine: RolloutEngine | None = None,
) -> None:
    """Run a stage from its last checkpoint (or its start) to its last step. Collective.

    ``policy`` is ready to train and holds the stage's starting weights. Raises ``Stopped``, and ``UserError`` for a
    loss or gradient that is not finite or a checkpoint that cannot be written; the last checkpoint stays good.
    """
    checkpoints = CheckpointManager(policy, stage, settings.checkpoint)
    position = checkpoints.resume()
    updates = position["updates"]
    source.resume(position)
    if engine is not None:
        engine.update_weights(policy.chunks, updates)
    log = open_log(stage, position["step"], settings.tensorboard)
    timer = Timer()
    for step in range(position["step"] + 1, settings.steps + 1):
        with timer.section("rollout"):
            data = source.step(step)
            if engine is not None:
                engine.sleep()
        stale = {} if engine is None else policy_lag(data.mini_batches, updates)
        with timer.section("score"):
            batches_of_step = [
                with_old_log_probs(policy, objective, drop_incomparable_rollout_log_probs(objective, update, place))
                for place, update in enumerate(data.mini_batches)
            ]
        reports = []
        for update in batches_of_step:
            with timer.section("teacher"):
                batches = policy.pack(update.samples, update.loss_weights)
                distributions = None if teacher is None else teacher.distributions(update, batches)
            with timer.section("train"):
                learning_rate = policy.trainable.learning_rate
                report = policy.forward_backward(batches, objective, distributions, num_tokens=update.num_tokens)
                report |= {} if teacher is None else teacher.metrics()
                check_kl(report, settings.max_kl, step)
                check_mismatch_kl(report, settings.max_mismatch_kl, step)
                report["grad_norm"] = policy.optim_step()
            reports.append(report | {"learning_rate": learning_rate})
            updates += 1
        if engine is not None:
            with timer.section("update_weights"):
                engine.update_weights(policy.chunks, updates)
        tokens = sum(update.num_tokens for update in data.mini_batches)
        measured = dict(data.metrics) | stale | ({} if engine is None else engine.metrics())
        log.write(step, aggregate_metrics(reports, measured, tokens, timer.collect_and_reset()))
        write_examples(stage, data.examples)
        stopping = broadcast_flag(settings.stop())
        checkpoints.poll()
        if step == settings.steps or stopping or step % settings.checkpoint.interval_steps == 0:
            checkpoints.save(dict(data.state) | {"step": step, "updates": updates})
        if stopping and step < settings.steps:
            checkpoints.finish()
            raise Stopped(f"stopped after step {step} of {settings.steps}")
    checkpoints.finish()
    log.close()


def with_old_log_probs(policy: MegatronModel, objective: Objective, update: MiniBatch) -> MiniBatch:
    """``update`` with the log-probabilities under the weights before the first update, where the objective has them."""
    present = all(sample.old_log_probs is not None for sample in update.samples)
    if present or "old_log_probs" not in objective.columns:
        return update
    scores = policy.score(update.samples)
    samples = [
        dataclasses.replace(sample, old_log_probs=values) for sample, values in zip(update.samples, scores, strict=True)
    ]
    return dataclasses.replace(update, samples=samples)


def policy_lag(updates: Sequence[MiniBatch], version: int) -> dict[str, float]:
    """Updates since the weights that wrote a response token: mean and largest; empty without responses of the policy.

    version: of the weights at the step's beginning. Responses of a teacher have no ``rollout_log_probs``.
    """
    own = [sample for update in updates for sample in update.samples if sample.rollout_log_probs is not None]
    spans = [span for sample in own for span in sample.weight_versions]
    if not spans:
        return {}
    ages = np.array([version - span.version for span in spans])
    tokens = np.array([span.stop - span.start for span in spans])
    return {"policy_lag": float((ages * tokens).sum() / tokens.sum()), "policy_lag_max": float(ages.max())}


def drop_incomparable_rollout_log_probs(objective: Objective, update: MiniBatch, place: int) -> MiniBatch:
    """``update``, the step's number ``place``, without the engine's log-probabilities where they cannot be compared.

    They are compared with the trainer's under the weights that sampled: the old ones, or those of the forward pass of
    the step's first update.
    """
    if place == 0 or "old_log_probs" in objective.columns:
        return update
    samples = [dataclasses.replace(sample, rollout_log_probs=None) for sample in update.samples]
    return dataclasses.replace(update, samples=samples)


def check_kl(report: Mapping[str, float], limit: float | None, step: int) -> None:
    """Stop a run that diverges from its teacher, before the update."""
    if limit is not None and report["kl"] > limit:
        raise UserError(
            f"step {step}: the KL to the teacher is {report['kl']:.3g} nats a token, above max_kl {limit}: lower the "
            "learning rate, or start from a longer warm-up"
        )


def check_mismatch_kl(report: Mapping[str, float], limit: float | None, step: int) -> None:
    """Stop a run whose samples come from another distribution than the trained one, before the update."""
    if limit is not None and report.get("mismatch/k3_kl", 0.0) > limit:
        raise UserError(
            f"step {step}: trainer and engine differ by a KL of {report['mismatch/k3_kl']:.3g} nats a token "
            f"(mismatch/k3_kl), above rollout.max_mismatch_kl {limit}: are precision, weights and model settings of the servers "
            "those of the trainer? See weight_sync/max_log_prob_diff and staleness in metrics.jsonl (older weights count here, too) and the "
            "servers' logs"
        )


def aggregate_metrics(
    reports: Sequence[Mapping[str, float]], samples: Mapping[str, float], tokens: int, times: Mapping[str, float]
) -> dict[str, float]:
    """One row of metrics: the mean over the step's updates (of extremes the extreme), the source's, and speed."""
    row = {}
    for name in dict.fromkeys(name for report in reports for name in report):
        combine = np.max if name.endswith("_max") else np.min if name.endswith("_min") else np.mean
        row[name] = float(combine([report[name] for report in reports if name in report]))
    row = {name: value for name, value in row.items() if value or not name.startswith(GAP_PREFIX)}
    return row | dict(samples) | {"tokens_per_second": tokens / times["timing_s/step"]} | dict(times)


def open_log(stage: StageDirectory, step: int, tensorboard: Path | None) -> MetricsLog:
    """The metrics of the stage, written by rank 0; rows and examples beyond ``step`` are dropped."""
    if dist.get_rank() != 0:
        return MetricsLog(None, step)
    truncate_jsonl_after(stage.path / ROLLOUTS_NAME, last=step)
    return MetricsLog(stage, step, tensorboard=tensorboard)


def write_examples(stage: StageDirectory, examples: Sequence[str]) -> None:
    """Append ``examples`` to the stage's rollouts, on rank 0."""
    if dist.get_rank() == 0:
        for line in examples:
            append_line(stage.path / ROLLOUTS_NAME, line)
