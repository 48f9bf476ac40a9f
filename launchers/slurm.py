"""Jobs of a SLURM cluster through sbatch: write the scripts, submit them. No torch here."""

from __future__ import annotations

import shutil
import subprocess

from megatron_s2d.config.base import UserError
from megatron_s2d.launchers import scripts
from megatron_s2d.launchers.job import Launch, write_launch


def write(launch: Launch) -> None:
    """Write the job of every task, the script of a rank, and the one that submits them all."""
    jobs = {
        scripts.sbatch_name(number, task): scripts.sbatch_script(launch, task)
        for number, task in enumerate(launch.tasks(), 1)
    }
    write_launch(launch, {"rank.sh": scripts.rank_script(launch), "submit.sh": scripts.submit_script(launch), **jobs})


def submit(launch: Launch) -> dict[str, int]:
    """Run the written ``submit.sh``; task -> job number. A refusal of sbatch is a ``UserError``."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: run this where jobs are submitted from, or add --dry-run")
    done = subprocess.run(["bash", str(launch.directory / "submit.sh")], capture_output=True, text=True)
    numbers = {name: int(number) for name, _, number in (line.rpartition(" ") for line in done.stdout.splitlines())}
    if done.returncode:
        held = f"; submitted before: {' '.join(map(str, numbers.values()))}" if numbers else ""
        raise UserError(f"sbatch refused a job: {' '.join(done.stderr.split())}{held}")
    return numbers
