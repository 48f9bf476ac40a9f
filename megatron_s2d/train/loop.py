"""The training loop: sample, score, pack, forward and backward, optimizer step, weight update, metrics, checkpoint.

Every stage that trains calls ``train`` with a source of samples and an objective; the loop depends on neither the
method nor the layout, and all ranks run the same code. The data of a step is a function of its number and of the
weights alone, so a killed run resumes from its last checkpoint with the same result as an uninterrupted one.

A step samples once and splits its samples into mini-batches, once for each of its passes over them; each mini-batch
gives one optimizer update, whose gradients are accumulated over micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from megatron_s2d.artifacts.files import append_line, truncate_jsonl_after
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.tracking import Tracker
from megatron_s2d.config.training import CheckpointConfig
from megatron_s2d.data.packing import MicroBatch, MiniBatch
from megatron_s2d.errors import UserError
from megatron_s2d.kl.teachers import TeacherSource
from megatron_s2d.objectives.terms import Metric, Objective
from megatron_s2d.parallel.collectives import broadcast_flag
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import own_samples, with_array, without_array
from megatron_s2d.train.checkpoints import CheckpointManager
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.train.metrics import MetricsLog, Timer
from megatron_s2d.train.shown_responses import ShownResponses, TeacherLogProbs

ROLLOUTS_NAME = "rollouts.jsonl"


class Stopped(Exception):
    """The run was asked to stop; its checkpoint is on disk, and the same command resumes from it."""


@dataclasses.dataclass(frozen=True, eq=False)
class StepData:
    """The training data of one step: the same list on every rank, which has the arrays of its own samples."""

    mini_batches: Sequence[MiniBatch]  # of all passes over the samples; equal ids are equal samples
    metrics: Mapping[str, float]  # of the samples, such as reward and response_length
    examples: Sequence[str] = ()  # JSON lines of a few responses for ``rollouts.jsonl``; each has a "step"
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON; what ``resume`` needs after this step
    shown: ShownResponses | None = None  # further examples, before the training pass, which knows more of their tokens


class SampleSource(Protocol):
    """Where samples come from: data, a cache, or the live policy with verifier and scorers."""

    def step(self, step: int) -> StepData:
        """Return the samples of ``step`` (counted from 1); a function of the step and the weights. Collective."""
        ...

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue after the step whose trainer state, ``StepData.state`` included, is ``state``."""
        ...


