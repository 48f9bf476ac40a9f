"""Configuration of a workflow: models, data, stages, arms, evaluation, contrasts and their checks. No torch here."""

from __future__ import annotations

import datetime
import functools
import graphlib
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PositiveInt

from megatron_s2d.config.base import Config, Name, apply_overrides, parse
from megatron_s2d.config.data import DataSource
from megatron_s2d.config.forward_kl import TeacherCacheConfig
from megatron_s2d.config.migration import WORKFLOW_KEYS, WORKFLOW_VALUES, refuse_renamed
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import Fp8Config
from megatron_s2d.config.stage import ModelStageConfig, TrainingStageConfig
from megatron_s2d.config.stages import Stage
from megatron_s2d.config.table import TableConfig
from megatron_s2d.config.training import RolloutConfig, SamplingConfig
from megatron_s2d.config.weights import ExpoConfig
from megatron_s2d.config.yaml_file import load_yaml
from megatron_s2d.errors import UserError

HALVES = ("1H", "2H")


class LengthConfig(Config):
    """Length limits of all stages."""

    max_prompt_length: int = Field(3072, ge=1, description="longer prompts are dropped and counted")


class EvaluationConfig(Config):
    """Evaluation of every arm's final model (methods M6)."""

    prompts: str | Annotated[list[str], Field(min_length=1)] = Field(description="entry of `data`, or a list of them")
    samples_per_prompt: PositiveInt | dict[str, PositiveInt] = Field(
        16, description="k of avg@k: a number, or domain -> number"
    )
    sampling: SamplingConfig = SamplingConfig()
    seed: int = Field(0, ge=0, description="added to the run's seed")
    eval_batch_size: int = Field(256, ge=1, description="problems sampled together, between two progress reports")

    @property
    def entries(self) -> list[str]:
        """All entries, in order."""
        return [self.prompts] if isinstance(self.prompts, str) else list(self.prompts)

    def samples_of(self, domain: str) -> int:
        """Return the samples per problem of ``domain``."""
        return self.samples_per_prompt[domain] if isinstance(self.samples_per_prompt, dict) else self.samples_per_prompt


class ContrastConfig(Config):
    """A comparison of two arms that differ in one factor."""

    a: str
    b: str
    factor: str = Field(description="name of the factor in words, printed beside the difference")
    expect: Literal["a>b", "a<b", "a~b", "unknown"] = Field("a>b", description="what the paper found")
    differs: list[str] = Field(
        default_factory=list,
        description="patterns of dotted keys that may differ; any other difference is an error",
    )


class PassRateCheck(Config):
    """Limits of a stage's pass rate on training prompts, checked before the stages after it run."""

    stage: str
    prompts: str = Field(description="labelled prompts of the training distribution, never the evaluation's")
    low: float = Field(0.0, ge=0, le=1, description="smallest pass rate")
    high: float = Field(1.0, ge=0, le=1, description="largest pass rate")
    samples_per_prompt: int = Field(4, ge=1)
    num_prompts: int = Field(256, ge=1)


