"""Writes and reads Megatron distributed checkpoints (``torch_dist``) tensor by tensor, without building a model.

Megatron saves global tensors (``global_tensors.py``) in chunks; each chunk records its box within the global tensor.
Global tensors do not depend on the layout that wrote them, only their chunks do; so a checkpoint written here loads at
any layout, and one written at any layout can be read.

Files: ``__<n>_0.distcp`` (chunks, each a ``torch.save`` record), ``.metadata`` (file and offset of each chunk; a
pickle, read with an unpickler that allows only the few classes in it), ``metadata.json``, ``integrity.json`` (SHA-256
of each file), and this project's ``model_spec.json`` and ``trainer_state.json``. Optimizer state is skipped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.conversion.files import FileSlice, HashedFile
from megatron_s2d.conversion.global_tensors import Box, Piece, boxes, pieces
from megatron_s2d.errors import UserError
from megatron_s2d.models.hf_checkpoint import verify_digests
from megatron_s2d.models.shards import WeightSource, read_shard
from megatron_s2d.parallel.manifest import MANIFEST_NAME, check_manifest, read_json_object
from megatron_s2d.parallel.safe_load import read_metadata

_COMMON_KEY = "common_state/shard_0_1"
SPEC_NAME = "model_spec.json"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Part of a parameter: its index in ``boxes``, the box, and a contiguous tensor with separate storage."""

    piece: Piece
    number: int
    box: Box
    tensor: torch.Tensor


