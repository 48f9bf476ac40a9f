"""Launcher for this machine: starts all ranks through torchrun. No torch here.

``s2d run`` also starts several ranks; use this to try a cluster's settings, its environment variables and set-up lines.
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
    """Run the written script to its end and return its exit code. Raises ``Interrupted`` after a signal to stop.

    SIGTERM and Ctrl-C become one SIGTERM to torchrun, which forwards it to the ranks: they save a checkpoint.
    """
    (task,) = launch.tasks()
    command = ["bash", str(launch.directory / "local.sh"), str(task.processes_per_node), *task.arguments]
    process = subprocess.Popen(command, start_new_session=True)
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        process.terminate()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received and code:
        raise Interrupted(f"stopped; {RESUME_HINT}")
    return code
