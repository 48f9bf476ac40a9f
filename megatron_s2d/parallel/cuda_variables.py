"""Environment variables that CUDA and PyTorch read when they start, set as Megatron-Core wants them. No torch here.

A variable that the user has set stays. They must be set before anything asks CUDA for a device, which libraries do as
soon as they are imported: flashinfer, which SGLang installs and Megatron-Core imports, and quack.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Iterable

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.parallel.launcher_env import use_nccl_like_sglang

_BLACKWELL = 10  # major compute capability


def set_device_variables(config: WorkflowConfig) -> None:
    """Set what CUDA, PyTorch and NCCL read when they start in a rank of ``config``; call it before importing torch."""
    transport = config.rollout.sglang.weight_sync if config.rollout.engine == "sglang" else "none"
    set_cuda_variables(config.layouts, shares_memory=transport == "tensor")
    if transport == "distributed":
        use_nccl_like_sglang()


def set_cuda_variables(layouts: Iterable[ParallelConfig], *, shares_memory: bool) -> None:
    """Set them for a process that runs models at ``layouts``; on a machine without a GPU they have no effect.

    CUDA_DEVICE_MAX_CONNECTIONS=1 with tensor or context parallelism, before Blackwell: kernels then start in the order
    in which they were queued, so that a collective starts before the product that is meant to hide it. Unset otherwise:
    with more queues, all-to-alls of experts and copies overlap better.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: segments of the caching allocator grow instead of lying beside
    each other, so that micro-batches of ever new sizes do not fragment memory. Not with ``shares_memory`` (tensors that
    servers map from this process). CUDA graphs that record NCCL need NCCL_GRAPH_REGISTER=0 with it.
    """
    is_split = any(item.tensor_model_parallel_size > 1 or item.context_parallel_size > 1 for item in layouts)
    if is_split and (_compute_capability() or 0) < _BLACKWELL:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not shares_memory and "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


@dataclasses.dataclass(frozen=True)
class InstalledGpus:
    """The GPUs of this machine as its driver lists them; the first one stands for all."""

    count: int
    memory: int  # bytes of one
    compute_capability: int  # major


def installed_gpus() -> InstalledGpus | None:
    """Return what NVML says, because CUDA must not start; None without a driver that answers."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, count, major, minor = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_int(), ctypes.c_int()
    memory = (ctypes.c_ulonglong * 3)()  # total, free, used
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    )
    return None if failed else InstalledGpus(count.value, memory[0], major.value)


def _compute_capability() -> int | None:
    """Return the major compute capability of the first GPU; None: unknown."""
    gpus = installed_gpus()
    return None if gpus is None else gpus.compute_capability
