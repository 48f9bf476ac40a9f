"""Validation inside a stage: graded samples of the weights in training, the best checkpoint, and the stage's end.

``validation.jsonl`` in the stage's directory has one row a validation, with the decision that was made then;
``validation/step_*/NAME.jsonl`` every response. Rank 0 decides from these files alone, so that a resumed stage and
every layout decide alike. A checkpoint is saved before each validation but the last: an interrupted one resumes with
its next batch.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_s2d.artifacts.files import append_line, atomic_write_text, read_jsonl, remove_tree, truncate_jsonl_after
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.artifacts.versions import timestamp
from megatron_s2d.config.validation import (
    METRICS,
    BestCheckpointConfig,
    KlRule,
    PassRateRule,
    PlateauRule,
    ValidationConfig,
)
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.parallel.collectives import broadcast_flag, broadcast_from_rank0
from megatron_s2d.rollout.engine import RolloutEngine
from megatron_s2d.rollout.sampler import RolloutWorker
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.evaluate import response_lines
from megatron_s2d.train.loop import NO_VALIDATION, Stopped, Validation
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.verify import RewardManager

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class StageValidation:
    """See ``train.loop.Validation``."""

    config: ValidationConfig
    steps: int  # of the stage
    directory: StageDirectory
    prompts: Mapping[str, PromptTable]  # name of a curve -> its prompts
    worker: RolloutWorker
    model: MegatronModel
    pushes_weights: bool  # the engine is not that of the training, which gets new weights at every step
    stop: Callable[[], bool]
    progress: Callable[[int, int], None]
    is_rank_zero: bool

    @classmethod
    def of(
        cls,
        context: StageContext,
        model: MegatronModel,
        reward_manager: RewardManager,
        engine: RolloutEngine | None = None,
    ) -> Validation:
        """Return the validation that the stage asks for. engine: of the training, if that samples."""
        config: ValidationConfig | None = context.stage.validation
        if config is None:
            return NO_VALIDATION
        name = context.models.name_of(context.name)
        params = context.rollouts.sampling_params(config.sampling or context.evaluation_sampling, name)
        worker = RolloutWorker(
            model.layout,
            engine or context.rollouts.in_process_engine(model, name),
            params,
            context.seed_of(config.seed),
            context.inputs.tokenizer,
            reward_manager,
            context.rollouts.environments(name, reward_manager),
        )
        prompts = {curve: context.inputs.prompts(entry)[: config.num_prompts] for curve, entry in config.data.items()}
        return cls(
            config=config,
            steps=context.stage.steps,
            directory=context.directory,
            prompts=prompts,
            worker=worker,
            model=model,
            pushes_weights=engine is None,
            stop=context.stop,
            progress=context.report_progress,
            is_rank_zero=context.is_rank_zero,
        )

    def is_due(self, step: int) -> bool:
        """Return whether the weights after ``step`` are validated."""
        if step == 0:
            return self.config.before_training
        return step % self.config.interval_steps == 0 or step == self.steps

    def resume(self, step: int) -> None:
        """Drop what later steps than that of the checkpoint have left: they are done again."""
        if self.is_rank_zero:
            truncate_jsonl_after(self.directory.validation_path, last=step)
            for done_at, folder in self.directory.validation_folders().items():
                if done_at > step:
                    remove_tree(folder)

    def run(self, step: int, version: int) -> bool:
        """Validate the weights after ``step``, if that is due and not done yet; return whether the stage ends.

        Collective. version: of the weights. Raises ``Stopped`` between two batches.
        """
        if not self.is_due(step):
            return False
        row = broadcast_from_rank0(lambda: next((row for row in self._rows() if row["step"] == step), None))
        if row is None:
            if self.pushes_weights:
                self.worker.engine.update_weights(self.model.chunks, version)
            started = time.perf_counter()
            for name, prompts in self.prompts.items():
                self._sample(step, name, prompts)
            row = broadcast_from_rank0(lambda: self._decide(step, time.perf_counter() - started))
        return row["ended"] is not None

    def pinned(self, steps: Sequence[int]) -> set[int]:
        """Return the checkpoints to keep beside those of ``steps``: the best one as of each of these. On rank 0."""
        best = [best_row(self.config.best, [row for row in self._rows() if row["step"] <= step]) for step in steps]
        return {row["step"] for row in best if row is not None}

    def _rows(self) -> list[Row]:
        return self.directory.validations()

    def _responses_path(self, step: int, name: str) -> Path:
        return self.directory.validation_folder(step) / f"{name}.jsonl"

    def _sample(self, step: int, name: str, prompts: PromptTable) -> None:
        """Write the responses to ``prompts`` that an interrupted validation of the same weights has not written."""
        path, k, size = self._responses_path(step, name), self.config.samples_per_prompt, self.config.batch_size
        first = broadcast_from_rank0(lambda: _keep_whole_batches(path, prompts, k, size))
        for start in range(first, len(prompts), size):
            batch = prompts[start : start + size]
            samples = self.worker.sample(batch, k, 0, self.progress)
            lines = response_lines(step, batch, samples, self.worker.tokenizer, self.worker.layout)
            if self.is_rank_zero:
                for line in lines:
                    append_line(path, line)
            if broadcast_flag(self.stop()) and step < self.steps:
                raise Stopped(f"stopped in the validation after step {step} of {self.steps}")

    def _decide(self, step: int, seconds: float) -> Row:
        """Return, and record, the row of a validation whose responses are on disk; on rank 0."""
        earlier = self._rows()
        row = {
            "step": step,
            "data": {
                name: set_metrics(read_jsonl(self._responses_path(step, name)), self.config.samples_per_prompt)
                for name in self.prompts
            },
            "kl": self._kl_since(earlier[-1]["step"] if earlier else 0, step),
            "seconds": round(seconds, 3),
            "at": timestamp(),
        }
        rows = [*earlier, row]
        best = best_row(self.config.best, rows)
        row |= {"best": best is row, "ended": None if step in (0, self.steps) else end_reason(self.config, rows)}
        decision: dict[str, Any] = {"ended": None if row["ended"] is None else {"step": step, "rule": row["ended"]}}
        if self.config.best is not None and best is not None:
            metric = self.config.best.metric
            decision["best"] = {"step": best["step"], "metric": metric, "value": _value(best, metric)}
        self.directory.annotate_lineage("validation", decision)
        append_line(self.directory.validation_path, json.dumps(row, ensure_ascii=False))
        return row

    def _kl_since(self, previous: int, step: int) -> float | None:
        rows = [row for row in self.directory.metrics() if previous < row["step"] <= step]
        values = [row["kl"] for row in rows if row.get("kl") is not None]
        return float(np.mean(values)) if values else None


def set_metrics(responses: Sequence[Row], k: int) -> dict[str, Any]:
    """Return means over the problems of one data set, with standard errors over problems. responses: k of each."""
    columns = {
        "pass_rate": [row["verifier_label"] == "correct" for row in responses],
        "reward": [row["reward"] for row in responses],
        "response_length": [row["response_length"] for row in responses],
        "truncated_fraction": [row["finish_reason"] == "length" for row in responses],
    }
    metrics: dict[str, Any] = {}
    for name in METRICS:
        means = np.array(columns[name], dtype=np.float64).reshape(-1, k).mean(axis=1)
        metrics[name] = float(means.mean())
        metrics[f"{name}_std_err"] = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
    return metrics | {"num_prompts": len(responses) // k, "samples_per_prompt": k}


def best_row(config: BestCheckpointConfig | None, rows: Sequence[Row]) -> Row | None:
    """Return the best of ``rows``, the first of equal ones; the start of the stage (step 0) has no checkpoint."""
    if config is None:
        return None
    sign = 1.0 if config.mode == "max" else -1.0
    trained = [row for row in rows if row["step"] > 0]
    return max(trained, key=lambda row: sign * _value(row, config.metric), default=None)


def end_reason(config: ValidationConfig, rows: Sequence[Row]) -> str | None:
    """Return why the first rule that holds after the last of ``rows`` ends the stage; None if none holds."""
    last = rows[-1]
    for rule in config.until:
        if last["step"] < rule.after_step:
            continue
        if isinstance(rule, PassRateRule) and (rate := _value(last, f"{rule.data}/pass_rate")) >= rule.threshold:
            return f"pass_rate: {rule.data} has {rate:.4g}, at least {rule.threshold:g}"
        if isinstance(rule, KlRule) and last["kl"] is not None and last["kl"] <= rule.threshold:
            return f"kl: {last['kl']:.4g} nats a token, at most {rule.threshold:g}"
        if isinstance(rule, PlateauRule) and (count := _without_improvement(rule, rows)) >= rule.patience:
            return f"plateau: {rule.metric} has not improved for {count} validations (patience {rule.patience})"
    return None


def _without_improvement(rule: PlateauRule, rows: Sequence[Row]) -> int:
    """Return how many of the last validations were not better than the best before them by more than ``min_delta``."""
    sign = 1.0 if rule.mode == "max" else -1.0
    best, count = -np.inf, 0
    for row in rows:
        value = sign * _value(row, rule.metric)
        best, count = (value, 0) if value > best + rule.min_delta else (best, count + 1)
    return count


def _value(row: Row, metric: str) -> float:
    name, _, kind = metric.rpartition("/")
    return row["data"][name][kind]


def _keep_whole_batches(path: Path, prompts: PromptTable, k: int, batch_size: int) -> int:
    """Cut the responses on disk to whole batches of these ``prompts``; return how many prompts are done."""
    rows = read_jsonl(path) if path.exists() else []
    found = [(row["problem_id"], row["sample"]) for row in rows]
    wanted = [(name, index) for name in prompts[: len(rows) // k].values("id") for index in range(k)]
    done = len(wanted) // k if found[: len(wanted)] == wanted else 0
    if done < len(prompts):
        done -= done % batch_size
    if done * k < len(rows):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[: done * k])
        atomic_write_text(path, text)
    return done


def restore_best(context: StageContext, model: MegatronModel) -> None:
    """Load the weights of the best validation into ``model``, if they are not those of the last step. Collective."""
    config: ValidationConfig | None = context.stage.validation
    if config is None or config.best is None:
        return

    def find() -> int | None:
        rows = context.directory.validations()
        best = best_row(config.best, rows)
        return None if best is None or best is rows[-1] else best["step"]

    step = broadcast_from_rank0(find)
    if step is not None:
        # As a resumed stage loads it: of a model with a LoRA adapter only that has the adapter.
        model.load(context.directory.checkpoint_path(step), with_optimizer=True)
