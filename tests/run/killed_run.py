"""Runs the jobs of a workflow one after another in forked processes of its own, each killed before its n-th file
operation in the run directory; prints how many were killed.

python killed_run.py CONFIG RUN_DIR SEED KILLS
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
MOST_OPERATIONS = 400  # between two kills: more than there are between two checkpoints, so that the run gets on


def kill_before(count: int, run_dir: Path) -> None:
    """SIGKILL this process just before its ``count``-th operation on a file below ``run_dir``."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS and str(arguments[0]).startswith(str(run_dir)):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_pending(config_path: Path, run_dir: Path, count: int | None) -> None:
    config = load_workflow(config_path)
    initialize_distributed()
    layout = build_layout(config.parallel)
    if count is not None:
        kill_before(count, run_dir)
    for job in make_plan(config, run_dir):
        if job.is_pending:
            execute(config, job, run_dir, layout, lambda: False)


def main(config_path: Path, run_dir: Path, seed: int, kills: int) -> None:
    draw = random.Random(seed)
    done = 0
    while True:
        count = draw.randint(1, MOST_OPERATIONS) if done < kills else None
        child = os.fork()
        if child == 0:
            try:
                run_pending(config_path, run_dir, count)
            except BaseException as error:
                print(f"after {done} kills: {type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            done += 1
            continue
        print(done, flush=True)
        sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
