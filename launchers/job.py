"""Plan of one ``s2d launch``: its tasks (scheduler jobs), and the files that describe them. No torch here.

A task is one job of a scheduler: the full workflow, or with ``per_stage`` one stage, and finally the report. A task
reads its files from a directory named by their content, ``RUN_DIR/launch/DIGEST``: a queued job starts with what was
submitted, whatever is launched or edited meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_s2d.artifacts.files import atomic_write_json, atomic_write_text, json_digest
from megatron_s2d.config.base import dump
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.launchers.config import LaunchConfig, resolve
from megatron_s2d.launchers.servers import with_servers
from megatron_s2d.workflow.plan import Job, make_plan
from megatron_s2d.workflow.preflight import check_workflow


@dataclasses.dataclass(frozen=True)
class Task:
    """One job; every rank runs ``s2d`` with ``arguments``."""

    name: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()  # tasks that must succeed first
    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 0


@dataclasses.dataclass(frozen=True)
class Launch:
    """Input of the scripts; paths are absolute."""

    workflow: WorkflowConfig
    settings: LaunchConfig  # resolved
    run_dir: Path
    working_dir: Path
    jobs: tuple[Job, ...]
    digest: str

    @property
    def directory(self) -> Path:
        """Directory of this launch's files."""
        return self.run_dir / "launch" / self.digest

    @property
    def workflow_path(self) -> Path:
        """File of the resolved workflow, which every rank reads."""
        return self.directory / "workflow.json"

    @property
    def python(self) -> str:
        """The interpreter of a rank."""
        return self.settings.python or ("python3" if self.settings.container else sys.executable)

    @property
    def mounts(self) -> list[str]:
        """Mounts of the container, the working and the run directory first."""
        required = dict.fromkeys(f"{path}:{path}" for path in (self.working_dir, self.run_dir))
        return [*required, *(self.settings.container.mounts if self.settings.container else [])]

    def tasks(self) -> list[Task]:
        """Return the jobs to submit, each after its dependencies; finished stages are left out."""
        size = {
            "nodes": self.settings.nodes,
            "processes_per_node": self.settings.processes_per_node,
            "gpus_per_node": self.settings.gpus_per_node,
        }
        run = ("run", str(self.workflow_path), "--out", str(self.run_dir))
        if self.settings.min_nodes is not None:
            run = (*run, "--elastic")
        if not self.settings.per_stage:
            return [Task("run", run, **size)]
        pending = {job.stage for job in self.jobs if job.is_pending}
        names = [job.stage for job in self.jobs if job.is_stage and job.stage in pending]
        tasks = []
        for name in names:
            inputs = dict.fromkeys(self.workflow.stages[name].inputs().values())
            after = tuple(other for other in inputs if other in pending)
            tasks.append(Task(name, (*run, "--stage", name), after, **size))
        return [*tasks, Task("report", ("report", str(self.run_dir)), tuple(names))]


def plan_launch(workflow: WorkflowConfig, settings: LaunchConfig, run_dir: Path) -> Launch:
    """Check workflow and settings against each other and return the plan; writes nothing.

    Raises ``UserError`` for every problem that can be detected before a job is queued.
    """
    settings = resolve(settings, workflow)
    workflow = with_servers(workflow, settings)
    with tempfile.TemporaryDirectory() as scratch:
        check_workflow(workflow, Path(scratch))
    run_dir, working_dir = run_dir.absolute(), Path.cwd()
    for path in (run_dir, working_dir) if settings.container else ():
        if any(character in str(path) for character in ",:"):
            raise UserError(f"{path}: a path with , or : cannot be mounted into a container; choose another path")
    jobs = tuple(make_plan(workflow, run_dir))
    pending = [job.id for job in jobs if job.is_pending]
    content = [dump(workflow), dump(settings), str(run_dir), str(working_dir), sys.executable, pending]
    return Launch(workflow, settings, run_dir, working_dir, jobs, json_digest(content)[:12])


def write_launch(launch: Launch, scripts: Mapping[str, str]) -> None:
    """Write ``scripts`` (name -> text) and the resolved configuration of workflow, launch, jobs and processes."""
    atomic_write_json(launch.workflow_path, dump(launch.workflow))
    atomic_write_json(launch.directory / "launch.json", dump(launch.settings))
    for job in launch.jobs:
        content = {"action": job.action, "reason": job.reason, "inputs": list(job.inputs), "config": job.resolved}
        atomic_write_json(launch.directory / "resolved" / f"{job.id}.json", content)
    atomic_write_text(launch.directory / "processes.json", json.dumps(processes(launch), indent=1) + "\n")
    for name, text in scripts.items():
        atomic_write_text(launch.directory / name, text)


def processes(launch: Launch) -> list[dict]:
    """Return one entry a task: the nodes of its ranks and the command that each of them runs."""
    entries = []
    for task in launch.tasks():
        ranks = range(task.nodes * task.processes_per_node)
        entries.append(
            dataclasses.asdict(task)
            | {
                "command": [launch.python, "-m", "megatron_s2d.cli", *task.arguments],
                "environment": launch.settings.environment,
                "server_nodes": launch.settings.server_nodes,
                "ranks": [
                    {
                        "rank": rank,
                        "node": rank // task.processes_per_node,
                        "local_rank": rank % task.processes_per_node,
                    }
                    for rank in ranks
                ],
            }
        )
    return entries
