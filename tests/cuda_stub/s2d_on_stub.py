"""``s2d`` whose ranks run on the CUDA stub: ``python s2d_on_stub.py run CONFIG``, with the stub preloaded."""

import sys

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

if __name__ == "__main__":
    from megatron_s2d.cli import main

    sys.exit(main(sys.argv[1:]))
