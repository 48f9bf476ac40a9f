"""Megatron distributed checkpoints (``torch_dist``), written and read tensor by tensor, without building a model.

Megatron saves global tensors: parameters of equal layers are stacked along a first dimension, experts along a second,
and each stored chunk says which box of the global tensor it is. A global tensor does not depend on the layout that
wrote it, only the chunks do; so a checkpoint written here loads at any layout, and one written at any layout is read.

Files: ``__<n>_0.distcp`` (chunks, each a ``torch.save`` record), ``.metadata`` (where each chunk lies; a pickle, read
with an unpickler that knows only the few classes in it), ``metadata.json``, ``integrity.json`` (SHA-256 of each file),
and this project's ``model_spec.json`` and ``position.json``. Optimizer state is skipped when reading.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
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

from megatron_s2d.artifacts import read_json
from megatron_s2d.config.base import UserError
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.models.families import Entry, global_entries, layer_entries, padded_vocab_size
from megatron_s2d.models.hf_checkpoint import read_bytes, verify_digest

_COMMON_KEY = "common_state/shard_0_1"
_INTEGRITY_NAME = "integrity.json"
SPEC_NAME = "model_spec.json"

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size within a global tensor."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One parameter of one layer (or outside the layers) as a slice of a global tensor."""

    entry: Entry
    key: str
    leading: tuple[int, ...]
    """Index of the layer, and of the expert, in the first dimensions of the global tensor."""
    leading_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the parameter itself, undivided."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        return (*self.leading_shape, *self.shape)


def pieces(spec: ModelSpec) -> Iterator[Piece]:
    """Every parameter of the model in the order of a Hugging Face checkpoint; a tied output layer is not stored."""
    (embedding,) = global_entries(spec, "first")
    vocabulary = (padded_vocab_size(spec.vocab_size, 1), spec.hidden_size)
    yield Piece(embedding, "model." + embedding.parameter, (), (), vocabulary)
    for layer in range(spec.num_layers):
        for entry in layer_entries(spec, layer):
            leading, leading_shape = (layer,), (spec.num_layers,)
            if entry.expert is not None:
                leading, leading_shape = (layer, entry.expert), (spec.num_layers, spec.num_experts)
            yield Piece(entry, _layer_key(spec, entry), leading, leading_shape, _layer_shape(spec, entry))
    norm, output = global_entries(spec, "last")
    yield Piece(norm, "model." + norm.parameter, (), (), (spec.hidden_size,))
    if not spec.tie_word_embeddings:
        yield Piece(output, "model." + output.parameter, (), (), vocabulary)


def _layer_key(spec: ModelSpec, entry: Entry) -> str:
    name = entry.parameter.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    if not spec.num_experts:
        name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    if entry.expert is not None:
        name = name.replace(f"local_experts.{entry.expert}.", "experts.")
    return "model.decoder.layers." + name


def _layer_shape(spec: ModelSpec, entry: Entry) -> tuple[int, ...]:
    ffn = spec.ffn_hidden_size if entry.expert is None else spec.moe_ffn_hidden_size
    match entry.rule:
        case "qkv":
            return (spec.query_size + 2 * spec.kv_size, spec.hidden_size)
        case "gate_up":
            return (2 * ffn, spec.hidden_size)
        case "columns":
            return (spec.hidden_size, spec.query_size if "linear_proj" in entry.parameter else ffn)
    if entry.parameter == "mlp.router.weight":
        return (spec.num_experts, spec.hidden_size)
    return (spec.head_dim if entry.parameter.startswith("self_attention.") else spec.hidden_size,)


def boxes(piece: Piece, tensor_size: int) -> list[Box]:
    """How ``tensor_size`` ranks cut a parameter, within the parameter itself; experts are kept whole."""
    rule, parts = piece.entry.rule, tensor_size if piece.entry.expert is None else 1
    if rule == "replicated":
        return [((0,) * len(piece.shape), piece.shape)]
    dim = 1 if rule == "columns" else 0
    # Gate and up projection are two halves, each cut by itself.
    parts *= 2 if rule == "gate_up" else 1
    share = piece.shape[dim] // parts
    size = tuple(share if axis == dim else length for axis, length in enumerate(piece.shape))
    return [(tuple(part * share if axis == dim else 0 for axis in range(2)), size) for part in range(parts)]


