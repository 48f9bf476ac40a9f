"""Configuration of a workflow: models, data, stages, arms, evaluation, contrasts and their checks. No torch here."""

from __future__ import annotations

import datetime
import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PositiveInt

from megatron_s2d.config.base import Config, Name, apply_overrides, parse
from megatron_s2d.config.data import DataSource
from megatron_s2d.config.forward_kl import TeacherCacheConfig
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.inheritance import expand_stage, merge_documents
from megatron_s2d.config.migration import WORKFLOW_KEYS, WORKFLOW_VALUES, refuse_renamed
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.opd import SELF, OpdConfig
from megatron_s2d.config.parallel import DEFAULT_TIMEOUT_MINUTES, ParallelConfig
from megatron_s2d.config.precision import Fp8Config, check_overlap
from megatron_s2d.config.stage import ModelStageConfig, TrainingStageConfig
from megatron_s2d.config.stage_order import sorted_stages
from megatron_s2d.config.stages import Stage
from megatron_s2d.config.table import TableConfig
from megatron_s2d.config.tracking import Tracking
from megatron_s2d.config.training import RolloutConfig, SamplingConfig
from megatron_s2d.config.weights import ExpoConfig, LoadCheckpointConfig
from megatron_s2d.config.yaml_file import load_yaml
from megatron_s2d.errors import UserError

HALVES = ("1H", "2H")
DEFAULT_DATA_CACHE = Path("~/.cache/megatron_s2d/prompts")


