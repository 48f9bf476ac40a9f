"""Writes Hugging Face safetensors shards tensor by tensor.

The sizes of all tensors are planned beforehand, so each shard's header is written first and one tensor is in memory.
Also written: the index (with more than one shard) and ``weights.sha256``, which ``sha256sum -c`` checks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_s2d.conversion.files import HashedFile
from megatron_s2d.errors import UserError
from megatron_s2d.models.hf_checkpoint import DIGESTS_NAME, DTYPES, INDEX_NAME, SINGLE_NAME

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """Name, dtype and shape of a tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HfWriter:
    """Writes the tensors of a plan, in its order, into ``directory``."""

    def __init__(self, directory: Path, plan: Iterable[PlannedTensor], max_shard_bytes: int):
        """Plan the shards; a tensor larger than ``max_shard_bytes`` gets a separate shard."""
        self._directory = directory
        self._shards: list[list[PlannedTensor]] = [[]]
        free = max_shard_bytes
        for tensor in plan:
            if tensor.dtype not in _DTYPE_NAMES:
                raise UserError(f"{tensor.name}: dtype {tensor.dtype} cannot be written to safetensors")
            if self._shards[-1] and tensor.num_bytes > free:
                self._shards.append([])
                free = max_shard_bytes
            self._shards[-1].append(tensor)
            free -= tensor.num_bytes
        self._pending = [(number, tensor) for number, shard in enumerate(self._shards) for tensor in shard]
        self._pending.reverse()
        self._file: HashedFile | None = None
        self._digests: dict[str, str] = {}
        self._current = -1
        self._next_row = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for shard in self._shards for tensor in shard)

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Write the next tensor of the plan, or, if it is written in several parts, its rows from ``row`` on."""
        number, planned = self._pending[-1]
        stop = row + tensor.size(0)
        actual = (name, tensor.dtype, tuple(tensor.shape[1:]), row)
        assert actual == (planned.name, planned.dtype, planned.shape[1:], self._next_row), (actual, planned)
        if number != self._current:
            self._end_shard()
            self._begin_shard(number)
        self._file.write(memoryview(tensor.contiguous().view(torch.uint8).numpy().reshape(-1)))
        self._next_row = stop
        if stop >= planned.shape[0]:
            assert stop == planned.shape[0], (planned, stop)
            self._pending.pop()
            self._next_row = 0

    def finish(self) -> None:
        """Close the last shard and write index and digests."""
        assert not self._pending, self._pending[-1]
        self._end_shard()
        if len(self._shards) > 1:
            weight_map = {tensor.name: self._name(n) for n, shard in enumerate(self._shards) for tensor in shard}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        lines = [f"{digest}  {name}\n" for name, digest in sorted(self._digests.items())]
        (self._directory / DIGESTS_NAME).write_text("".join(lines), encoding="utf-8")

    def close(self) -> None:
        """Close the file of an unfinished checkpoint."""
        if self._file is not None:
            self._file.close()

    def _name(self, number: int) -> str:
        count = len(self._shards)
        return SINGLE_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def _begin_shard(self, number: int) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in self._shards[number]:
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.num_bytes],
            }
            position += tensor.num_bytes
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % 8)
        self._file = HashedFile(self._directory / self._name(number))
        self._current = number
        self._file.write(len(content).to_bytes(8, "little") + content)

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._digests[self._name(self._current)] = self._file.digest.hexdigest()
            self._file = None
