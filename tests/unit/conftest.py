"""What the unit tests share: one thread a process, and no process groups that outlive their file."""

import gc
import os
import sys

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    # Several processes test at once, and threads that wait for a core spin. Before torch is imported; programs that
    # tests start inherit it.
    os.environ[name] = "1"


@pytest.fixture(scope="module", autouse=True)
def end_process_groups():
    """Destroy the process groups of a file."""
    yield
    if "megatron.core.distributed" not in sys.modules or not sys.modules["torch.distributed"].is_initialized():
        return
    from megatron.core import parallel_state

    gc.collect()  # models that are still referred to would keep their groups
    parallel_state.destroy_model_parallel()
    sys.modules["torch.distributed"].destroy_process_group()