def read_chunks(piece: Piece, spec: ModelSpec, source: WeightSource, tp_size: int) -> Iterator[Chunk]:
    """Yield the chunks of a parameter, read from its Hugging Face tensors; contiguous chunks are read separately."""
    entry, half = piece.entry, piece.shape[0] // 2
    full = source.read(entry.hf_names[0]) if entry.parallelism == "row_parallel" else None
    for number, (offset, size) in enumerate(boxes(piece, tp_size)):
        if full is not None:
            tensor = full.narrow(1, offset[1], size[1])
        elif entry.parallelism == "gate_up_column_parallel":
            name, row = entry.hf_names[offset[0] // half], offset[0] % half
            tensor = source.read(name, 0, row, row + size[0])
        else:
            tensor = read_shard(entry, spec, source, number, tp_size)
        if tensor.nbytes < tensor.untyped_storage().nbytes():
            # torch.save stores a view with all of its storage.
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        yield Chunk(piece, number, (offset, size), tensor.contiguous())


class MegatronWriter:
    """Writes a checkpoint into a directory, one parameter at a time; it is not loadable before ``finish``."""

    def __init__(self, directory: Path, spec: ModelSpec, parallel: ParallelConfig):
        self._directory = directory
        self._spec = spec
        self._parallel = parallel
        self._files: dict[str, HashedFile] = {}
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._digests: dict[str, str] = {}

    def write(self, chunk: Chunk) -> None:
        """Store a chunk; the chunks of one parameter must come in the order of ``boxes``."""
        piece, tensor = chunk.piece, chunk.tensor
        offset, size = chunk.box
        assert tuple(tensor.shape) == size, (piece, tensor.shape)
        entry = self._entries.setdefault(
            piece.key,
            TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(piece.global_shape), chunks=[]),
        )
        if entry.properties.dtype != tensor.dtype:
            raise UserError(
                f"{', '.join(piece.entry.hf_names)}: dtype {tensor.dtype}, but other layers have "
                f"{entry.properties.dtype}; convert the checkpoint to one dtype first"
            )
        ones = (1,) * len(piece.leading)
        location = ChunkStorageMetadata(torch.Size((*piece.leading, *offset)), torch.Size((*ones, *size)))
        entry.chunks.append(location)
        self._append(
            self._file_name(piece, chunk.number),
            MetadataIndex(piece.key, location.offsets),
            tensor.view(location.sizes),
        )

    def _file_name(self, piece: Piece, number: int) -> str:
        """Return the file that the pipeline and tensor (or expert) rank of a training run would write."""
        parallel, spec = self._parallel, self._spec
        pp_rank = 0
        if piece.leading:
            pp_rank = piece.leading[0] * parallel.pipeline_model_parallel_size // spec.num_layers
        elif not piece.key.startswith("model.embedding"):
            pp_rank = parallel.pipeline_model_parallel_size - 1
        writers = max(parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size)
        if piece.entry.parallelism == "gate_up_column_parallel":
            number %= parallel.tensor_model_parallel_size
        if piece.entry.expert is not None:
            number = piece.entry.expert * parallel.expert_model_parallel_size // spec.num_experts
        return f"__{pp_rank * writers + number}_0.distcp"

    def _append(self, name: str, index: MetadataIndex, record: Any) -> None:
        if name not in self._files:
            self._files[name] = HashedFile(self._directory / name)
        file = self._files[name]
        start = file.length
        torch.save(record, file)
        self._storage[index] = _StorageInfo(name, start, file.length - start)

    def finish(self) -> None:
        """Write metadata, digests and model spec, which make the checkpoint loadable."""
        self._entries[_COMMON_KEY] = BytesStorageMetadata()
        self._append("__0_0.distcp", MetadataIndex(_COMMON_KEY), [{"content_metadata": {}}])
        for name, file in self._files.items():
            file.close()
            self._digests[name] = file.digest.hexdigest()
        small = {
            ".metadata": pickle.dumps(Metadata(self._entries, storage_data=self._storage)),
            "metadata.json": json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode(),
        }
        for name, content in small.items():
            (self._directory / name).write_bytes(content)
            self._digests[name] = hashlib.sha256(content).hexdigest()
        documents = {SPEC_NAME: self._spec.to_dict(), "trainer_state.json": {"step": 0, "updates": 0}}
        for name, document in documents.items():
            self._digests[name] = self._write_json(name, document)
        self._write_json(MANIFEST_NAME, {"algorithm": "sha256", "files": dict(sorted(self._digests.items()))})

    def _write_json(self, name: str, document: dict[str, Any]) -> str:
        """Write a file and return its SHA-256."""
        content = (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
        (self._directory / name).write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def close(self) -> None:
        """Close the files of an unfinished checkpoint."""
        for file in self._files.values():
            file.close()


class MegatronReader:
    """Reads the model parameters of a checkpoint of any layout, written by this module or by a training run."""

    def __init__(self, directory: str | Path):
        """Open a checkpoint; ``UserError`` for another directory and for a missing, extra or misshapen parameter."""
        self.directory = Path(directory)
        if not (self.directory / SPEC_NAME).is_file():
            hint = _hint(self.directory)
            raise UserError(f"{self.directory}: not a Megatron checkpoint of this project (no {SPEC_NAME}){hint}")
        self.spec = ModelSpec.from_dict(read_json_object(self.directory, SPEC_NAME))
        self._digests = check_manifest(self.directory)
        # Before the file is parsed.
        verify_digests({self.directory / ".metadata": self._digests[".metadata"]})
        metadata = read_metadata(self.directory)
        self._storage = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        self.entries: dict[str, TensorStorageMetadata] = {
            key: entry for key, entry in metadata.state_dict_metadata.items() if key.startswith("model.")
        }
        self.has_optimizer_state = any(key.startswith("optimizer.") for key in metadata.state_dict_metadata)
        self._chunks: dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]] = {}
        self.pieces = list(pieces(self.spec))
        self._check_pieces()

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of the parameters."""
        return {entry.properties.dtype for entry in self.entries.values()}

    @property
    def num_files_bytes(self) -> int:
        """Bytes of all files that have a digest."""
        return sum((self.directory / name).stat().st_size for name in self._digests)

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of all files; equal for equal checkpoints."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self._digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def layout(self) -> dict[str, int]:
        """Return the layout that wrote the checkpoint.

        Derived from the chunks of the attention's output projection, and from the number of ranks that wrote its layers
        and the experts of one layer.
        """
        key = "model.decoder.layers.self_attention.linear_proj.weight"
        chunks = [self._chunks[key, (layer,)] for layer in range(self.spec.num_layers)]
        sizes = {
            "tensor_model_parallel_size": len(chunks[0]),
            "pipeline_model_parallel_size": len({self._writer(key, part[0]) for part in chunks}),
        }
        if self.spec.num_experts:
            key = "model.decoder.layers.mlp.experts.experts.linear_fc2.weight"
            chunks = [self._chunks[key, (0, expert)] for expert in range(self.spec.num_experts)]
            sizes["expert_model_parallel_size"] = len({self._writer(key, part[0]) for part in chunks})
        return sizes

    def _writer(self, key: str, chunk: ChunkStorageMetadata) -> str:
        """Return the rank that wrote a chunk, the first number of the file name."""
        return self._storage[key, tuple(chunk.offsets)].relative_path.split("_")[2]

    def verify_digests(self, progress: Callable[[int], None] = lambda count: None) -> None:
        """Hash every file; a ``UserError`` names one that is missing, truncated or corrupted."""
        verify_digests({self.directory / name: digest for name, digest in self._digests.items()}, progress)

    def read(self, piece: Piece) -> torch.Tensor:
        """Return one full parameter, joined from its chunks."""
        chunks = self._chunks[piece.key, piece.leading]
        if len(chunks) == 1:
            return self._read_chunk(piece, chunks[0])
        parameter = torch.empty(piece.shape, dtype=self.entries[piece.key].properties.dtype)
        count = len(piece.leading)
        for chunk in chunks:
            box = zip(chunk.offsets[count:], chunk.sizes[count:], strict=True)
            parameter[tuple(slice(start, start + size) for start, size in box)] = self._read_chunk(piece, chunk)
        return parameter

    def is_split_by_rows(self, piece: Piece) -> bool:
        """Whether every chunk consists of complete rows of one Hugging Face tensor."""
        height = piece.shape[0] // len(piece.entry.hf_names)
        count = len(piece.leading)
        return all(
            tuple(chunk.sizes[count + 1 :]) == piece.shape[1:]
            and chunk.offsets[count] % height + chunk.sizes[count] <= height
            for chunk in self._chunks[piece.key, piece.leading]
        )

    def read_rows(self, piece: Piece) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yield the chunks of a parameter that is split by rows: name of the Hugging Face tensor, first row, rows."""
        names, count = piece.entry.hf_names, len(piece.leading)
        height = piece.shape[0] // len(names)
        limit = self.spec.vocab_size if piece.entry.parallelism == "vocab_parallel" else height
        for chunk in sorted(self._chunks[piece.key, piece.leading], key=lambda chunk: tuple(chunk.offsets)):
            tensor, row = chunk.offsets[count] // height, chunk.offsets[count] % height
            if row < limit:
                yield names[tensor], row, self._read_chunk(piece, chunk)[: limit - row]

    def _read_chunk(self, piece: Piece, chunk: ChunkStorageMetadata) -> torch.Tensor:
        info = self._storage[piece.key, tuple(chunk.offsets)]
        path = self.directory / info.relative_path
        try:
            with FileSlice(path, info.offset, info.length) as record:
                tensor = torch.load(record, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{path}: {piece.key} cannot be read ({str(error).splitlines()[0]})") from None
        dtype = self.entries[piece.key].properties.dtype
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.shape != torch.Size(chunk.sizes):
            raise UserError(f"{path}: a chunk of {piece.key} does not match its metadata")
        return tensor.view(chunk.sizes[len(piece.leading) :])

    def _check_pieces(self) -> None:
        for key, entry in self.entries.items():
            for chunk in entry.chunks:
                info = self._storage.get((key, tuple(chunk.offsets)))
                if info is None or info.relative_path not in self._digests:
                    raise UserError(f"{self.directory}: a chunk of {key} is missing; write the checkpoint again")
        unknown = set(self.entries)
        for piece in self.pieces:
            entry = self.entries.get(piece.key)
            if entry is None:
                raise UserError(f"{self.directory}: parameter {piece.key} is missing")
            if not _same_shape(tuple(entry.size), piece, self.spec):
                raise UserError(
                    f"{self.directory}: {piece.key} is {tuple(entry.size)}, the model needs {piece.global_shape}"
                )
            unknown.discard(piece.key)
        if unknown:
            raise UserError(f"{self.directory}: parameter {min(unknown)} does not belong to the model")
        self._index_chunks()

    def _index_chunks(self) -> None:
        """Group chunks by parameter, and check that those of each parameter cover it without overlap."""
        leading = {piece.key: len(piece.leading) for piece in self.pieces}
        for key, entry in self.entries.items():
            for chunk in entry.chunks:
                count = leading[key]
                if any(size != 1 for size in chunk.sizes[:count]):
                    raise UserError(f"{self.directory}: {key} is stored in blocks of several layers")
                self._chunks.setdefault((key, tuple(chunk.offsets[:count])), []).append(chunk)
        self.pieces = [
            dataclasses.replace(piece, shape=tuple(self.entries[piece.key].size[len(piece.leading) :]))
            for piece in self.pieces
        ]
        for piece in self.pieces:
            chunks = self._chunks.get((piece.key, piece.leading), [])
            if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(piece.shape) or _overlap(chunks):
                raise UserError(
                    f"{self.directory}: the chunks of {piece.key} {piece.leading} do not cover it exactly once"
                )


def _hint(directory: Path) -> str:
    """Return a hint at the newest checkpoint below ``directory``, if any."""
    checkpoints = sorted(path.parent for depth in ("*", "*/*") for path in directory.glob(f"{depth}/{SPEC_NAME}"))
    checkpoints = [path for path in checkpoints if not path.name.endswith(".partial")]
    return f"; did you mean {checkpoints[-1]}?" if checkpoints else ""


def _overlap(chunks: list[ChunkStorageMetadata]) -> bool:
    def intersects(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
        sides = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
        return all(x < y + m and y < x + n for x, n, y, m in sides)

    return any(intersects(a, b) for a, b in itertools.combinations(chunks, 2))


def _same_shape(stored: tuple[int, ...], piece: Piece, spec: ModelSpec) -> bool:
    """Whether a stored shape fits; the vocabulary may be padded for another tensor-parallel size."""
    if piece.entry.parallelism != "vocab_parallel":
        return stored == piece.global_shape
    return len(stored) == 2 and stored[0] >= spec.vocab_size and stored[1:] == piece.global_shape[1:]
