"""Load distributed checkpoints without running code that is pickled in them.

A checkpoint is untrusted input. PyTorch's reader unpickles ``.metadata`` and every record of bytes in a shard, which
runs any code that the file names, and a digest in the same directory protects nothing. Inside ``no_pickled_code``,
``.metadata`` is read by an unpickler that builds checkpoint metadata only, and records by
``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import types
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from megatron_s2d.errors import UserError

_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes that a ``.metadata`` file consists of, and raises ``UnpicklingError`` for every other."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _METADATA_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in checkpoint metadata")
        return super().find_class(module, name)


def load_metadata(file: IO[bytes]) -> Metadata:
    """Return the metadata of a distributed checkpoint; ``UnpicklingError`` for anything else pickled in ``file``."""
    metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise pickle.UnpicklingError("not checkpoint metadata")
    return metadata


def read_metadata(directory: Path) -> Metadata:
    """Return the metadata of the checkpoint in ``directory``; ``UserError`` if it is missing or not one."""
    path = directory / ".metadata"
    try:
        with open(path, "rb") as file:
            return load_metadata(file)
    except FileNotFoundError:
        raise UserError(f"{directory}: not a checkpoint (no .metadata)") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path}: refused ({error})") from None


@contextlib.contextmanager
def no_pickled_code() -> Iterator[None]:
    """Within the block, PyTorch's checkpoint reader builds only metadata, tensors and plain values."""
    planner = default_planner.DefaultLoadPlanner
    original_pickle, original_load_bytes = filesystem.pickle, planner.load_bytes  # type: ignore[attr-defined]
    filesystem.pickle = types.SimpleNamespace(load=load_metadata, dump=pickle.dump)  # type: ignore[attr-defined]
    planner.load_bytes = _load_bytes  # type: ignore[method-assign]
    try:
        yield
    finally:
        filesystem.pickle, planner.load_bytes = original_pickle, original_load_bytes  # type: ignore[attr-defined,method-assign]


def _load_bytes(self: default_planner.DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """``DefaultLoadPlanner.load_bytes`` of torch 2.11 with ``weights_only=True``."""
    content, name = torch.load(value, weights_only=True), read_item.dest_index.fqn
    if self.flatten_state_dict:
        default_planner.set_element(self.original_state_dict, self.mappings[name], content)
    else:
        self.state_dict[name] = content
