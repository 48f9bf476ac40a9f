"""From a workflow to jobs: what runs in which order, what is reused, what runs again and why. No torch here.

A job is a stage or an evaluation, with a directory of its own. Its key is the digest of everything that decides its
result and of its inputs' keys; what does not (layout, threads, micro-batches, checkpoint interval) is left out, so a
run may go on elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_s2d.artifacts.files import file_digest, json_digest
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.base import dump
from megatron_s2d.config.data import FileSource
from megatron_s2d.config.forward_kl import TeacherCacheConfig
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.stage import TrainingStageConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError

Action = Literal["run", "resume", "reuse", "rerun"]

# Fields of a stage that do not change its result beyond rounding, or only name it.
_UNESSENTIAL = ("role", "micro_batch", "checkpoint", "label_reuse", "teacher_engine", "offload_optimizer")


@dataclasses.dataclass(frozen=True)
class Job:
    """One unit of work; ``id`` is its directory below the run's."""

    id: str  # stages/NAME, evaluations/NAME or pass_rate_checks/NUMBER-NAME
    stage: str  # the stage that is run, or whose weights are evaluated
    pass_rate_check: int | None  # index of the gate, of a gate's evaluation
    directory: StageDirectory
    resolved: Mapping[str, Any]  # what decides the result
    inputs: Mapping[str, str]  # job id -> key
    total: int  # steps or rounds, for progress; 0 where only the job finds out
    action: Action
    reason: str

    @property
    def is_stage(self) -> bool:
        return self.id.startswith("stages/")

    @property
    def key(self) -> str:
        """Digest of ``resolved`` and the inputs' keys."""
        return key_of(self.resolved, self.inputs)

    def heartbeat_path(self, rank: int) -> Path:
        """File in which the watchdog of ``rank`` records its progress."""
        return self.directory.path / f"rank{rank}-heartbeat.txt"

    @property
    def is_pending(self) -> bool:
        """Whether there is something to do."""
        return self.action != "reuse"


