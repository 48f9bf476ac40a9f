"""Launcher for SLURM: writes the scripts of the jobs and submits them with sbatch. No torch here."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from megatron_s2d.errors import UserError
from megatron_s2d.launchers import scripts
from megatron_s2d.launchers.config import load_launch
from megatron_s2d.launchers.job import Launch, plan_launch, write_launch
from megatron_s2d.studies.sweep import Point


def write(launch: Launch) -> None:
    """Write the sbatch script of every task, the script of a rank, and the script that submits all jobs."""
    jobs = {
        scripts.sbatch_name(number, task): scripts.sbatch_script(launch, task)
        for number, task in enumerate(launch.tasks(), 1)
    }
    files = {"rank.sh": scripts.rank_script(launch), "submit.sh": scripts.submit_script(launch), **jobs}
    if launch.settings.server_nodes:
        files["server.sh"] = scripts.server_script(launch)
    write_launch(launch, files)


def submitter(cluster: Path | None, overrides: list[str]) -> Callable[[Point, Path, Console], None]:
    """Return a function that submits one point of a sweep as a separate job, for ``studies.sweep.run_sweep``."""
    settings = load_launch(cluster, overrides)

    def submit_point(point: Point, run_dir: Path, console: Console) -> None:
        launch = plan_launch(point.config, settings, run_dir)
        write(launch)
        for task, number in submit(launch).items():
            console.print(f"  {task}: job {number}", markup=False, highlight=False)

    return submit_point


def submit(launch: Launch) -> dict[str, int]:
    """Run the written ``submit.sh`` and return task -> job id. A rejection by sbatch is a ``UserError``."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: run this where jobs are submitted from, or add --dry-run")
    done = subprocess.run(["bash", str(launch.directory / "submit.sh")], capture_output=True, text=True)
    numbers = {name: int(number) for name, _, number in (line.rpartition(" ") for line in done.stdout.splitlines())}
    if done.returncode:
        submitted = f"; submitted before: {' '.join(map(str, numbers.values()))}" if numbers else ""
        raise UserError(f"sbatch rejected a job: {' '.join(done.stderr.split())}{submitted}")
    return numbers