class WorkflowConfig(Config):
    """The configuration of ``s2d run``."""

    name: Name
    description: str = ""
    seed: int = Field(1, ge=0, description="seed of weights, orders and samples; every stage adds its `seed`")
    split_seed: int = Field(0, ge=0, description="seed of the halves 1H and 2H of an entry of `data`")
    tokenizer: str = Field(
        description="`task:modular_arithmetic`, a local directory, or a name on the Hugging Face hub"
    )
    template_date: datetime.date = Field(
        datetime.date(2026, 1, 1),
        description="date for chat templates that write today's date, so that prompts do not depend on the day",
    )
    models: dict[Name, ModelConfig]
    data: dict[Name, DataSource]
    parallel: ParallelConfig = ParallelConfig()
    teacher_parallel: ParallelConfig | dict[str, ParallelConfig] | None = Field(
        None,
        description="layout of frozen teachers and references on the same ranks, or stage -> layout; by default that "
        "of the student",
    )
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    fp8: Fp8Config | None = Field(None, description="run layers in FP8 (docs/gpu.md); null: in `precision`")
    lengths: LengthConfig = LengthConfig()
    rollout: RolloutConfig = RolloutConfig()
    stages: dict[Name, Stage]
    arms: dict[Name, str] = Field(description="arm -> its last stage")
    evaluation: EvaluationConfig
    also_evaluate: list[str] = Field(default_factory=list, description="further stages to evaluate, such as teachers")
    contrasts: list[ContrastConfig] = Field(default_factory=list)
    pass_rate_checks: list[PassRateCheck] = Field(default_factory=list)
    table: TableConfig | None = Field(None, description="a paper's table to print beside the arms")
    tensorboard: bool = Field(False, description="write TensorBoard events beside metrics.jsonl")
    max_parallel_stages: int = Field(
        1, ge=1, description="stages that may run at the same time, each in its own processes"
    )
    watchdog_timeout_seconds: float | None = Field(
        3600, gt=0, description="a rank without progress for this long prints its stacks and exits; null: never"
    )
    threads_per_rank: int = Field(1, ge=1, description="CPU threads of one rank")

    @pydantic.model_validator(mode="after")
    def _check_fp8(self) -> WorkflowConfig:
        if self.fp8 is not None and self.precision != "bfloat16":
            raise ValueError(f"fp8 needs precision bfloat16, not {self.precision}: remove fp8 or change precision")
        return self

    @pydantic.model_validator(mode="after")
    def _check_layouts(self) -> WorkflowConfig:
        others = self.teacher_parallel if isinstance(self.teacher_parallel, dict) else {"": self.teacher_parallel}
        for stage, other in others.items():
            if stage and stage not in self.stages:
                raise ValueError(f"teacher_parallel: there is no stage '{stage}' (stages: {', '.join(self.stages)})")
            if other is not None and other.world_size != self.parallel.world_size:
                raise ValueError(
                    f"teacher_parallel uses {other.world_size} ranks and parallel {self.parallel.world_size}: teacher "
                    "and student share the ranks, so the numbers must be equal"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_older_weights(self) -> WorkflowConfig:
        """Check the settings of stages whose responses may come from weights older than the trained ones."""
        rollout = self.rollout
        if rollout.over_sampling_ratio == 1.0 and rollout.async_mode == "sync":
            return self
        if rollout.engine == "megatron":
            raise ValueError(
                "rollout.async_mode and rollout.over_sampling_ratio need servers beside the trainer: set "
                "rollout.engine: sglang, or remove them"
            )
        for name, stage in self.stages.items():
            correction, where = getattr(stage, "rollout_correction", None), f"stages.{name}"
            sampled = getattr(stage, "kl_estimator", "sampled_token") == "sampled_token"
            if sampled and correction is not None and correction.mode == "off":
                raise ValueError(
                    f"{where}: with rollout.async_mode or over_sampling_ratio responses come from older weights: set "
                    "rollout_correction.mode: tis or mask"
                )
            if rollout.over_sampling_ratio > 1.0 and getattr(stage, "filter_groups", None):
                raise ValueError(f"{where}: filter_groups needs rollout.over_sampling_ratio: 1")
            if rollout.over_sampling_ratio > 1.0 and getattr(stage, "on_policy_fraction", 1.0) < 1.0:
                raise ValueError(f"{where}: on_policy_fraction below 1 needs rollout.over_sampling_ratio: 1")
        return self

    def with_world_size(self, world_size: int) -> WorkflowConfig:
        """Return the workflow with data-parallel replicas of student and teachers on ``world_size`` ranks.

        Raises ``UserError`` if ``world_size`` is not a multiple of a replica's ranks.
        """
        others = self.teacher_parallel
        try:
            if isinstance(others, dict):
                others = {stage: layout.with_world_size(world_size) for stage, layout in others.items()}
            elif others is not None:
                others = others.with_world_size(world_size)
            changed = {"parallel": self.parallel.with_world_size(world_size), "teacher_parallel": others}
        except ValueError as error:  # pydantic's are
            raise UserError(f"--elastic: {error}; start a different number of ranks") from None
        return self.model_copy(update=changed)

    def frozen_parallel(self, stage_name: str) -> ParallelConfig:
        """Return the layout of a stage's model when used as a frozen teacher or reference."""
        if isinstance(self.teacher_parallel, dict):
            return self.teacher_parallel.get(stage_name, self.parallel)
        return self.teacher_parallel or self.parallel

    @pydantic.model_validator(mode="after")
    def _check_references(self) -> WorkflowConfig:
        for name, stage in self.stages.items():
            self._check_stage(name, stage)
        self.stage_order()
        for arm, stage_name in self.arms.items():
            self._need_stage(f"arms.{arm}", stage_name, ModelStageConfig)
        for stage_name in self.also_evaluate:
            self._need_stage("also_evaluate", stage_name, ModelStageConfig)
        for entry in self.evaluation.entries:
            self._need_prompts("evaluation.prompts", entry)
            domain, k = self.data[entry.partition("/")[0]].domain, self.evaluation.samples_per_prompt
            if isinstance(k, dict) and domain not in k:
                raise ValueError(f"evaluation.samples_per_prompt: no number for the domain '{domain}' of '{entry}'")
        self._check_table()
        for index, contrast in enumerate(self.contrasts):
            if contrast.a == contrast.b:
                raise ValueError(f"contrasts.{index} compares the arm '{contrast.a}' with itself")
            for side in (contrast.a, contrast.b):
                if side not in self.arms:
                    raise ValueError(f"contrasts.{index} names the arm '{side}', which is not among `arms`")
        for index, check in enumerate(self.pass_rate_checks):
            self._need_stage(f"pass_rate_checks.{index}.stage", check.stage, ModelStageConfig)
            self._need_prompts(f"pass_rate_checks.{index}.prompts", check.prompts)
        return self

    def _check_stage(self, name: str, stage: Stage) -> None:
        where = f"stages.{name}"
        if isinstance(stage, TrainingStageConfig) and stage.model is not None and stage.model not in self.models:
            raise ValueError(f"{where}.model: '{stage.model}' is not among `models` ({', '.join(self.models)})")
        for relation, other in stage.inputs().items():
            wanted = TeacherCacheConfig if relation.partition(".")[0] == "cache" else ModelStageConfig
            self._need_stage(f"{where}.{relation}", other, wanted)
        for entry in stage.entries:
            self._need_prompts(f"{where}.{'data' if stage.type == 'sft' else 'prompts'}", entry)
            if stage.uses_labels and entry.partition("/")[0] in {e.partition("/")[0] for e in self.evaluation.entries}:
                raise ValueError(f"{where}: '{entry}' is the evaluation set: training must not use its labels")

    def _check_table(self) -> None:
        if self.table is None:
            return
        for column in self.table.columns:
            if column.prompts is not None and column.prompts not in self.evaluation.entries:
                raise ValueError(f"table: column '{column.label}': '{column.prompts}' is not among evaluation.prompts")
        for row in self.table.rows:
            for arm in [row.arm] if isinstance(row.arm, str) else (row.arm or {}).values():
                if arm not in self.arms:
                    raise ValueError(f"table: row '{row.label}' names the arm '{arm}', which is not among `arms`")

    def _need_stage(self, where: str, name: str, wanted: type) -> None:
        if name not in self.stages:
            raise ValueError(f"{where}: there is no stage '{name}' (stages: {', '.join(self.stages)})")
        if not isinstance(self.stages[name], wanted):
            kind = "a teacher_cache stage" if wanted is TeacherCacheConfig else "a stage with a model as its result"
            raise ValueError(f"{where}: stage '{name}' has type {self.stages[name].type}, but {kind} is needed")

    def _need_prompts(self, where: str, name: str) -> None:
        entry, _, half = name.partition("/")
        if entry not in self.data:
            raise ValueError(f"{where}: '{entry}' is not among `data` ({', '.join(self.data)})")
        if half and half not in HALVES:
            raise ValueError(f"{where}: '{half}' is not a half; write {entry}/1H or {entry}/2H")

    def stage_order(self) -> list[str]:
        """Return the stage names, each after its inputs and otherwise in the order of the file."""
        positions = {name: position for position, name in enumerate(self.stages)}
        sorter = graphlib.TopologicalSorter({name: stage.inputs().values() for name, stage in self.stages.items()})
        try:
            sorter.prepare()
        except graphlib.CycleError as error:
            cycle = " -> ".join(error.args[1])
            raise ValueError(f"stages form a cycle (each is an input of the next): {cycle}") from None
        order: list[str] = []
        ready: list[str] = []
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=positions.__getitem__)
            order.append(ready.pop(0))
            sorter.done(order[-1])
        return order

    def model_of(self, stage_name: str) -> str:
        """Return the entry of ``models`` that a stage trains (or samples from, for a cache)."""
        stage = self.stages[stage_name]
        if isinstance(stage, TeacherCacheConfig):
            return self.model_of(stage.teacher)
        if isinstance(stage, ExpoConfig):
            return self.model_of(stage.base)
        if stage.model is not None:
            return stage.model
        assert stage.init is not None
        return self.model_of(stage.init)

    def chain(self, stage_name: str) -> list[str]:
        """Return the stages that lead to ``stage_name``, inputs first and itself last."""
        wanted = {stage_name}
        for name in reversed(self.stage_order()):
            if name in wanted:
                wanted.update(self.stages[name].inputs().values())
        return [name for name in self.stage_order() if name in wanted]