def key_of(resolved: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Digest of what decides a job's result."""
    return json_digest({"resolved": dict(resolved), "inputs": dict(inputs)})


def make_plan(config: WorkflowConfig, run_dir: Path) -> list[Job]:
    """All jobs that the arms, evaluations and pass-rate checks need, inputs first. Nothing is changed on disk."""
    digests = {name: data_digest(config, name) for name in used_data(config)}
    jobs: dict[str, Job] = {}
    for name in needed_stages(config):
        stage = config.stages[name]
        inputs = {f"stages/{other}": jobs[f"stages/{other}"].key for other in sorted(set(stage.inputs().values()))}
        resolved = _resolved_stage(config, name, digests)
        total = getattr(stage, "steps", 0)
        _add(jobs, run_dir, f"stages/{name}", name, None, resolved, inputs, total)
    for name in evaluated_stages(config):
        inputs = {f"stages/{name}": jobs[f"stages/{name}"].key}
        resolved = _resolved_evaluation(config, digests)
        _add(jobs, run_dir, f"evaluations/{name}", name, None, resolved, inputs, 0)
    for number, gate in enumerate(config.pass_rate_checks):
        inputs = {f"stages/{gate.stage}": jobs[f"stages/{gate.stage}"].key}
        entry = gate.prompts.partition("/")[0]
        resolved = _common(config) | _engine(config) | {"data": {entry: digests[entry]}}
        resolved |= {"gate": {"prompts": gate.prompts, "k": gate.samples_per_prompt, "num_prompts": gate.num_prompts}}
        resolved |= {"sampling": dump(config.evaluation.sampling)}
        _add(jobs, run_dir, f"pass_rate_checks/{number}-{gate.stage}", gate.stage, number, resolved, inputs, 0)
    return list(jobs.values())


def needed_stages(config: WorkflowConfig) -> list[str]:
    """Stages that lead to something that is measured, inputs first."""
    wanted = {name for end in evaluated_stages(config) for name in config.chain(end)}
    wanted |= {name for gate in config.pass_rate_checks for name in config.chain(gate.stage)}
    return [name for name in config.stage_order() if name in wanted]


def evaluated_stages(config: WorkflowConfig) -> list[str]:
    """Endpoints of arms and further stages to evaluate, each once, in stage order."""
    wanted = {*config.arms.values(), *config.also_evaluate}
    return [name for name in config.stage_order() if name in wanted]


def used_data(config: WorkflowConfig) -> list[str]:
    """Entries of ``data`` that a job reads, sorted."""
    entries = [*config.evaluation.entries, *(gate.prompts for gate in config.pass_rate_checks)]
    entries += [entry for name in needed_stages(config) for entry in config.stages[name].entries]
    return sorted({entry.partition("/")[0] for entry in entries})


def data_digest(config: WorkflowConfig, entry: str) -> str:
    """Digest of a data source: its settings, and the content of its files."""
    source = config.data[entry]
    files = {}
    if isinstance(source, FileSource):
        for path in source.paths:
            if not Path(path).is_file():
                raise UserError(f"data.{entry}.path: {path}: no such file")
            files[Path(path).name] = file_digest(path)
    settings = {key: value for key, value in dump(source).items() if key != "path"}
    return json_digest({"settings": settings, "files": files})


def _common(config: WorkflowConfig) -> dict[str, Any]:
    fp8 = {} if config.fp8 is None else {"fp8": dump(config.fp8)}
    return (
        {"tokenizer": config.tokenizer, "precision": config.precision, "seed": config.seed}
        | fp8
        | {"lengths": dump(config.lengths)}
    )


def _engine(config: WorkflowConfig) -> dict[str, Any]:
    """What of the engine decides a result: servers draw other random numbers than the trainer."""
    rollout = config.rollout
    return (
        {}
        if rollout.engine == "megatron"
        else {"engine": [rollout.engine, rollout.sglang.enable_deterministic_inference]}
    )


def _sampling(config: WorkflowConfig) -> dict[str, Any]:
    """``_engine`` for a stage that trains on responses: also how old the weights are that they may come from."""
    rollout = config.rollout
    older = {"async_mode": rollout.async_mode, "over_sampling_ratio": rollout.over_sampling_ratio}
    is_default = older == {"async_mode": "sync", "over_sampling_ratio": 1.0}
    return _engine(config) | ({} if is_default else older)


def _resolved_stage(config: WorkflowConfig, name: str, digests: Mapping[str, str]) -> dict[str, Any]:
    stage = config.stages[name]
    settings = {key: value for key, value in dump(stage).items() if key not in _UNESSENTIAL}
    used = {entry.partition("/")[0] for entry in stage.entries}
    sampled = _sampling(config) if isinstance(stage, GrpoConfig | OpdConfig | TeacherCacheConfig) else {}
    resolved = (
        _common(config) | sampled | {"stage": settings, "data": {entry: digests[entry] for entry in sorted(used)}}
    )
    if any("/" in entry for entry in stage.entries):
        resolved["split_seed"] = config.split_seed
    if isinstance(stage, TrainingStageConfig) and stage.model is not None:
        resolved["model"] = dump(config.models[stage.model])
    return resolved


def _resolved_evaluation(config: WorkflowConfig, digests: Mapping[str, str]) -> dict[str, Any]:
    entries = {entry.partition("/")[0] for entry in config.evaluation.entries}
    settings = dump(config.evaluation)
    del settings["eval_batch_size"]
    data = {entry: digests[entry] for entry in sorted(entries)}
    return _common(config) | _engine(config) | {"evaluation": settings, "data": data}


def _add(
    jobs: dict[str, Job],
    run_dir: Path,
    id_: str,
    stage: str,
    gate: int | None,
    resolved: dict[str, Any],
    inputs: dict[str, str],
    total: int,
) -> None:
    directory = StageDirectory(run_dir / id_)
    action, reason = _decide(directory, resolved, inputs, jobs)
    jobs[id_] = Job(id_, stage, gate, directory, resolved, inputs, total, action, reason)


def _decide(
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
        return "rerun", f"its inputs are {', '.join(inputs) or 'none'} now"
    if directory.is_finished():
        gone = [name for name in inputs if not jobs[name].directory.is_finished()]
        return "reuse", "finished" + (f" (its input {gone[0]} is made again)" if gone else "")
    return "resume", "unfinished"


def changed_keys(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """``key: old -> new`` for every leaf in which two JSON values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from changed_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif old != new:
        yield f"{prefix}: {old} -> {new}"