class Teacher(Protocol):
    """A frozen distribution over the vocabulary, evaluated per micro-batch."""

    def distributions(
        self, mini_batch: MiniBatch, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[TeacherSource | None]:
        """Return one source per micro-batch of this rank (None on ranks without an output layer). Collective."""
        ...

    def metrics(self) -> dict[str, Metric]:
        """Return metrics of the last call of ``distributions``, reduced over all ranks. Collective."""
        ...


class Rollouts(Protocol):
    """Where samples of the policy are generated, with its weights (``rollout/buffer.py``)."""

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """Generate with the current weights of ``chunks`` from now on, as ``version``. Collective."""
        ...

    def sleep(self) -> None:
        """Release memory until the next weight update, if possible."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return measurements of the last step and of its weight update, for the step's row."""
        ...


class Validation(Protocol):
    """Samples of the weights between steps, which change nothing but the end of the run (``stages/validation.py``)."""

    def is_due(self, step: int) -> bool:
        """Return whether the weights after ``step`` (0: before the first) are validated."""
        ...

    def resume(self, step: int) -> None:
        """Forget the validations after ``step``, that of the checkpoint which the run resumes from."""
        ...

    def run(self, step: int, version: int) -> bool:
        """Validate if due and not done yet; return whether the run ends here. Raises ``Stopped``. Collective."""
        ...

    def pinned(self, steps: Sequence[int]) -> Collection[int]:
        """Return the checkpoints that a run needs which resumes from one of ``steps``; on rank 0."""
        ...


class NoValidation:
    """Of a run that is not validated."""

    def is_due(self, step: int) -> bool:
        """See ``Validation``."""
        return False

    def resume(self, step: int) -> None:
        """See ``Validation``."""

    def run(self, step: int, version: int) -> bool:
        """See ``Validation``."""
        return False

    def pinned(self, steps: Sequence[int]) -> Collection[int]:
        """See ``Validation``."""
        return ()


NO_VALIDATION = NoValidation()


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Length, checkpoints and limits of a training run."""

    steps: int
    checkpoint: CheckpointConfig
    stop: Callable[[], bool] = lambda: False  # called after every step on rank 0
    trackers: Sequence[Tracker] = ()
    workflow: str = ""  # its name, for trackers
    max_kl: float | None = None  # largest mean KL to the teacher, in nats per token; beyond it the run fails
    max_mismatch_kl: float | None = None  # largest mean KL between engine and trainer, in nats per token; likewise
    min_replayed_agreement: float | None = None  # see ``check_replayed_agreement``; likewise
    before_checkpoint: Callable[[int], None] = lambda step: None  # writes what a stage keeps beside one; collective


def train(
    model: MegatronModel,
    source: SampleSource,
    objective: Objective,
    stage: StageDirectory,
    settings: LoopSettings,
    *,
    teacher: Teacher | None = None,
    rollouts: Rollouts | None = None,
    validation: Validation = NO_VALIDATION,
) -> None:
    """Run a stage from its last checkpoint (or its start) to its last step. Collective.

    ``model`` is ready to train and has the stage's initial weights. Raises ``Stopped``, and ``UserError`` for a loss or
    gradient that is not finite or a checkpoint that cannot be written; the last checkpoint stays intact.
    """
    checkpoints = CheckpointManager(model, stage, settings.checkpoint, validation.pinned, settings.before_checkpoint)
    state = checkpoints.resume()
    num_updates = state["updates"]  # optimizer updates so far, which is also the weight version
    source.resume(state)
    if rollouts is not None:
        rollouts.update_weights(model.chunks, num_updates)
    log = open_log(stage, state["step"], settings.trackers, settings.workflow)
    timer = Timer()
    validation.resume(state["step"])
    has_ended = validate(validation, checkpoints, log, state["step"], num_updates)
    for step in range(state["step"] + 1, 0 if has_ended else settings.steps + 1):
        with timer.section("rollout"):
            data = source.step(step)
            if rollouts is not None:
                rollouts.sleep()
        lag = {} if rollouts is None else policy_lag(data.mini_batches, num_updates, model.layout)
        with timer.section("score"):
            mini_batches = comparable(model, objective, data.mini_batches)
        update_metrics, of_teacher = [], TeacherLogProbs(data.shown, objective, model)
        for mini_batch in mini_batches:
            with timer.section("pack"):
                mini_batch, num_moved = model.balance(mini_batch)
                micro_batches = model.pack(mini_batch.samples, mini_batch.loss_weights)
            with timer.section("teacher"):
                distributions = None if teacher is None else teacher.distributions(mini_batch, micro_batches)
            with timer.section("train"):
                learning_rate = model.trainable.learning_rate
                options = {"num_tokens": mini_batch.num_tokens} | of_teacher.observer(mini_batch)
                metrics = model.forward_backward(micro_batches, objective, distributions, **options)
                of_teacher.collect(mini_batch)
                metrics |= {} if teacher is None else teacher.metrics()
                check_limits(metrics, settings, model, step)
                grad_norm = model.optim_step()
            metrics |= {"grad_norm": Metric.of(grad_norm), "learning_rate": Metric.of(learning_rate)}
            if model.layout.dp_size > 1:
                metrics["balance/moved_samples"] = Metric.of(num_moved)
            update_metrics.append(metrics)
            num_updates += 1
        if rollouts is not None:
            with timer.section("update_weights"):
                rollouts.update_weights(model.chunks, num_updates)
        num_tokens = sum(mini_batch.num_tokens for mini_batch in data.mini_batches)
        step_metrics = dict(data.metrics) | lag | ({} if rollouts is None else rollouts.metrics())
        times = timer.collect_and_reset()
        responses = {sample.id: sample.response_length for part in data.mini_batches for sample in part.samples}
        step_metrics["response_tokens_per_second"] = sum(responses.values()) / times["timing_s/step"]
        log.write(step, aggregate_metrics(update_metrics, step_metrics, num_tokens, times))
        write_examples(stage, [*data.examples, *of_teacher.lines()])
        stopping = broadcast_flag(settings.stop())
        checkpoints.poll()
        # After the last step the stage writes its final weights, which later stages read: no optimizer state with them.
        is_due = step % settings.checkpoint.interval_steps == 0 or validation.is_due(step)
        if step < settings.steps and (stopping or is_due):
            with timer.section("save"):  # in the row of the next step
                checkpoints.save(dict(data.state) | {"step": step, "updates": num_updates})
        if stopping and step < settings.steps:
            _finish(checkpoints, log)
            raise Stopped(f"stopped after step {step} of {settings.steps}")
        with timer.paused():
            if validate(validation, checkpoints, log, step, num_updates):
                break
    _finish(checkpoints, log)


def _finish(checkpoints: CheckpointManager, log: MetricsLog) -> None:
    """Wait for what is still written in the background."""
    checkpoints.finish()
    log.close()


def validate(
    validation: Validation, checkpoints: CheckpointManager, log: MetricsLog, step: int, num_updates: int
) -> bool:
    """Run the validation after ``step``; one that is asked to stop leaves the checkpoint of the step on disk."""
    try:
        ends = validation.run(step, num_updates)
    except Stopped:
        _finish(checkpoints, log)
        raise
    if validation.is_due(step):
        log.write_validations()
    return ends


def comparable(model: MegatronModel, objective: Objective, mini_batches: Sequence[MiniBatch]) -> list[MiniBatch]:
    """Add old log-probabilities where the objective uses them, and drop those of the engine where they do not apply."""
    compared = [drop_incomparable_rollout_log_probs(objective, part, index) for index, part in enumerate(mini_batches)]
    return with_old_log_probs(model, objective, compared)


def with_old_log_probs(
    model: MegatronModel, objective: Objective, mini_batches: Sequence[MiniBatch]
) -> list[MiniBatch]:
    """Add log-probabilities under the weights before the step's first update, if the objective uses them.

    The samples of later passes are those of the first: they get its log-probabilities, without another forward pass.
    """
    if "old_log_probs" not in objective.columns:
        return list(mini_batches)
    scores: dict[str, np.ndarray | None] = {}
    result = []
    for mini_batch in mini_batches:
        if all(sample.has("old_log_probs") for sample in mini_batch.samples):
            result.append(mini_batch)
            continue
        if any(sample.id not in scores for sample in mini_batch.samples):
            ids = [sample.id for sample in mini_batch.samples]
            scores |= dict(zip(ids, model.score(mini_batch.samples), strict=True))
        values = [scores[sample.id] for sample in mini_batch.samples]
        samples = with_array(mini_batch.samples, "old_log_probs", values)
        result.append(dataclasses.replace(mini_batch, samples=samples))
    return result


def policy_lag(mini_batches: Sequence[MiniBatch], weight_version: int, layout: Layout) -> dict[str, float]:
    """Return mean and maximum, over response tokens, of the number of updates since the weights that sampled them.

    weight_version: at the start of the step. Responses of a teacher have no ``rollout_log_probs`` and do not count;
    empty without responses of the policy. Collective over data-parallel ranks.
    """
    samples = [sample for mini_batch in mini_batches for sample in mini_batch.samples]
    if not any(sample.has("rollout_log_probs") for sample in samples):
        return {}
    own = own_samples(samples)
    spans = [span for sample in own if sample.has("rollout_log_probs") for span in sample.weight_versions]
    lags = np.array([weight_version - span.version for span in spans], dtype=np.int64)
    tokens = np.array([span.stop - span.start for span in spans], dtype=np.int64)
    total, count = layout.host_dp.sum(np.array([(lags * tokens).sum(), tokens.sum()]))
    largest = layout.host_dp.max(np.array([lags.max(initial=np.iinfo(np.int64).min)]))[0]
    return {"policy_lag": float(total / count), "policy_lag_max": float(largest)} if count else {}


def drop_incomparable_rollout_log_probs(objective: Objective, mini_batch: MiniBatch, index: int) -> MiniBatch:
    """Drop the engine's log-probabilities from mini-batches whose forward pass does not use the sampling weights.

    They are compared with the trainer's under the weights that sampled: with the old log-probabilities if the objective
    has them, otherwise with the forward pass of the step's first mini-batch (``index`` 0).
    """
    if index == 0 or "old_log_probs" in objective.columns:
        return mini_batch
    samples = [without_array(sample, "rollout_log_probs") for sample in mini_batch.samples]
    return dataclasses.replace(mini_batch, samples=samples)


def check_limits(metrics: Mapping[str, Metric], settings: LoopSettings, model: MegatronModel, step: int) -> None:
    """Raise ``UserError``, before the update, if one of the run's limits is exceeded."""
    check_kl(metrics, settings.max_kl, step)
    check_replayed_agreement(metrics, settings.min_replayed_agreement, model, step)
    check_mismatch_kl(metrics, settings.max_mismatch_kl, step)


def check_kl(metrics: Mapping[str, Metric], limit: float | None, step: int) -> None:
    """Raise ``UserError``, before the update, if the policy diverges from its teacher."""
    if limit is None:
        return
    kl = metrics["kl"].value()
    if kl > limit:
        raise UserError(
            f"step {step}: the KL to the teacher is {kl:.3g} nats a token, above max_kl {limit}: lower the learning "
            "rate, or start from a longer warm-up"
        )


def check_mismatch_kl(metrics: Mapping[str, Metric], limit: float | None, step: int) -> None:
    """Raise ``UserError``, before the update, if the engine samples from another distribution than is trained."""
    if limit is None or "mismatch/k3_kl" not in metrics:
        return
    kl = metrics["mismatch/k3_kl"].value()
    if kl > limit:
        raise UserError(
            f"step {step}: trainer and engine differ by a KL of {kl:.3g} nats a token (mismatch/k3_kl), above "
            f"rollout.max_mismatch_kl {limit}: are precision, weights and model settings of the servers those of the "
            "trainer? See weight_sync/max_log_prob_diff and policy_lag in metrics.jsonl (older weights "
            "count here, too) and the servers' logs"
        )


def check_replayed_agreement(
    metrics: Mapping[str, Metric], limit: float | None, model: MegatronModel, step: int
) -> None:
    """Raise ``UserError``, before the update, if a layer's replayed experts look like those of other tokens.

    limit: of the agreement, counted from that of chance (0) to that of equal choices (1).
    """
    if limit is None or "moe/replayed_agreement_min" not in metrics:
        return
    agreement = metrics["moe/replayed_agreement_min"].value()
    chance = model.spec.num_experts_per_tok / model.spec.num_experts
    if agreement < chance + limit * (1.0 - chance):
        raise UserError(
            f"step {step}: in one layer only {agreement:.3f} of the replayed experts are the trainer's own choice "
            f"(chance: {chance:.3f}): the routes do not fit the tokens. Does the server hold this model, with its "
            "layers in this order? rollout.routing_replay: false trains without them, and "
            "rollout.min_replayed_agreement sets the limit"
        )


_OVER_UPDATES = {"mean": np.mean, "sum": np.mean, "max": np.max, "min": np.min}


def aggregate_metrics(
    update_metrics: Sequence[Mapping[str, Metric]],
    step_metrics: Mapping[str, float],
    num_tokens: int,
    times: Mapping[str, float],
) -> dict[str, float]:
    """Return the row of a step: means over its updates (extremes of extremes), the step's own metrics, and speed."""
    row = {}
    for name in dict.fromkeys(name for metrics in update_metrics for name in metrics):
        per_update = [metrics[name] for metrics in update_metrics if name in metrics]
        value = float(_OVER_UPDATES[per_update[0].reduction]([metric.value() for metric in per_update]))
        if value or per_update[0].omit != "zero":
            row[name] = value
    return row | dict(step_metrics) | {"tokens_per_second": num_tokens / times["timing_s/step"]} | dict(times)


def open_log(stage: StageDirectory, step: int, trackers: Sequence[Tracker] = (), workflow: str = "") -> MetricsLog:
    """Open the metrics of the stage, written by rank 0; drop rows and examples beyond ``step``."""
    if dist.get_rank() != 0:
        return MetricsLog(None, step)
    truncate_jsonl_after(stage.path / ROLLOUTS_NAME, last=step)
    return MetricsLog(stage, step, trackers=trackers, workflow=workflow)


def write_examples(stage: StageDirectory, examples: Sequence[str]) -> None:
    """Append ``examples`` to the stage's ``rollouts.jsonl``, on rank 0."""
    if dist.get_rank() == 0:
        for line in examples:
            append_line(stage.path / ROLLOUTS_NAME, line)