def load_workflow(path: str | Path, overrides: list[str] | None = None) -> WorkflowConfig:
    """Read, override, expand ``extends`` and validate a workflow file; every problem is a one-line ``UserError``."""
    document = apply_overrides(functools.reduce(_over, _documents(Path(path))), overrides or [])
    refuse_renamed(document, str(path), WORKFLOW_KEYS, WORKFLOW_VALUES)
    stages = document.get("stages")
    if isinstance(stages, dict):
        expanded = {name: _expand(name, stages, str(path), ()) for name in stages}
        document["stages"] = {
            name: {"role": name, **stage} if isinstance(stage, dict) else stage for name, stage in expanded.items()
        }
    return parse(WorkflowConfig, document, str(path))


def _documents(path: Path, users: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """Return the documents of the file's ``defaults`` (relative to its folder), in order, and its own."""
    document = load_yaml(path)
    refuse_renamed(document, str(path), WORKFLOW_KEYS, WORKFLOW_VALUES)
    names = document.pop("defaults", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: defaults: expected the name of another workflow file, or a list of names")
    if path.resolve() in users:
        raise UserError(f"{path}: defaults: the file includes itself")
    users = (*users, path.resolve())
    return [part for name in names for part in _documents(path.parent / name, users)] + [document]


def _over(base: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; null removes a key. ``arms``, and entries of ``models`` or ``data``, are replaced."""
    replaced = {
        key: document[key] if key == "arms" else base.get(key, {}) | document[key]
        for key in ("arms", "models", "data")
        if isinstance(document.get(key), dict)
    }
    return _merge(base, {key: value for key, value in document.items() if key not in replaced}) | replaced


def _expand(name: str, stages: dict[str, Any], source: str, seen: tuple[str, ...]) -> Any:
    """Return the stage merged into what it inherits through ``extends: other``; null removes a key."""
    stage = stages[name]
    if not isinstance(stage, dict) or "extends" not in stage:
        return stage
    other = stage["extends"]
    if other not in stages:
        raise UserError(f"{source}: stages.{name}.extends: there is no stage '{other}' (stages: {', '.join(stages)})")
    if other in seen or other == name:
        raise UserError(f"{source}: stages.{name}.extends: '{other}' inherits from '{name}'")
    inherited = _expand(other, stages, source, (*seen, name))
    return _merge(inherited, {key: value for key, value in stage.items() if key != "extends"})


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