class LengthConfig(Config):
    """Length limits of all stages."""

    max_prompt_length: int = Field(
        3072,
        ge=1,
        description="longer prompts are dropped and counted, before the split into halves; stages may set a lower one",
    )


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
    expect: Literal["a>b", "a<b", "a~b", "unknown"] = Field(
        "unknown", description="expected order; the report says whether it came out (see `expectations`)"
    )
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

    @pydantic.model_validator(mode="after")
    def _check_window(self) -> PassRateCheck:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}: no pass rate is between them")
        return self


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
    expectations: Literal["own", "paper"] = Field(
        "own", description="whose `expect` of the contrasts is: yours, or the findings of a paper; words in the report"
    )
    pass_rate_checks: list[PassRateCheck] = Field(default_factory=list)
    table: TableConfig | None = Field(None, description="a paper's table to print beside the arms")
    tracking: Tracking = Field([], description="trackers that get metrics.jsonl too, by name or with settings")
    max_parallel_stages: int = Field(
        1, ge=1, description="stages that may run at the same time, each in its own processes"
    )
    watchdog_timeout_seconds: float | None = Field(
        3600, gt=0, description="a rank without progress for this long prints its stacks and exits; null: never"
    )
    distributed_timeout_minutes: float = Field(
        DEFAULT_TIMEOUT_MINUTES,
        gt=0,
        le=10_000,
        description="a collective that takes longer fails (timeout of NCCL and gloo); above the watchdog's limit, so "
        "that the rank that hangs is named",
    )
    threads_per_rank: int | None = Field(
        None,
        ge=1,
        description="CPU threads of one rank; null: the machine's cores (or OMP_NUM_THREADS) divided by the ranks that "
        "run at the same time",
    )
    data_cache_dir: Path = Field(
        DEFAULT_DATA_CACHE,
        description="where the tokenized prompts of files of 8 MiB or more are kept, and used again by every run on "
        "the same content; a directory of this machine or a shared one",
    )
    _computed: dict[str, Any] = pydantic.PrivateAttr(default_factory=dict)  # see computed_once

    @pydantic.model_validator(mode="after")
    def _check_fp8(self) -> WorkflowConfig:
        if self.fp8 is not None and self.precision != "bfloat16":
            raise ValueError(f"fp8 needs precision bfloat16, not {self.precision}: remove fp8 or change precision")
        if self.parallel.tp_comm_overlap:
            training = {name: stage for name, stage in self.stages.items() if isinstance(stage, TrainingStageConfig)}
            check_overlap(self.fp8, {name: stage.micro_batch.sequence_packing for name, stage in training.items()})
        return self

    @pydantic.model_validator(mode="after")
    def _check_timeouts(self) -> WorkflowConfig:
        limit = self.watchdog_timeout_seconds
        if limit is not None and self.distributed_timeout_minutes * 60 <= limit:
            raise ValueError(
                f"distributed_timeout_minutes {self.distributed_timeout_minutes:g} must be more than "
                f"watchdog_timeout_seconds {limit:g}: ranks that wait for a slow one would fail before it is reported"
            )
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
    def _resolve_rollout_correction(self) -> WorkflowConfig:
        """Replace ``rollout_correction.mode: auto``, so that the plan, the resume key and the report name the mode."""
        in_trainer = self.rollout.engine == "megatron" and self.rollout.staleness == 0
        for name, stage in self.stages.items():
            correction = getattr(stage, "rollout_correction", None)
            if correction is None:
                continue
            # A divergence over the vocabulary has no importance weight: its loss does not ask who sampled the token.
            unused = getattr(stage, "kl_estimator", "sampled_token") != "sampled_token"
            resolved = correction.for_engine(in_trainer=unused or in_trainer)
            self.stages[name] = stage.model_copy(update={"rollout_correction": resolved})
        return self

    @pydantic.model_validator(mode="after")
    def _check_older_weights(self) -> WorkflowConfig:
        """Check the settings of stages whose responses may come from weights older than the trained ones."""
        rollout = self.rollout
        if rollout.over_sampling_ratio == 1.0 and rollout.staleness == 0:
            return self
        if rollout.engine == "megatron" and (rollout.over_sampling_ratio > 1.0 or rollout.async_mode != "sync"):
            raise ValueError(
                "rollout.async_mode and rollout.over_sampling_ratio need servers beside the trainer: set "
                "rollout.engine: sglang, or remove them"
            )
        for name, stage in self.stages.items():
            correction, where = getattr(stage, "rollout_correction", None), f"stages.{name}"
            sampled = getattr(stage, "kl_estimator", "sampled_token") == "sampled_token"
            if sampled and correction is not None and correction.mode == "off":
                raise ValueError(
                    f"{where}: with rollout.async_mode or over_sampling_ratio responses come from older weights, as "
                    "with max_staleness: set rollout_correction.mode: tis or mask, or remove it"
                )
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

    @property
    def layouts(self) -> list[ParallelConfig]:
        """Layouts of all models."""
        others = self.teacher_parallel
        return [self.parallel, *(others.values() if isinstance(others, dict) else [others] if others else [])]

    def shares_weights(self, name: str, frozen: str) -> bool:
        """Return whether stage ``frozen`` left the weights that stage ``name`` keeps beside its LoRA adapter.

        The trained model with its adapter off then is the frozen one; not if that has a layout of its own.
        """
        stage, other = self.stages[name], self.stages[frozen]
        if getattr(stage, "lora", None) is None or self.frozen_parallel(frozen) != self.parallel:
            return False
        unchanged = isinstance(other, LoadCheckpointConfig) and other.model == getattr(stage, "model", None)
        return unchanged or getattr(stage, "init", None) == frozen

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
        if name == SELF:
            raise ValueError(f"{where}: `teacher: self` is the student itself: give the stage another name")
        if isinstance(stage, TrainingStageConfig) and stage.model is not None and stage.model not in self.models:
            raise ValueError(f"{where}.model: '{stage.model}' is not among `models` ({', '.join(self.models)})")
        limit, longest = getattr(stage, "max_prompt_length", None), self.lengths.max_prompt_length
        if limit is not None and limit > longest:
            raise ValueError(
                f"{where}.max_prompt_length: {limit} is above lengths.max_prompt_length {longest}, which all stages "
                "share; raise that one"
            )
        corpora = [entry for entry in stage.entries if getattr(self.data.get(entry), "split", None) == "corpus"]
        if limit is not None and corpora:
            raise ValueError(f"{where}.max_prompt_length: '{corpora[0]}' is a generated corpus, without prompts")
        for relation, other in stage.inputs().items():
            wanted = TeacherCacheConfig if relation.partition(".")[0] == "cache" else ModelStageConfig
            self._need_stage(f"{where}.{relation}", other, wanted)
        for entry in stage.entries:
            self._need_prompts(f"{where}.{'data' if stage.type == 'sft' else 'prompts'}", entry)
            if stage.uses_labels and entry.partition("/")[0] in {e.partition("/")[0] for e in self.evaluation.entries}:
                raise ValueError(f"{where}: '{entry}' is the evaluation set: training must not use its labels")
        validation = stage.validation if isinstance(stage, TrainingStageConfig) else None
        for curve, entry in (validation.data if validation is not None else {}).items():
            self._need_prompts(f"{where}.validation.data.{curve}", entry)
            if getattr(self.data[entry.partition("/")[0]], "split", None) == "corpus":
                raise ValueError(f"{where}.validation.data.{curve}: '{entry}' is a generated corpus, without prompts")
        if isinstance(stage, GrpoConfig | OpdConfig) and stage.prompt_order == "continue":
            self._check_continues(where, stage)

    def _check_continues(self, where: str, stage: GrpoConfig | OpdConfig) -> None:
        """Check that ``init`` went through the same prompts in the same order."""
        if stage.init is None:
            raise ValueError(f"{where}.prompt_order: continue needs `init`, the stage whose prompts it continues with")
        earlier = self.stages[stage.init]
        if not isinstance(earlier, GrpoConfig | OpdConfig):
            raise ValueError(
                f"{where}.prompt_order: continue uses the next prompts of '{stage.init}', which samples none (type "
                f"{earlier.type}); remove it, or set init to a grpo or opd stage"
            )
        for key, ours, theirs in (
            ("prompts", stage.entries, earlier.entries),
            ("max_prompt_length", stage.max_prompt_length, earlier.max_prompt_length),
            ("prompt_filter", stage.prompt_filter, earlier.prompt_filter),
            ("seed", stage.seed, earlier.seed),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{where}.prompt_order: continue needs the `{key}` of '{stage.init}', {theirs}, because the order "
                    f"of the prompts depends on it; it is {ours}"
                )

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

    def stage_order(self) -> dict[str, int]:
        """Return stage -> position, each after its inputs and otherwise in the order of the file."""
        return self.computed_once("stage_order", lambda: sorted_stages(self.stages))

    def computed_once[Value](self, name: str, compute: Callable[[], Value]) -> Value:
        """Return ``compute()``, a function of the stages and of which are needed; plans and checks ask it of each."""
        of = (self.stages, self.arms, self.also_evaluate, self.pass_rate_checks)
        known = self._computed.get(name)
        if known is None or not all(map(operator.is_, known[0], of)):  # a copy may have others
            known = self._computed[name] = of, compute()
        value: Value = known[1]
        return value

    def model_of(self, stage_name: str) -> str:
        """Return the entry of ``models`` that a stage trains (or samples from, for a cache)."""
        while True:
            stage = self.stages[stage_name]
            if isinstance(stage, TeacherCacheConfig):
                stage_name = stage.teacher
            elif isinstance(stage, ExpoConfig):
                stage_name = stage.base
            elif stage.model is not None:
                return stage.model
            else:
                assert stage.init is not None
                stage_name = stage.init

    def num_prompts_before(self, stage_name: str) -> int:
        """Return how many prompts of its order a stage leaves to the stages that it continues (``prompt_order``)."""
        stage = self.stages[stage_name]
        if not isinstance(stage, GrpoConfig | OpdConfig) or stage.prompt_order == "restart" or stage.init is None:
            return 0
        earlier = self.stages[stage.init]
        assert isinstance(earlier, GrpoConfig | OpdConfig)  # see _check_continues
        return self.num_prompts_before(stage.init) + earlier.steps * earlier.train_batch_size

    def chain(self, *stage_names: str) -> list[str]:
        """Return the stages that lead to ``stage_names``, inputs first, and these themselves; in ``stage_order``."""
        wanted: set[str] = set()
        open_names = list(stage_names)
        while open_names:
            name = open_names.pop()
            if name not in wanted:
                wanted.add(name)
                open_names += self.stages[name].inputs().values()
        return sorted(wanted, key=self.stage_order().__getitem__)


def load_workflow(path: str | Path, overrides: list[str] | None = None) -> WorkflowConfig:
    """Read, override, expand ``extends`` and validate a workflow file; every problem is a one-line ``UserError``."""
    document = apply_overrides(functools.reduce(merge_documents, _documents(Path(path))), overrides or [])
    refuse_renamed(document, str(path), WORKFLOW_KEYS, WORKFLOW_VALUES)
    stages = document.get("stages")
    if isinstance(stages, dict):
        expanded = {name: expand_stage(name, stages, str(path), ()) for name in stages}
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
