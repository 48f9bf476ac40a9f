"""``s2d`` whose ranks run on the CUDA stub: ``python s2d_on_stub.py fork run CONFIG``, with the stub preloaded.

``fork``: from a process that has imported everything without starting CUDA. ``spawn``: as on a machine with GPUs, each
rank in a new process.
"""

import multiprocessing
import os
import sys
from pathlib import Path

from megatron_s2d.workflow import process_pool

run_rank = process_pool._run_worker


def run_rank_on_stub(*arguments) -> None:
    """Compute what the host reads, in the process of a rank."""
    from megatron_s2d.measure.stub import Stub

    stub = Stub()
    from megatron_s2d.measure.host_values import HostValues

    with HostValues(stub):
        run_rank(*arguments)


process_pool._run_worker = run_rank_on_stub  # the function that new processes start with


def fork_ranks() -> None:
    """Let ranks be forks, although there are GPUs."""
    # Where the process that is forked finds what it imports; an import that fails is silently left out.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stub_preload"])

    def start(server: process_pool.ProcessServer) -> None:
        server._forks, server._context = True, context

    process_pool.ProcessServer.__init__ = start


if __name__ == "__main__":
    from megatron_s2d.cli import main

    if sys.argv[1] == "fork":
        fork_ranks()
    sys.exit(main(sys.argv[2:]))