class MegatronWriter:
    """Writes a checkpoint into a directory, one parameter at a time; nothing loads before ``finish``."""

    def __init__(self, directory: Path, spec: ModelSpec, parallel: ParallelConfig):
        self._directory = directory
        self._spec = spec
        self._parallel = parallel
        self._files: dict[str, tuple[io.BufferedWriter, Any]] = {}
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._digests: dict[str, str] = {}

    def write(self, piece: Piece, parameter: torch.Tensor) -> None:
        """Store one undivided parameter in the chunks of the layout."""
        assert parameter.shape == piece.shape, (piece, parameter.shape)
        entry = self._entries.setdefault(
            piece.key,
            TensorStorageMetadata(
                TensorProperties(dtype=parameter.dtype), torch.Size(piece.global_shape), chunks=[]
            ),
        )
        if entry.properties.dtype != parameter.dtype:
            raise UserError(
                f"{', '.join(piece.entry.hf_names)}: dtype {parameter.dtype}, but other layers have "
                f"{entry.properties.dtype}; convert the checkpoint to one dtype first"
            )
        for number, (offset, size) in enumerate(boxes(piece, self._parallel.tensor_model_parallel_size)):
            chunk = parameter[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))]
            # clone(): a view would be saved with all of its storage.
            chunk = chunk.contiguous().clone() if chunk.numel() < parameter.numel() else chunk.contiguous()
            ones = (1,) * len(piece.leading)
            where = ChunkStorageMetadata(torch.Size((*piece.leading, *offset)), torch.Size((*ones, *size)))
            entry.chunks.append(where)
            record = io.BytesIO()
            torch.save(chunk.view(*where.sizes), record)
            self._append(self._file_name(piece, number), MetadataIndex(piece.key, where.offsets), record)

    def _file_name(self, piece: Piece, number: int) -> str:
        """One file a pipeline stage and tensor rank, as if each rank had written its own."""
        parallel, spec = self._parallel, self._spec
        stage = 0
        if piece.leading:
            stage = piece.leading[0] * parallel.pipeline_model_parallel_size // spec.num_layers
        elif not piece.key.startswith("model.embedding"):
            stage = parallel.pipeline_model_parallel_size - 1
        writers = parallel.tensor_model_parallel_size
        if piece.entry.expert is not None:
            number = piece.entry.expert * parallel.expert_model_parallel_size // spec.num_experts
        return f"__{stage * writers + number % writers}_0.distcp"

    def _append(self, name: str, index: MetadataIndex, record: io.BytesIO) -> None:
        if name not in self._files:
            self._files[name] = (open(self._directory / name, "wb"), hashlib.sha256())
        file, digest = self._files[name]
        content = record.getbuffer()
        self._storage[index] = _StorageInfo(name, file.tell(), len(content))
        file.write(content)
        digest.update(content)

    def finish(self, notes: dict[str, Any]) -> None:
        """Write what makes the chunks a checkpoint; ``notes`` go into ``conversion.json``."""
        record = io.BytesIO()
        torch.save([{"content_metadata": {}}], record)
        self._entries[_COMMON_KEY] = BytesStorageMetadata()
        self._append("__0_0.distcp", MetadataIndex(_COMMON_KEY), record)
        for name, (file, digest) in self._files.items():
            file.close()
            self._digests[name] = digest.hexdigest()
        small = {
            ".metadata": pickle.dumps(Metadata(self._entries, storage_data=self._storage)),
            "metadata.json": json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode(),
        }
        for name, content in small.items():
            (self._directory / name).write_bytes(content)
            self._digests[name] = hashlib.sha256(content).hexdigest()
        documents = {
            SPEC_NAME: self._spec.to_dict(),
            "position.json": {"step": 0, "updates": 0},
            "conversion.json": notes,
            _INTEGRITY_NAME: {"algorithm": "sha256", "files": dict(sorted(self._digests.items()))},
        }
        for name, document in documents.items():
            (self._directory / name).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the files of a checkpoint that will not be finished."""
        for file, _ in self._files.values():
            file.close()


class MegatronReader:
    """The model parameters of a checkpoint written at any layout, by this module or by a training run."""

    def __init__(self, directory: str | Path):
        """Raises ``UserError`` for a directory that is no checkpoint, and for a missing, extra or misshapen parameter,
        naming it."""
        self.directory = Path(directory)
        if not (self.directory / SPEC_NAME).is_file():
            raise UserError(f"{self.directory}: not a Megatron checkpoint of this project (no {SPEC_NAME})")
        self.spec = ModelSpec.from_dict(read_json(self.directory / SPEC_NAME))
        self._digests = self._read_digests()
        # Before anything in it is looked at.
        verify_digest(self.directory / ".metadata", self._digests[".metadata"])
        metadata = _load_metadata(self.directory / ".metadata")
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

    def tensor_chunks(self) -> int:
        """In how many parts an attention projection is stored: the tensor-parallel size that wrote the checkpoint."""
        return len(self._chunks["model.decoder.layers.self_attention.linear_proj.weight", (0,)])

    def verify_digests(self, progress: Callable[[int], None] = lambda count: None) -> None:
        """Hash every file; a ``UserError`` names one that is missing, truncated or corrupted."""
        for name, digest in self._digests.items():
            verify_digest(self.directory / name, digest, progress)

    def read(self, piece: Piece) -> torch.Tensor:
        """One undivided parameter, put together from its chunks."""
        dtype = self.entries[piece.key].properties.dtype
        parameter = torch.empty(piece.global_shape[len(piece.leading) :], dtype=dtype)
        count = len(piece.leading)
        for chunk in self._chunks[piece.key, piece.leading]:
            info = self._storage[piece.key, tuple(chunk.offsets)]
            path = self.directory / info.relative_path
            record = io.BytesIO(read_bytes(path, info.offset, info.length).numpy().data)
            tensor = torch.load(record, weights_only=True)
            if tuple(tensor.shape) != tuple(chunk.sizes) or tensor.dtype != dtype:
                raise UserError(f"{path}: a chunk of {piece.key} is {tuple(tensor.shape)}, not {tuple(chunk.sizes)}")
            box = zip(chunk.offsets[count:], chunk.sizes[count:], strict=True)
            parameter[tuple(slice(start, start + size) for start, size in box)] = tensor.view(chunk.sizes[count:])
        return parameter

    def _read_digests(self) -> dict[str, str]:
        document = read_json(self.directory / _INTEGRITY_NAME)
        files = document.get("files") if isinstance(document, dict) else None
        if not isinstance(files, dict) or ".metadata" not in files or document.get("algorithm") != "sha256":
            raise UserError(f"{self.directory}/{_INTEGRITY_NAME}: damaged; write the checkpoint again")
        for name in files:
            if Path(name).name != name or not (self.directory / name).is_file():
                raise UserError(f"{self.directory}: {name} is missing; write or fetch the checkpoint again")
        return files

    def _check_pieces(self) -> None:
        for key, entry in self.entries.items():
            for chunk in entry.chunks:
                info = self._storage.get((key, tuple(chunk.offsets)))
                if info is None or info.relative_path not in self._digests:
                    raise UserError(f"{self.directory}: a part of {key} is missing; write the checkpoint again")
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
        """Chunks by parameter, after a check that those of each parameter cover it without overlap."""
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
                raise UserError(f"{self.directory}: the parts of {piece.key} {piece.leading} do not make a whole")


def _overlap(chunks: list[ChunkStorageMetadata]) -> bool:
    def meet(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
        sides = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
        return all(x < y + m and y < x + n for x, n, y, m in sides)

    return any(meet(a, b) for a, b in itertools.combinations(chunks, 2))


def _same_shape(found: tuple[int, ...], piece: Piece, spec: ModelSpec) -> bool:
    """Whether a stored shape fits; the vocabulary may be padded for another tensor-parallel size."""
    if piece.entry.rule != "vocabulary":
        return found == piece.global_shape
    return len(found) == 2 and found[0] >= spec.vocab_size and found[1:] == piece.global_shape[1:]


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes that a ``.metadata`` file consists of, and refuses every other."""

    _ALLOWED = {
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

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in checkpoint metadata")
        return super().find_class(module, name)


def _load_metadata(path: Path) -> Metadata:
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path}: refused ({error})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path}: refused (not checkpoint metadata)")
    return metadata
