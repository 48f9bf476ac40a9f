"""Runs workers of this folder on several ranks, forked from one process that has imported the libraries.

Each rank has the environment that torchrun gives it. tests/run starts ranks with torchrun itself; here the imports of
every rank would take longer than most workers.

python launch_ranks.py WORKER RANKS [ARGUMENT ...]    one launch
python launch_ranks.py                                one launch for each JSON line of the standard input,
                                                      {"worker", "ranks", "arguments", "stderr": file}; its exit code
                                                      is printed
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback

import transformers.models.qwen3.modeling_qwen3  # noqa: F401  # which workers compare with

import megatron_s2d.workflow.preload  # noqa: F401


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_rank(worker: str, arguments: list[str], rank: int, world_size: int, port: int) -> int:
    """Fork a rank that runs ``worker`` as a program, and return its process id."""
    pid = os.fork()
    if pid:
        return pid
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    folder = os.path.dirname(worker)
    sys.path[:0] = [folder, os.path.dirname(folder)]
    sys.argv = [worker, *arguments]
    code = 1
    try:
        runpy.run_path(worker, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launch(worker: str, world_size: int, arguments: list[str]) -> int:
    """Return 0, or 1 after a rank failed; the others are killed then."""
    port = free_port()
    running = {start_rank(worker, arguments, rank, world_size, port): rank for rank in range(world_size)}
    while running:
        pid, status = os.wait()
        rank, code = running.pop(pid), os.waitstatus_to_exitcode(status)
        if code:
            print(f"rank {rank} ended with {code}", file=sys.stderr)
            for other in running:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def serve() -> None:
    """Launch what the lines of the standard input ask for, one after the other, each from a process of its own."""
    for line in sys.stdin:
        request = json.loads(line)
        if not (pid := os.fork()):
            errors = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(errors, 2)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(0, 1)
            os._exit(launch(request["worker"], request["ranks"], request["arguments"]))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(launch(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
    serve()
