"""The device of this rank and its capabilities, and a patch that runs Megatron-Core on a CPU when there is no GPU.

``patch_megatron_for_cpu()`` runs once per process, before Megatron-Core is used. With CUDA it does nothing. Without, it
makes Megatron-Core run on the CPU over gloo: Megatron asks ``torch.cuda`` for a device, streams and random state, and
names ``"cuda"`` as a constant in its own functions. The patch answers the former with the CPU, and replaces the latter
in the compiled constants of the few Megatron modules that have them, so no PyTorch call is intercepted or slowed down.
Code outside this module distinguishes the two cases only through ``device()`` and ``capabilities()``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import types
from pathlib import Path

import torch

# Modules of Megatron-Core whose functions name "cuda" or compare with 'torch.cuda.FloatTensor'.
_MODULES_WITH_CUDA_CONSTANTS = (
    "megatron.core.utils",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.utils",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.moe.moe_layer",
)


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """Hardware and optional libraries that this process can use; ``s2d doctor`` prints them."""

    cuda: bool
    device_name: str
    transformer_engine: bool  # layers, attention, optimizer, FP8, and gradient accumulation fusion
    apex: bool  # fused optimizer kernels
    apex_gradient_accumulation: bool = False  # gradient accumulation fusion for Megatron's own layers
    compute_capability: tuple[int, int] = (0, 0)
    cuda_version: tuple[int, int] = (0, 0)  # version that torch was built for


@functools.cache
def capabilities() -> Capabilities:
    """Probe once. An optional library that is installed but does not import counts as absent."""
    if not torch.cuda.is_available():
        return Capabilities(cuda=False, device_name="CPU", transformer_engine=False, apex=False)
    major, minor = torch.version.cuda.split(".")[:2]
    return Capabilities(
        cuda=True,
        device_name=torch.cuda.get_device_name(),
        transformer_engine=_imports("transformer_engine.pytorch"),
        apex=_imports("apex.optimizers") and _imports("amp_C"),
        apex_gradient_accumulation=_imports("fused_weight_gradient_mlp_cuda"),
        compute_capability=torch.cuda.get_device_capability(),
        cuda_version=(int(major), int(minor)),
    )


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError):  # absent, or built for another torch or CUDA
        return False
    return True


def device() -> torch.device:
    """Return the device of this rank's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if capabilities().cuda else torch.device("cpu")


def pinned_empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised host tensor for asynchronous copies; pinned if there is CUDA."""
    return torch.empty(*shape, dtype=dtype, pin_memory=capabilities().cuda)


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to ``pinned_empty`` memory, asynchronously in stream order; on a CPU return the tensor itself."""
    if not capabilities().cuda:
        return tensor
    return pinned_empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor, non_blocking=True)


def synchronize() -> None:
    """Wait for the device's queued work, so that the host can read memory that the device writes."""
    if capabilities().cuda:
        torch.cuda.current_stream().synchronize()


def backend() -> str:
    """Return the torch.distributed backend for ``device()``."""
    return "nccl" if capabilities().cuda else "gloo"


def peak_memory() -> int:
    """Return the peak bytes of this process: allocated on its GPU, or resident (the high-water mark) on a CPU."""
    if capabilities().cuda:
        return torch.cuda.max_memory_allocated()
    # ru_maxrss would include the parent process's.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@functools.cache
def patch_megatron_for_cpu() -> None:
    """Make Megatron-Core usable in this process; idempotent."""
    if capabilities().cuda:
        return
    _answer_torch_cuda_with_cpu()
    for name in _MODULES_WITH_CUDA_CONSTANTS:
        _replace_cuda_constants(importlib.import_module(name))
    _use_cpu_random_state()
    _pass_split_sizes_as_numpy()


class _NoStream:
    """Replaces a CUDA stream or event: work on a CPU is finished when the call returns."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *args):
        pass

    wait_event = record = wait = synchronize = wait_stream

    def record_event(self, *args) -> _NoStream:
        return self

    def query(self) -> bool:
        return True


def _answer_torch_cuda_with_cpu() -> None:
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.Stream = torch.cuda.Event = _NoStream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args: _NoStream()
    torch.cuda.stream = lambda *args: contextlib.nullcontext()
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args: None
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor


def _use_cpu_random_state() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._lazy_call = lambda function, **kwargs: function()
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _pass_split_sizes_as_numpy() -> None:
    """Make the MoE dispatcher convert split sizes to NumPy arrays, as the all-to-all requires, from CPU tensors too."""
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


def _replace_cuda_constants(module: types.ModuleType) -> None:
    """Replace "cuda" by "cpu" in the constants and default arguments of every function defined in ``module``."""
    owners = [module] + [
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
    ]
    for owner in owners:
        for value in list(vars(owner).values()):
            function = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
            function = getattr(function, "__wrapped__", function)
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                function.__code__ = _cpu_code(function.__code__)
                if function.__defaults__:
                    function.__defaults__ = tuple(_cpu_constant(item) for item in function.__defaults__)


def _cpu_code(code: types.CodeType) -> types.CodeType:
    constants = tuple(
        _cpu_code(item) if isinstance(item, types.CodeType) else _cpu_constant(item) for item in code.co_consts
    )
    return code if constants == code.co_consts else code.replace(co_consts=constants)


def _cpu_constant(item: object) -> object:
    if isinstance(item, tuple):
        return tuple(_cpu_constant(part) for part in item)
    if isinstance(item, str):
        if item == "cuda":
            return "cpu"
        if item.startswith("torch.cuda.") and item.endswith("Tensor"):
            return item.replace("torch.cuda.", "torch.")
    return item
