"""Turns a workflow into jobs: their order, which are reused, and which run again for what reason. No torch here.

A job is a stage or an evaluation, with its own directory. Its key is a digest of the settings and data that determine
its result, and of its inputs' keys. Settings that do not change the result (layout, threads, micro-batches, checkpoint
interval) are excluded, so that a run can resume on other hardware.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_s2d.artifacts.files import file_digest, json_digest
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.base import dump
from megatron_s2d.config.data import DataSource, FileSource, HubSource, TaskSource
from megatron_s2d.config.environment import FunctionEnvironment
from megatron_s2d.config.forward_kl import TeacherCacheConfig
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.lora import WEIGHTS_NAME
from megatron_s2d.config.needed_stages import (
    TokenizerChoice,
    evaluated_stages,
    needed_stages,
    prompt_choices,
    prompt_model,
    stage_views,
    tokenizer_choice,
)
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.reward import FunctionReward, parts_of
from megatron_s2d.config.routing_replay import replays_routes
from megatron_s2d.config.stage import TrainingStageConfig, changes_weights, validated_entries
from megatron_s2d.config.stages import Stage
from megatron_s2d.config.teacher_service import services_by_domain, services_of
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.hub import as_files
from megatron_s2d.data.prompt_cache import content_digest
from megatron_s2d.errors import UserError

Action = Literal["run", "resume", "reuse", "rerun"]

# Fields of a stage that do not change its result beyond rounding, or only name it.
_EXCLUDED_FROM_KEY = ("role", "micro_batch", "checkpoint", "label_reuse", "teacher_engine", "offload_optimizer")
# Files that decide how a local tokenizer renders and splits text.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Fields that count unless they have these values: stages of runs from before the fields existed are reused.
_NEUTRAL = {
    "ppo_epochs": 1, "max_prompt_length": None, "prompt_order": "restart", "fixed_advantage": None,
    "policy_loss": "grpo", "entropy_coeff": 0.0, "teacher_advantage": None, "reward_advantage": None,
    "teacher_view": None, "reference_view": None, "domain_weights": None, "log_ratio_clip": None,
    "max_truncated_fraction": None, "lora": None, "prompt_filter": None, "teacher_service": None,
    "teacher_lag": None, "teacher_ema_decay": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One unit of work; ``id`` is its directory relative to the run directory."""

    id: str  # stages/NAME, evaluations/NAME or pass_rate_checks/NUMBER-NAME
    stage: str  # the stage that is run, or whose weights are evaluated
    pass_rate_check: int | None  # index of the check that an evaluation is for; None for stages and arms
    directory: StageDirectory
    resolved: Mapping[str, Any]  # the settings that determine the result
    inputs: Mapping[str, str]  # job id -> key
    total: int  # steps or batches, for progress; 0 if only the job knows
    action: Action
    reason: str

    @property
    def is_stage(self) -> bool:
        return self.id.startswith("stages/")

    @property
    def key(self) -> str:
        """Digest of ``resolved`` and the inputs' keys."""
        return key_of(self.resolved, self.inputs)

    @property
    def heartbeat_path(self) -> Path:
        """File in which the watchdogs of this machine's ranks record their progress."""
        return self.directory.path / f"{socket.gethostname()}-heartbeat.txt"

    @property
    def is_pending(self) -> bool:
        """Whether the job has to run."""
        return self.action != "reuse"


