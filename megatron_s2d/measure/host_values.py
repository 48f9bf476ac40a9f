"""Computes on the host what the host reads from a device whose kernels do nothing: sizes, indices and masks.

Device memory of the stub is host memory, so integers and booleans are computed by PyTorch's CPU operators on the
memory of the device tensors themselves; views, in-place operations and copies need nothing else. Every operation also
runs on the "device" first, which allocates, launches and waits as it does on a GPU. Floats are not computed: where one
is read, or decides an integer or boolean, it is 1.0, or the number that the tensor was filled with, except in short
vectors that come from the host, from integers or from such vectors: flags and counts among metrics. Indices that depend
on floats are valid, distinct and balanced.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from megatron_s2d.measure.stub import Stub

aten = torch.ops.aten

_LARGEST = 1 << 22  # elements of a result that is computed; larger ones are not read by the host
_LARGEST_KNOWN = 1 << 10  # elements of a float tensor whose values are computed where they are known
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# What is computed of short vectors of floats.
_ON_METRICS = {
    "_to_copy", "copy_", "clone", "cat", "stack", "add", "add_", "sub", "mul", "mul_", "div", "sum", "where", "maximum",
}  # fmt: skip
# Results without values: zeros, so that a buffer which only another rank would fill holds valid indices.
_UNSET = {
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
    aten.new_empty_strided.default,
}  # fmt: skip
# Their integers are the random state of dropout, which nothing reads; in a CUDA graph it is on the device.
_ATTENTION = {aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default}
# Results with one value: name of the operation -> index of the argument that has it, or the value itself.
_FILLED = {
    "zeros": 0.0,
    "zeros_like": 0.0,
    "new_zeros": 0.0,
    "zero_": 0.0,
    "ones": 1.0,
    "ones_like": 1.0,
    "new_ones": 1.0,
}
_FILLED_BY = {"full": 1, "full_like": 1, "new_full": 2, "fill_": 1}
# Counted as matrix products, with their operands.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "addmm_", "_grouped_mm", "_scaled_mm"}
_WRITES_ONLY = {"zero_", "fill_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
# Reordering by floats: (values, indices) along a dimension.
_ORDERED = {aten.topk.default, aten.sort.default, aten.sort.stable, aten.kthvalue.default, aten.mode.default}
_SEARCHES = {aten.searchsorted.Tensor, aten.bucketize.Tensor}
_EXTREMES = {aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default, aten.median.dim}


@dataclasses.dataclass(frozen=True, slots=True)
class _Operator:
    """What does not change between two calls of an operator; asking for it again would take most of the time."""

    name: str
    is_aten: bool
    is_view: bool
    reads: bool  # whether the bytes of its arguments are counted
    writes: bool  # whether those of its results are
    is_on_metrics: bool
    fills: bool  # with one number

    @classmethod
    def of(cls, func: Any) -> _Operator:
        name, returns = func.overloadpacket.__name__, func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        writes = not (func in _UNSET or is_view or name in _PRODUCTS or "attention" in name)
        return cls(
            name,
            func.namespace == "aten",
            is_view,
            writes and name not in _WRITES_ONLY,
            writes,
            name in _ON_METRICS,
            name in _FILLED or name in _FILLED_BY,
        )


class HostValues(TorchDispatchMode):
    """Keeps the integers and booleans of the stub's devices right while it is active."""

    def __init__(self, stub: Stub):
        super().__init__()
        self._stub = stub
        self._operators: dict[Any, _Operator] = {}
        self._fill = WeakIdKeyDictionary()  # large float tensor -> (its version, the number that it was filled with)
        self._known = WeakIdKeyDictionary()  # small float tensor whose memory is right -> its version
        self._instead: dict[Any, Callable[..., Any]] = {
            aten.nonzero.default: self._nonzero,
            aten.masked_select.default: self._masked_select,
            aten.index.Tensor: self._index,
            aten.index_put.default: self._index_put,
            aten.index_put_.default: self._index_put,
            aten._index_put_impl_.default: self._index_put,
            aten.repeat_interleave.Tensor: self._repeat_interleave,
            aten.bincount.default: self._bincount,
            aten._unique2.default: self._unique,
            aten.unique_dim.default: self._unique,
            aten.unique_consecutive.default: self._unique,
            aten.equal.default: self._equal,
            aten._local_scalar_dense.default: self._read_scalar,
            aten._to_copy.default: self._copy,
            aten.copy_.default: self._copy,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        instead = self._instead.get(func)
        if instead is not None:
            return instead(func, args, kwargs)
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run on the device, then compute integer and boolean results on the host."""
        result = func(*args, **kwargs)
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = _Operator.of(func)
        if not operator.is_aten:
            return result
        outputs = [result] if isinstance(result, torch.Tensor) else tree_leaves(result)
        if operator.is_view:
            if self._is_known(args[0]):
                for item in filter(_is_small_float, outputs):
                    self._known[item] = item._version
            return result
        if operator.writes:
            size = sum(map(_device_bytes, outputs))
            if operator.reads:
                size += sum(map(_device_bytes, _tensors(args, kwargs)))
            if size:
                self._stub.count_moved(operator.name, size)
        if operator.fills:
            self._remember_fill(operator.name, args, result)
        targets = [item for item in outputs if _is_small_integer(item)]
        if operator.is_on_metrics:
            floats = [item for item in outputs if _is_small_float(item)]
            if floats and any(map(self._is_known, tree_leaves((args, kwargs)))):
                targets += floats
        if targets:
            self._compute(func, args, kwargs, outputs, targets)
        return result

    def _is_known(self, item: Any) -> bool:
        """Return whether the host knows values of a tensor that are not those of a kernel."""
        if not isinstance(item, torch.Tensor):
            return False
        if not item.is_cuda or item.dtype in _INTEGERS:
            return item.dim() > 0 or item.is_cuda
        return self._known.get(item, -1) == item._version

    def _remember_fill(self, name: str, args: tuple, result: Any) -> None:
        if result.is_cuda and result.is_floating_point():
            value = _FILLED[name] if name in _FILLED else args[_FILLED_BY[name]]
            if isinstance(value, int | float):
                if _is_small_float(result):
                    on_host(result).fill_(value)
                    self._known[result] = result._version
                else:
                    self._fill[result] = (result._version, value)

    def _number(self, tensor: torch.Tensor) -> float:
        """Return the number that a float tensor has everywhere, as far as the host can know."""
        version, value = self._fill.get(tensor, (-1, 1.0))
        return value if version == tensor._version else 1.0

    def _host_argument(self, item: Any) -> Any:
        """Return integers of the device as they are, floats of the device as one number, devices as the CPU."""
        if not isinstance(item, torch.Tensor) or not item.is_cuda:
            return torch.device("cpu") if isinstance(item, torch.device) else item
        if item.dtype in _INTEGERS or self._is_known(item):
            return on_host(item)
        if item.numel() <= _LARGEST_KNOWN:  # may be written to
            return torch.full(item.shape, self._number(item), dtype=item.dtype)
        return torch.full((), self._number(item), dtype=item.dtype).expand(item.shape)

    def _compute(self, func: Any, args: tuple, kwargs: dict, outputs: list[Any], targets: list[Any]) -> None:
        """Write the values of ``targets``, which are among the ``outputs`` of the operation."""
        if func in _UNSET or func in _ATTENTION:
            for item in targets:
                on_host(item).zero_()
            return
        source = next((item for item in args if isinstance(item, torch.Tensor)), None)
        if source is not None and source.is_floating_point():
            if func in _ORDERED or func in _EXTREMES:
                _fill_indices(func, source, args, outputs)
                return
            if func in _SEARCHES:  # for 1.0 among ones
                boundaries = args[0] if func is aten.searchsorted.Tensor else args[1]
                is_right = kwargs.get("right") or kwargs.get("side") == "right"
                on_host(outputs[0]).fill_(boundaries.shape[-1] if is_right else 0)
                return
        if source is not None and source.numel() > 16 * _LARGEST:
            for item in filter(_is_small_integer, outputs):
                on_host(item).zero_()
            return
        host_args, host_kwargs = tree_map(self._host_argument, args), tree_map(self._host_argument, dict(kwargs))
        if "device" in host_kwargs:
            host_kwargs["device"] = torch.device("cpu")
        host_kwargs.pop("pin_memory", None)
        if "generator" in host_kwargs:
            host_kwargs["generator"] = None
        computed = func(*host_args, **host_kwargs)
        values = [computed] if isinstance(computed, torch.Tensor) else tree_leaves(computed)
        for target, value in zip(outputs, values, strict=True):
            if any(target is item for item in targets):
                memory = on_host(target)
                if memory.data_ptr() != value.data_ptr():
                    memory.copy_(value)
                if target.is_floating_point():
                    memory.nan_to_num_(nan=1.0, posinf=1.0, neginf=-1.0)
                    self._known[target] = target._version

    # -------------------------------------------------------------------------------- what the host reads

    def _read_scalar(self, func: Any, args: tuple, kwargs: dict) -> Any:
        value = func(*args, **kwargs)
        tensor = args[0]
        is_made_up = tensor.is_cuda and tensor.is_floating_point() and not self._is_known(tensor)
        return self._number(tensor) if is_made_up else value

    def _copy(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A copy; floats that arrive on the host are one number."""
        result = self._run(func, args, kwargs)
        source = args[1] if func is aten.copy_.default else args[0]
        if source.is_cuda and not result.is_cuda and result.is_floating_point() and result.numel() <= _LARGEST:
            result.detach().copy_(self._host_argument(source))
        if not source.is_cuda and _is_small_float(result):
            on_host(result).copy_(source)
            self._known[result] = result._version
        # Integers of any size: pickled objects are sent as bytes.
        if source.is_cuda != result.is_cuda and result.dtype in _INTEGERS and source.dtype in _INTEGERS:
            (on_host(result) if result.is_cuda else result).copy_(on_host(source) if source.is_cuda else source)
        return result

    def _equal(self, func: Any, args: tuple, kwargs: dict) -> bool:
        if not args[0].is_cuda:
            return func(*args, **kwargs)
        self._stub.count("equal", launches=2, waits=1)
        return bool(func(*tree_map(self._host_argument, args)))

    # -------------------------------------------------------------------------------- sizes that depend on values

    def _to_device(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        result = torch.empty(value.shape, dtype=value.dtype, device=device)
        if value.numel():
            on_host(result).copy_(value)
        return result

    def _nonzero(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        tensor = args[0]
        if not tensor.is_cuda:
            return func(*args, **kwargs)
        self._stub.count("nonzero", launches=4, waits=1)
        # PyTorch returns the transpose of [dimensions, count].
        return self._to_device(self._host_argument(tensor).nonzero().t().contiguous(), tensor.device).t()

    def _without_masks(self, indices: Any) -> list[torch.Tensor | None]:
        """Return boolean indices as positions, as PyTorch does (and waits for)."""
        expanded: list[torch.Tensor | None] = []
        for index in indices:
            if index is not None and index.is_cuda and index.dtype in (torch.bool, torch.uint8):
                expanded.extend(self._nonzero(aten.nonzero.default, (index,), {}).unbind(1))
            else:
                expanded.append(index)
        return expanded

    def _index(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        tensor, indices = args
        return self._run(func, (tensor, self._without_masks(indices)), kwargs)

    def _index_put(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        tensor, indices, values, *rest = args
        if not (values.numel() == 1 and not values.is_cuda):  # a number goes to masked_fill, which does not wait
            indices = self._without_masks(indices)
        return self._run(func, (tensor, indices, values, *rest), kwargs)

    def _masked_select(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        tensor, mask = args
        if not tensor.is_cuda:
            return func(*args, **kwargs)
        tensor, mask = torch.broadcast_tensors(tensor, mask)
        return self._index(aten.index.Tensor, (tensor, [mask]), {})

    def _repeat_interleave(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        repeats = args[0]
        if not repeats.is_cuda:
            return func(*args, **kwargs)
        self._stub.count("repeat_interleave", launches=2, waits=kwargs.get("output_size") is None)
        return self._to_device(func(self._host_argument(repeats)), repeats.device)

    def _bincount(self, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        tensor = args[0]
        if not tensor.is_cuda:
            return func(*args, **kwargs)
        self._stub.count("bincount", launches=4, waits=2)
        value = func(*tree_map(self._host_argument, args), **tree_map(self._host_argument, kwargs))
        return self._to_device(value, tensor.device)

    def _unique(self, func: Any, args: tuple, kwargs: dict) -> tuple[torch.Tensor, ...]:
        tensor = args[0]
        if not tensor.is_cuda:
            return func(*args, **kwargs)
        self._stub.count("unique", launches=6, waits=1)
        values = func(*tree_map(self._host_argument, args), **kwargs)
        return tuple(self._to_device(value, tensor.device) for value in values)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a device tensor as a CPU tensor of the same shape and strides."""
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = (ctypes.c_char * (extent * tensor.itemsize)).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype, count=extent).as_strided(tensor.shape, tensor.stride())


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors among the arguments of an operator, those in lists included."""
    found = []
    for item in (*args, *kwargs.values()):
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, list | tuple):
            found += [part for part in item if isinstance(part, torch.Tensor)]
    return found


def _device_bytes(item: Any) -> int:
    """Bytes of a device tensor; of an expanded one those that exist."""
    if not (isinstance(item, torch.Tensor) and item.is_cuda):
        return 0
    if item.is_contiguous():
        return item.numel() * item.itemsize
    shape = zip(item.shape, item.stride(), strict=True)
    return math.prod(size for size, stride in shape if stride) * item.itemsize


def _is_small_integer(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.is_cuda and item.dtype in _INTEGERS and 0 < item.numel() <= _LARGEST


def _is_small_float(item: Any) -> bool:
    return (
        isinstance(item, torch.Tensor)
        and item.is_cuda
        and item.is_floating_point()
        and item.dim() <= 1
        and 0 < item.numel() <= _LARGEST_KNOWN
    )


def _fill_indices(func: Any, source: torch.Tensor, args: tuple, outputs: list[Any]) -> None:
    """Fill indices that depend on floats: distinct in a row, and over all rows every index equally often."""
    for item in filter(_is_small_integer, outputs):
        memory = on_host(item)
        if func in _EXTREMES or not item.dim():
            memory.zero_()
            continue
        position = 2 if func is aten.topk.default else 1
        dim = args[position] if len(args) > position and isinstance(args[position], int) else -1
        if func is aten.sort.stable:
            dim = -1
        size, count = source.shape[dim], item.shape[dim]
        rows = torch.arange(item.numel() // count).view(-1, 1)
        indices = (rows * count + torch.arange(count)) % size
        moved = memory.movedim(dim, -1)
        moved.copy_(indices.view(moved.shape))
