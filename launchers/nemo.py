"""Launcher through NeMo-Run: each stage is a task of an experiment, on this machine or on SLURM.

The only module that imports nemo_run. Ranks run the same scripts as without NeMo-Run. Its sbatch template requeues a
job after every failure, up to ``max_requeues`` times: unlike ``slurm`` it ignores exit codes and does not restart ranks
within a job.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from megatron_s2d.errors import UserError
from megatron_s2d.launchers import scripts
from megatron_s2d.launchers.job import Launch, Task, write_launch
from megatron_s2d.workflow.plan import make_plan

Executor = Literal["local", "slurm"]


def write(launch: Launch, executor: Executor) -> None:
    """Write the scripts of a rank, and the files that NeMo-Run generates for the tasks."""
    with _experiment(launch, executor) as experiment:
        experiment.dryrun(log=False, exist_ok=True, delete_exp_dir=False)


def run(launch: Launch, executor: Executor) -> Path:
    """Start the experiment (submit SLURM jobs, or run local tasks to their end) and return NeMo-Run's directory.

    Raises ``UserError`` if a local task does not finish its stage.
    """
    with _experiment(launch, executor) as experiment:
        experiment.run(detach=executor == "slurm")
    if executor == "local":
        missing = [job.id for job in make_plan(launch.workflow, launch.run_dir) if job.is_pending]
        if missing:
            raise UserError(f"{missing[0]} did not finish; see its log below {_base(launch)}")
    return _base(launch)


def _base(launch: Launch) -> Path:
    return launch.directory / "nemo"


@contextlib.contextmanager
def _experiment(launch: Launch, executor: Executor) -> Iterator[Any]:
    """Enter an experiment with one task for every task of the launch."""
    try:
        import nemo_run
    except ImportError as error:
        raise UserError(
            f"NeMo-Run cannot be imported ({error}): pip install 'megatron-s2d[launch]', or use `s2d launch slurm`"
        ) from error
    write_launch(launch, {"rank.sh": scripts.rank_script(launch), "local.sh": scripts.local_script(launch)})
    title, base = launch.workflow.name, str(_base(launch))
    with nemo_run.Experiment(
        title, base_dir=base, enable_goodbye_message=False, skip_status_at_exit=True
    ) as experiment:
        for task in launch.tasks():
            if executor == "local":
                nemo_executor, words = _local_executor(nemo_run, task), ["local.sh", str(task.processes_per_node)]
            else:
                nemo_executor, words = _slurm_executor(nemo_run, launch, task), ["rank.sh"]
            command = shlex.join([str(launch.directory / words[0]), *words[1:], *task.arguments])
            script = nemo_run.Script(inline=f"exec bash {command}\n")
            experiment.add(script, nemo_executor, name=task.name, dependencies=list(task.after))
        yield experiment


def _local_executor(nemo_run: Any, task: Task) -> Any:
    if task.nodes != 1:
        raise UserError(f"the local executor has one node, not {task.nodes}: leave --nodes out, or --executor slurm")
    return nemo_run.LocalExecutor(packager=nemo_run.Packager())


def _slurm_executor(nemo_run: Any, launch: Launch, task: Task) -> Any:
    """Return the NeMo-Run executor that corresponds to ``scripts.sbatch_script``."""
    settings = launch.settings
    if " " in str(launch.run_dir):
        raise UserError(f"{launch.run_dir}: NeMo-Run does not quote paths; choose a run directory without spaces")
    return nemo_run.SlurmExecutor(
        account=settings.account,
        partition=settings.partition,
        qos=settings.qos,
        constraint=settings.constraint,
        job_name_prefix=f"{launch.workflow.name}-",
        time=str(settings.time_limit_minutes),
        nodes=task.nodes,
        ntasks_per_node=task.processes_per_node,
        gpus_per_node=task.gpus_per_node or None,
        cpus_per_task=settings.cpus_per_process,
        signal=scripts.signal_option(launch),
        retries=settings.max_requeues if settings.requeue else 0,
        container_image=settings.container.image if settings.container else None,
        container_mounts=launch.mounts if settings.container else [],
        additional_parameters=_additional(settings.sbatch),
        # Unquoted on purpose: the job's script expands them.
        env_vars={"MASTER_ADDR": "$head_node", "MASTER_PORT": scripts.MASTER_PORT},
        # NeMo-Run writes below the experiment's directory and copies nothing to it for a local tunnel.
        tunnel=nemo_run.LocalTunnel(job_dir=str(_base(launch) / "experiments")),
        packager=nemo_run.Packager(),
    )


def _additional(options: list[str]) -> dict[str, Any]:
    """Return ``--name=value`` and ``--flag`` options in the form of NeMo-Run."""
    pairs = [option.lstrip("-").partition("=") for option in options]
    return {name: value if separator else True for name, separator, value in pairs}
