"""Frees models that tests have trained, so that their process groups end.

A layout has about 40 gloo groups, and each keeps threads, one of which polls every 10 ms: a process that tests many
layouts would spend its time there. Megatron-Core's DistributedDataParallel hooks the gradient accumulators of its
parameters with functions that refer to the model, and no garbage collection sees these cycles.
"""

import gc
import types

from megatron.core.distributed import DistributedDataParallel

_HOOK = f"{DistributedDataParallel.__name__}._make_backward_post_hook.<locals>.hook"


def free_trained_models() -> None:
    """Free models that nothing else refers to; others do not train any more."""
    for item in gc.get_objects():
        # Not isinstance, which asks the object behind a weak proxy, and that may be gone.
        if type(item) is types.FunctionType and item.__qualname__ == _HOOK:
            for cell in item.__closure__:
                del cell.cell_contents
    gc.collect()
