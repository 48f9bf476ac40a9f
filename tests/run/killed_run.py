"""Runs a workflow in forked processes that are killed before their n-th file operation in the run directory.

Prints the number of kills.

python killed_run.py CONFIG RUN_DIR SEED KILLS [PART]

With PART only operations on files with this part in their path count.
"""

import os
import random
import signal
import sys
from pathlib import Path

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.worker import execute

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime", "shutil.rmtree")
MAX_OPERATIONS = 400  # between two kills: more than between two checkpoints, so that the run makes progress
MAX_OPERATIONS_IN_PART = 40


def kill_before(count: int, run_dir: Path, part: str) -> None:
    """Send SIGKILL to this process just before its ``count``-th operation on a file below ``run_dir``."""
    num_operations = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal num_operations
        if event in OPERATIONS and str(arguments[0]).startswith(str(run_dir)) and part in str(arguments[0]):
            num_operations += 1
            if num_operations == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_pending(config_path: Path, run_dir: Path, count: int | None, part: str) -> None:
    config = load_workflow(config_path)
    initialize_distributed()
    layout = build_layout(config.parallel)
    if count is not None:
        kill_before(count, run_dir, part)
    for job in make_plan(config, run_dir):
        if job.is_pending:
            execute(config, job, run_dir, layout, lambda: False)


def main(config_path: Path, run_dir: Path, seed: int, kills: int, part: str = "") -> None:
    rng = random.Random(seed)
    num_kills = 0
    while True:
        most = MAX_OPERATIONS_IN_PART if part else MAX_OPERATIONS
        count = rng.randint(1, most) if num_kills < kills else None
        child = os.fork()
        if child == 0:
            try:
                run_pending(config_path, run_dir, count, part)
            except BaseException as error:
                print(f"after {num_kills} kills: {type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            num_kills += 1
            continue
        print(num_kills, flush=True)
        sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), "".join(sys.argv[5:]))
