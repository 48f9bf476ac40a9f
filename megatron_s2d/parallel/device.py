"""The device of this rank and its capabilities, and a patch that runs Megatron-Core on a CPU when there is no GPU.

``prepare()`` runs once per process, in ``initialize_distributed()``: no import may ask for a device, because that
initialises CUDA, and no process forked afterwards can use it. Without CUDA it makes Megatron-Core run on the CPU over
gloo: Megatron asks ``torch.cuda`` for a device, streams and random state, and names ``"cuda"`` as a constant in its own
functions. The patch answers the former with the CPU, and replaces the latter in the compiled constants of the few
Megatron modules that have them, so no PyTorch call is intercepted or slowed down.
Code outside this module distinguishes the two cases only through ``device()`` and ``capabilities()``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import types
from pathlib import Path

import torch

from megatron_s2d.errors import UserError

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
    transformer_engine_error: str = ""  # why an installed Transformer Engine does not import


@functools.cache
def capabilities() -> Capabilities:
    """Probe once."""
    if not torch.cuda.is_available():
        return Capabilities(cuda=False, device_name="CPU", transformer_engine=False, apex=False)
    major, minor = torch.version.cuda.split(".")[:2]
    engine_error = import_error("transformer_engine.pytorch")
    return Capabilities(
        cuda=True,
        device_name=torch.cuda.get_device_name(),
        transformer_engine=engine_error is None,
        apex=import_error("apex.optimizers") is None and import_error("amp_C") is None,
        apex_gradient_accumulation=import_error("fused_weight_gradient_mlp_cuda") is None,
        compute_capability=torch.cuda.get_device_capability(),
        cuda_version=(int(major), int(minor)),
        transformer_engine_error=engine_error or "",
    )


def import_error(name: str) -> str | None:
    """Return None if a module imports, "" if its package is not installed, else why it does not import."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a library built for another torch or CUDA fails in its own way
        if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
            return ""
        return f"{type(error).__name__}: {' '.join(str(error).split()) or 'without a message'}"
    return None


def mend_transformer_engine() -> str:
    """Return what to do where Transformer Engine is installed but does not import.

    Its PyTorch part has to be of the same version as the rest; pip would take a build for another torch from its cache.
    """
    try:
        version = f"=={importlib.metadata.version('transformer-engine')}"
    except importlib.metadata.PackageNotFoundError:  # a folder on the path
        version = ""
    return (
        "build it for this torch with NVTE_BUILD_USE_NVIDIA_WHEELS=1 pip install --force-reinstall --no-deps "
        f"--no-build-isolation --no-cache-dir transformer-engine-torch{version} (docs/gpu.md), or uninstall "
        "transformer-engine"
    )


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


def copy_to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Copy from host memory, asynchronously in stream order; on a CPU return the tensor itself."""
    return tensor.pin_memory().to(device(), non_blocking=True) if capabilities().cuda else tensor


def synchronize() -> None:
    """Wait for the device's queued work, so that the host can read memory that the device writes."""
    if capabilities().cuda:
        torch.cuda.current_stream().synchronize()


def release_cached_memory() -> None:
    """Return memory that PyTorch's allocator keeps but no tensor uses, so that other processes can have it."""
    if capabilities().cuda:
        torch.cuda.empty_cache()


def total_memory() -> int:
    """Return the bytes of this rank's GPU."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def free_memory() -> int:
    """Return the bytes of this rank's GPU that no process uses."""
    return torch.cuda.mem_get_info()[0]


def count() -> int:
    """Return the number of GPUs that this process sees."""
    return torch.cuda.device_count()


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
def prepare() -> None:
    """Make this process ready for its device, once, before a process group or model is made.

    With CUDA: cuDNN's attention is switched off. It is PyTorch's first choice on recent GPUs, but builds a plan for
    every new shape, about half a second each, and shapes change with every micro-batch and every decoded token.
    Without: Megatron-Core is patched. ``UserError`` if Transformer Engine is installed but does not import: a run that
    went on without it would be slow, and nobody would know why.
    """
    if error := capabilities().transformer_engine_error:
        raise UserError(f"transformer-engine is installed but does not import ({error}); {mend_transformer_engine()}")
    if capabilities().cuda:
        torch.backends.cuda.enable_cudnn_sdp(False)
        _compute_gradient_norms_on_the_device()
    else:
        _patch_megatron_for_cpu()


def _compute_gradient_norms_on_the_device() -> None:
    """Replace Megatron's norm without Transformer Engine and apex, which reads one number for each parameter."""
    clip_grads = importlib.import_module("megatron.core.optimizer.clip_grads")
    # Defined only where neither of them imports.
    if hasattr(clip_grads, "local_multi_tensor_l2_norm"):
        clip_grads.l2_norm_impl = l2_norm


def l2_norm(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Return the norm of all tensors of the first list, [1] float32, with the interface of ``multi_tensor_l2norm``."""
    return torch.stack(torch._foreach_norm(tensor_lists[0])).norm().float().reshape(1), None


def _patch_megatron_for_cpu() -> None:
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