def key_of(resolved: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the digest of the settings and inputs that determine a job's result."""
    return json_digest({"resolved": dict(resolved), "inputs": dict(inputs)})


def make_plan(config: WorkflowConfig, run_dir: Path) -> list[Job]:
    """Return the jobs of all arms, evaluations and pass-rate checks, inputs first, without changing the disk."""
    digests = {name: data_digest(config, name) for name in used_data(config)}
    renderings = _Renderings(config)
    jobs: dict[str, Job] = {}
    for name in needed_stages(config):
        stage = config.stages[name]
        inputs = {f"stages/{other}": jobs[f"stages/{other}"].key for other in sorted(set(stage.inputs().values()))}
        resolved = _resolved_stage(config, renderings, name, digests)
        total = getattr(stage, "steps", 0)
        _add(jobs, run_dir, f"stages/{name}", name, None, resolved, inputs, total)
    for name in evaluated_stages(config):
        inputs = {f"stages/{name}": jobs[f"stages/{name}"].key}
        resolved = _resolved_evaluation(config, renderings, name, digests)
        _add(jobs, run_dir, f"evaluations/{name}", name, None, resolved, inputs, 0)
    for number, check in enumerate(config.pass_rate_checks):
        inputs = {f"stages/{check.stage}": jobs[f"stages/{check.stage}"].key}
        entry = check.prompts.partition("/")[0]
        resolved = _common(config, renderings, check.stage) | _engine(config) | {"data": {entry: digests[entry]}}
        resolved |= {
            "pass_rate_check": {
                "prompts": check.prompts,
                "k": check.samples_per_prompt,
                "num_prompts": check.num_prompts,
            }
        }
        resolved |= {"sampling": dump(config.evaluation.sampling)}
        _add(jobs, run_dir, f"pass_rate_checks/{number}-{check.stage}", check.stage, number, resolved, inputs, 0)
    return list(jobs.values())


def used_data(config: WorkflowConfig) -> list[str]:
    """Return the sorted entries of ``data`` that a job reads."""
    entries = [*config.evaluation.entries, *(check.prompts for check in config.pass_rate_checks)]
    for name in needed_stages(config):
        entries += [*config.stages[name].entries, *_deciding_entries(config.stages[name])]
    return sorted({entry.partition("/")[0] for entry in entries})


def _deciding_entries(stage: Stage) -> list[str]:
    """Return the entries of ``data`` with which a stage's validation decides about its weights."""
    return validated_entries(stage) if changes_weights(stage) else []


def data_digest(config: WorkflowConfig, entry: str) -> str:
    """Return the digest of a data source: its settings and the content of its files."""
    source = config.data[entry]
    files = {}
    if not isinstance(source, TaskSource):
        cache_dir = config.data_cache_dir.expanduser()
        for path in _files(source, entry, cache_dir).paths:
            if not Path(path).is_file():
                raise UserError(f"data.{entry}.path: {path}: no such file")
            files[Path(path).name] = content_digest(path, cache_dir)
    settings = {key: value for key, value in dump(source).items() if key != "path"}
    if not isinstance(source, TaskSource) and source.skip == 0:
        del settings["skip"]  # likewise
    if isinstance(source, TaskSource) and source.verifier == "modular_arithmetic":
        del settings["verifier"]  # sources of runs from before the field existed
    if settings.get("environment") is None:
        settings.pop("environment", None)
    if not settings.get("call_fraction"):
        settings.pop("call_fraction", None)
    code = {name: digest for name in _functions(source) if (digest := _function_digest(name)) is not None}
    return json_digest({"settings": settings, "files": files} | ({"functions": code} if code else {}))


def _files(source: FileSource | HubSource, entry: str, cache_dir: Path) -> FileSource:
    try:
        return as_files(source, cache_dir)
    except UserError as error:
        raise UserError(f"data.{entry}: {error}") from None


def _functions(source: DataSource) -> list[str]:
    """Return the functions of the user that a data source names, as ``module:function``."""
    names = [part.function for part in parts_of(source.verifier) if isinstance(part, FunctionReward)]
    if isinstance(source.environment, FunctionEnvironment):
        names.append(source.environment.function)
    return names


def _function_digest(function: str) -> str | None:
    """Return the digest of the file that defines ``module:function``, without importing it; None for none."""
    parts = function.partition(":")[0].split(".")
    for folder in (os.getcwd(), *sys.path):
        base = Path(folder, *parts)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return file_digest(path)
    return None


class _Renderings:
    """What renders the prompts of each stage: names, and the content of local files, read once."""

    def __init__(self, config: WorkflowConfig):
        self._config, choices = config, prompt_choices(config)
        self._content = {choice: _local_content(choice) for choice in choices}
        digests = [json_digest([choice.tokenizer, self._content[choice]]) for choice in choices]
        # A prompt that is too long in one rendering is left out of all, so the other ones count too.
        self._shared = {} if len(choices) == 1 else {"renderings": sorted(digests)}

    def of(self, stage_name: str) -> dict[str, Any]:
        """Return the part of the key of stage ``stage_name``."""
        choice = tokenizer_choice(self._config, prompt_model(self._config, stage_name))
        return {"tokenizer": choice.tokenizer, **self._content[choice], **self._shared}


def _local_content(choice: TokenizerChoice) -> dict[str, str]:
    content = {}
    directory = Path(choice.tokenizer)
    if directory.is_dir():
        files = [directory / name for name in _TOKENIZER_FILES if (directory / name).is_file()]
        content["tokenizer_files"] = json_digest({path.name: file_digest(path) for path in files})
    if choice.chat_template is not None:
        content["chat_template"] = file_digest(choice.chat_template)
    return content


def _common(config: WorkflowConfig, renderings: _Renderings, stage_name: str) -> dict[str, Any]:
    fp8 = {} if config.fp8 is None else {"fp8": dump(config.fp8)}
    return (
        {
            **renderings.of(stage_name),
            "template_date": config.template_date.isoformat(),
            "precision": config.precision,
            "seed": config.seed,
        }
        | fp8
        | {"lengths": dump(config.lengths)}
    )


def _engine(config: WorkflowConfig) -> dict[str, Any]:
    """Return the engine settings that change results: servers draw other random numbers than the trainer."""
    rollout = config.rollout
    if rollout.engine == "megatron":
        return {}
    return {"engine": [rollout.engine, rollout.sglang.enable_deterministic_inference]}


def _sampling(config: WorkflowConfig, name: str) -> dict[str, Any]:
    """Return ``_engine`` and, for a stage that trains on responses, asynchronous generation and routing replay."""
    rollout = config.rollout
    asynchrony = {"async_mode": rollout.async_mode, "over_sampling_ratio": rollout.over_sampling_ratio}
    is_default = asynchrony == {"async_mode": "sync", "over_sampling_ratio": 1.0} and rollout.staleness == 0
    if rollout.staleness > 0 and (rollout.staleness > 1 or rollout.async_mode == "sync"):
        asynchrony["max_staleness"] = rollout.staleness
    replay = {"routing_replay": False} if rollout.routing_replay is False else {}
    if replays_routes(config, config.stages[name], config.models[config.model_of(name)].resolve(1)):
        replay = {"routing_replay": True}
    return _engine(config) | ({} if is_default else asynchrony) | replay


def _resolved_stage(
    config: WorkflowConfig, renderings: _Renderings, name: str, digests: Mapping[str, str]
) -> dict[str, Any]:
    stage = config.stages[name]
    settings = {key: value for key, value in dump(stage).items() if key not in _EXCLUDED_FROM_KEY}
    settings = {key: value for key, value in settings.items() if key not in _NEUTRAL or value != _NEUTRAL[key]}
    if not changes_weights(stage):
        settings.pop("validation", None)
    else:
        sampling = settings["validation"]["sampling"] or dump(config.evaluation.sampling)
        validation = {key: value for key, value in settings["validation"].items() if key != "batch_size"}
        settings["validation"] = validation | {"sampling": sampling}
    owner = settings.get("teacher_advantage") or settings
    if owner.get("teacher_service"):  # a teacher may move: only its weights count
        owner["teacher_service"] = {
            domain or "all": service.weights_digest
            for domain, service in services_by_domain(services_of(stage)).items()
        }
    elif owner is not settings:  # of runs from before it had one
        owner.pop("teacher_service")
    if settings.get("filter_groups"):  # of runs from before it had a range
        pairs = (("min_pass_rate", 0.0), ("max_pass_rate", 1.0))
        neutral = {key for key, value in pairs if settings["filter_groups"][key] == value}
        settings["filter_groups"] = {k: v for k, v in settings["filter_groups"].items() if k not in neutral}
    entries = [*stage.entries, *_deciding_entries(stage)]
    used = {entry.partition("/")[0] for entry in entries}
    sampled = _sampling(config, name) if isinstance(stage, GrpoConfig | OpdConfig | TeacherCacheConfig) else {}
    resolved = (
        _common(config, renderings, name)
        | sampled
        | {"stage": settings, "data": {entry: digests[entry] for entry in sorted(used)}}
    )
    views = {
        of.key: {"tokenizer": of.renderer.tokenizer, **_local_content(of.renderer)} for of in stage_views(config, name)
    }
    if views:
        resolved["views"] = views
    if getattr(stage, "prompt_filter", None) is not None:
        evaluation = stage.prompt_filter.evaluation
        if not evaluation.is_file():
            raise UserError(f"stages.{name}.prompt_filter.evaluation: {evaluation}: no such file")
        settings["prompt_filter"] |= {"evaluation": file_digest(evaluation)}
    if any("/" in entry for entry in entries):
        resolved["split_seed"] = config.split_seed
    if isinstance(stage, TrainingStageConfig) and stage.model is not None:
        model = dump(config.models[stage.model])
        resolved["model"] = {key: value for key, value in model.items() if key not in ("tokenizer", "chat_template")}
    if isinstance(stage, TrainingStageConfig) and stage.lora is not None:
        lora = settings["lora"] = dict(settings["lora"])
        if stage.lora.adapter is not None:
            lora["adapter"] = file_digest(stage.lora.adapter / WEIGHTS_NAME)
    if isinstance(stage, TrainingStageConfig) and config.models[config.model_of(name)].moe_aux_loss_coeff > 0:
        # The load-balancing loss is one of each micro-batch, so that its gradient depends on how samples are packed.
        resolved["micro_batch"] = dump(stage.micro_batch)
    return resolved


def _resolved_evaluation(
    config: WorkflowConfig, renderings: _Renderings, stage_name: str, digests: Mapping[str, str]
) -> dict[str, Any]:
    entries = {entry.partition("/")[0] for entry in config.evaluation.entries}
    settings = dump(config.evaluation)
    del settings["eval_batch_size"]
    data = {entry: digests[entry] for entry in sorted(entries)}
    return _common(config, renderings, stage_name) | _engine(config) | {"evaluation": settings, "data": data}


def _add(
    jobs: dict[str, Job],
    run_dir: Path,
    id_: str,
    stage: str,
    pass_rate_check: int | None,
    resolved: dict[str, Any],
    inputs: dict[str, str],
    total: int,
) -> None:
    directory = StageDirectory(run_dir / id_)
    action, reason = _choose_action(directory, resolved, inputs, jobs)
    jobs[id_] = Job(id_, stage, pass_rate_check, directory, resolved, inputs, total, action, reason)


def _choose_action(
    directory: StageDirectory, resolved: dict[str, Any], inputs: dict[str, str], jobs: Mapping[str, Job]
) -> tuple[Action, str]:
    if not directory.config_path.exists() or not directory.lineage_path.exists():
        return "run", "new"
    old_inputs = directory.lineage()["inputs"]
    changes = list(changed_keys(directory.config(), resolved))
    if changes:
        return "rerun", "; ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
    for name, key in inputs.items():
        if old_inputs.get(name) != key:
            return "rerun", f"its input {name} changed"
    if set(old_inputs) != set(inputs):
        return "rerun", f"its inputs are now {', '.join(inputs) or 'none'}"
    if directory.is_finished():
        missing = [name for name in inputs if not jobs[name].directory.is_finished()]
        return "reuse", "finished" + (f" (its input {missing[0]} runs again)" if missing else "")
    return "resume", "unfinished"


def changed_keys(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """Yield ``key: old -> new`` for every leaf in which two JSON values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from changed_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif old != new:
        yield f"{prefix}: {old} -> {new}"
