"""All ranks on this machine through torchrun. No torch here.

``s2d run`` starts several ranks by itself, too; this is for trying what a cluster does, and for the variables and
set-up lines of a cluster's file.
"""

from __future__ import annotations

import signal
import subprocess

from megatron_s2d.errors import UserError
from megatron_s2d.launchers import scripts
from megatron_s2d.launchers.job import Launch, write_launch
from megatron_s2d.workflow.status import RESUME_HINT, Interrupted


def write(launch: Launch) -> None:
    """Write the script that starts the ranks."""
    if launch.settings.nodes != 1:
        raise UserError(f"local means one node, not {launch.settings.nodes}: leave --nodes out, or use slurm")
    write_launch(launch, {"local.sh": scripts.local_script(launch)})


def run(launch: Launch) -> int:
    """Run the written script to its end; returns its exit code. Raises ``Interrupted`` when it was asked to stop.

    SIGTERM and Ctrl-C become one SIGTERM to torchrun, which passes it on to the ranks: they save a checkpoint.
    """
    (task,) = launch.tasks()
    command = ["bash", str(launch.directory / "local.sh"), str(task.processes_per_node), *task.arguments]
    process = subprocess.Popen(command, start_new_session=True)
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked and code:
        raise Interrupted(f"stopped; {RESUME_HINT}")
    return code
