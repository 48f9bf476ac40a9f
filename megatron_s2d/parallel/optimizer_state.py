"""The optimizer state that a checkpoint takes, without copies of it where nothing has to be gathered.

Megatron-Core 0.19.2 gathers the state of a gradient buffer over data-parallel ranks before it is written: shards, what
the ranks sent, and their concatenation are there at once, on a single rank too. There every parameter has all of its
state, and the writer can read it where it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch


class _StateOfBuffer(Mapping[Any, Any]):
    """One kind of state (such as ``exp_avg``) of all parameters of a buffer, read by the range of a parameter."""

    def __init__(self, optimizer: Any, kind: str, ranges: Mapping[tuple[int, int], torch.nn.Parameter]):
        self._optimizer, self._kind, self._ranges = optimizer, kind, ranges

    def __getitem__(self, elements: slice) -> torch.Tensor:
        """Return the state of the parameter at ``elements`` of the buffer: float32, flat."""
        parameter = self._ranges[elements.start, elements.stop]
        state = self._optimizer._get_main_param_and_optimizer_states(parameter)[self._kind]
        flat: torch.Tensor = state.detach().view(-1)
        return flat

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)


@contextlib.contextmanager
def read_in_place(optimizer: Any) -> Iterator[None]:
    """Let ``sharded_state_dict`` of Megatron's distributed optimizers on one data-parallel rank copy no state inside.

    optimizer: one, or several chained. The tensors of the state are those that the next update changes.
    """
    alone = [
        item
        for item in getattr(optimizer, "chained_optimizers", [optimizer])
        if getattr(item, "data_parallel_group", None) is not None and item.data_parallel_group.size() == 1
    ]
    for item in alone:
        item.get_parameter_state_dp_zero = lambda item=item, **_: _state_by_buffer(item)
    try:
        yield
    finally:
        for item in alone:
            del item.get_parameter_state_dp_zero


def _state_by_buffer(optimizer: Any) -> dict[Any, Any]:
    """Return what ``DistributedOptimizer.get_parameter_state_dp_zero`` returns, with views instead of copies."""
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, range_maps in enumerate(optimizer.gbuf_ranges):
        buffer = optimizer.buffers[index]
        ranges = {(start, stop): parameter for parameter, (start, stop, _) in buffer.param_index_map.items()}
        kinds = ("param", *optimizer.optimizer_state_keys)
        of_buffer = {kind: _StateOfBuffer(optimizer, kind, ranges) for kind in kinds}
        state[index] = {dtype: of_buffer | {"numel_unpadded": buffer.numel_unpadded} for dtype in range_maps}
    return state
