"""Reader of Hugging Face directories: validates headers when opened, then reads tensors slice by slice.

Opening a checkpoint reads only the headers, and raises ``UserError`` if a file is truncated, index and shards disagree,
or the tensors are not exactly those of the model. ``verify_digests`` checks file contents against the SHA-256 digests
that a directory records. Beside safetensors, pickled checkpoints (``.bin``) are read as tensors only, without running
what they pickle. Weights in FP8 with a scale for each block are dequantised when they are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.artifacts.files import read_json_object
from megatron_s2d.config.hf_config import CONFIG_NAME, quantized_block, spec_from_directory
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.errors import UserError
from megatron_s2d.models.dequantize import dequantize_blocks
from megatron_s2d.models.families import hf_tensor_shapes
from megatron_s2d.models.fused_experts import split_experts
from megatron_s2d.models.tensor_files import BLOCK_BYTES, TensorInfo, read_bytes, read_rows

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLED_NAME = "pytorch_model.bin"
DIGESTS_NAME = "weights.sha256"

EMBEDDING_NAME = "model.embed_tokens.weight"
OUTPUT_NAME = "lm_head.weight"

DTYPES: dict[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Weight dtypes of safetensors that are read and written."""

_QUANTIZED = {"F8_E4M3": torch.float8_e4m3fn}
_PACKED = {"U8": torch.uint8}  # MXFP4: two values, or a scale
_SCALE_SUFFIX = "_scale_inv"

_LARGEST_HEADER = 100 * 2**20  # the format's own limit
_BUFFERS = re.compile(r"\brotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)$")


class HfCheckpoint:
    """The weights of a Hugging Face directory; a ``WeightSource`` without open files or tensors in memory."""

    def __init__(self, directory: str | Path):
        """Read and validate the headers of ``directory``.

        Raises ``UserError`` for a missing, truncated or inconsistent file, and for missing, extra or wrongly shaped
        tensors, naming the first. An output layer stored beside the embedding that it is tied to must equal it, and is
        left out.
        """
        self.directory = Path(directory)
        self.spec: ModelSpec = spec_from_directory(self.directory)
        self.tensors: dict[str, TensorInfo] = {}
        self.shards, index = _list_shards(self.directory)
        for shard in self.shards:
            tensors = read_header(shard) if shard.suffix == ".safetensors" else read_pickled(shard)
            for name, info in tensors.items():
                if name in self.tensors:
                    raise UserError(f"{self.directory}: {name} is in {self.tensors[name].path.name} and {shard.name}")
                self.tensors[name] = info
        self._check_index(index.get("weight_map"))
        self._drop_buffers()
        if self.spec.parts.fused_experts:
            dtype = DTYPES[quantized_block(self.directory / CONFIG_NAME)[1]]
            self.tensors = split_experts(self.tensors, self.spec, dtype, self.directory)
        self._join_scales()
        self._drop_tied_output()
        self._check_names_and_shapes()

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.num_bytes_of(name) for name in self.tensors)

    def num_bytes_of(self, name: str) -> int:
        """Bytes of one tensor."""
        return self.tensors[name].num_bytes

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of the tensors."""
        return {info.dtype for info in self.tensors.values()}

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See ``WeightSource.read``; in the file's dtype. Slices along dimension 0 read only their own bytes."""
        info = self.tensors[name]
        stop = info.shape[dim] if stop is None else stop
        if info.compute is not None:
            return info.compute().narrow(dim, start, stop - start)
        if info.pickled is not None:
            return info.pickled.narrow(dim, start, stop - start).clone(memory_format=torch.contiguous_format)
        if info.scales is not None:
            return _read_quantized(info, dim, start, stop)
        if dim == 0:
            return read_rows(info, start, stop)
        tensor = read_bytes(info.path, info.start, info.num_bytes).view(info.dtype).view(info.shape)
        return tensor.narrow(dim, start, stop - start)

    def verify_digests(self, progress: Callable[[int], None] = lambda count: None) -> int:
        """Hash every file whose SHA-256 the directory records, as exported checkpoints and the hub's download cache do.

        Returns the number of files checked; raises ``UserError`` for one that differs. ``progress`` gets byte counts.
        """
        exported = _exported_digests(self.directory)
        digests = {shard: exported.get(shard.name) or _hub_digest(self.directory, shard.name) for shard in self.shards}
        expected = {path: digest for path, digest in digests.items() if digest is not None}
        verify_digests(expected, progress)
        return len(expected)

    def file_digests(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, str]:
        """Return the SHA-256 of every weight file by name; reads them all."""
        return {shard.name: _sha256(shard, progress) for shard in self.shards}

    def _check_index(self, weight_map: dict[str, str] | None) -> None:
        if weight_map is None:
            return
        for name, shard in weight_map.items():
            if name not in self.tensors or self.tensors[name].path.name != shard:
                raise UserError(f"{self.directory}: the index places {name} in {shard}, but it is not there")
        for name, info in self.tensors.items():
            if name not in weight_map:
                raise UserError(f"{self.directory}: {name} in {info.path.name} is not listed in the index")

    def _drop_buffers(self) -> None:
        """Drop what older versions of transformers saved beside the weights, and what it computes itself today."""
        self.tensors = {name: info for name, info in self.tensors.items() if not _BUFFERS.search(name)}

    def _join_scales(self) -> None:
        """Give FP8 matrices their scales, which are no tensors of the model."""
        block, dtype = quantized_block(self.directory / CONFIG_NAME)
        for name, info in list(self.tensors.items()):
            if info.dtype not in _QUANTIZED.values():
                continue
            scales = self.tensors.pop(name + _SCALE_SUFFIX, None)
            if block is None or scales is None:
                missing = "quantization_config" if block is None else name + _SCALE_SUFFIX
                raise UserError(f"{self.directory}: {name} is in FP8, and there is no {missing}")
            expected = tuple(ceil_div(size, of_block) for size, of_block in zip(info.shape, block, strict=False))
            if len(info.shape) != 2 or scales.shape != expected or scales.dtype not in DTYPES.values():
                raise UserError(
                    f"{self.directory}: {name}{_SCALE_SUFFIX} is {scales.shape}, the blocks of {name} need {expected}"
                )
            self.tensors[name] = dataclasses.replace(info, dtype=DTYPES[dtype], scales=scales, block=block)

    def _drop_tied_output(self) -> None:
        """Drop the output layer of a tied model that stores the embedding twice (as Qwen3 0.6B and 1.7B do)."""
        output, embedding = self.tensors.get(OUTPUT_NAME), self.tensors.get(EMBEDDING_NAME)
        if not self.spec.tie_word_embeddings or output is None or embedding is None:
            return
        same = (output.dtype, output.shape) == (embedding.dtype, embedding.shape)
        if not same or not self._same_values(OUTPUT_NAME, EMBEDDING_NAME):
            raise UserError(
                f"{self.directory}: {OUTPUT_NAME} differs from {EMBEDDING_NAME}, but config.json ties them "
                "(tie_word_embeddings); correct the one or the other"
            )
        del self.tensors[OUTPUT_NAME]

    def _same_values(self, left: str, right: str) -> bool:
        """Return whether two tensors of one size and dtype are equal bit by bit, compared some rows at a time."""
        info = self.tensors[left]
        rows = max(1, BLOCK_BYTES * info.shape[0] // max(info.num_bytes, 1))
        for start in range(0, info.shape[0], rows):
            stop = min(start + rows, info.shape[0])
            pair = [self.read(name, 0, start, stop).view(torch.uint8) for name in (left, right)]
            if not torch.equal(*pair):
                return False
        return True

    def _check_names_and_shapes(self) -> None:
        expected = dict(hf_tensor_shapes(self.spec))
        for name, shape in expected.items():
            if name not in self.tensors:
                raise UserError(f"{self.directory}: tensor {name} is missing")
            if self.tensors[name].shape != shape:
                raise UserError(f"{self.directory}: {name} is {self.tensors[name].shape}, the model needs {shape}")
            if self.tensors[name].dtype in _PACKED.values():
                raise UserError(f"{self.directory}: {name} has dtype U8; supported are {', '.join(DTYPES)}")
        for name in self.tensors:
            if name not in expected:
                raise UserError(f"{self.directory}: tensor {name} does not belong to a {self.spec.family} model")


def _read_quantized(info: TensorInfo, dim: int, start: int, stop: int) -> torch.Tensor:
    """Return a slice of a matrix in FP8, dequantised."""
    assert info.scales is not None
    rows, columns = info.shape
    first, last = (start, stop) if dim == 0 else (0, rows)
    content = read_bytes(info.path, info.start + first * columns, (last - first) * columns)
    scales = read_bytes(info.scales.path, info.scales.start, info.scales.num_bytes)
    scales = scales.view(info.scales.dtype).view(info.scales.shape)
    quantized = content.view(torch.float8_e4m3fn).view(last - first, columns)
    tensor = dequantize_blocks(quantized, scales, info.block, first, info.dtype)
    return tensor if dim == 0 else tensor.narrow(1, start, stop - start)


def verify_digests(expected: dict[Path, str], progress: Callable[[int], None] = lambda count: None) -> None:
    """Raise ``UserError`` for a file whose SHA-256 (hexadecimal) is not the expected one; hashes several at a time."""

    def verify(path: Path) -> None:
        if _sha256(path, progress) != expected[path]:
            raise UserError(f"{path}: corrupted (its SHA-256 is not the recorded one); fetch or write the file again")

    pool = ThreadPoolExecutor(max_workers=4)
    try:
        list(pool.map(verify, expected))
    finally:
        pool.shutdown(cancel_futures=True)


def _sha256(path: Path, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                progress(len(block))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file; ``UserError`` if it is truncated, padded or has a damaged header."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise UserError(f"{path}: truncated or not a safetensors file")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged header; fetch the file again") from None
    try:
        return _check_header(path, header, data_start=8 + length, size=size)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: damaged header; fetch the file again") from None


def _check_header(path: Path, header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtypes = DTYPES | _QUANTIZED | _PACKED
        if entry["dtype"] not in dtypes:
            raise UserError(f"{path}: {name} has dtype {entry['dtype']}; supported are {', '.join(dtypes)}")
        dtype, shape = dtypes[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: {name} has {end - begin} bytes, which is not its shape {shape}")
        tensors[name] = TensorInfo(path, dtype, shape, data_start + begin, data_start + end)
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start != position:
            raise UserError(f"{path}: damaged header ({name} does not follow its neighbour); fetch the file again")
        position = info.stop
    if position != size:
        raise UserError(f"{path}: has {size} bytes instead of {position}: truncated or damaged; fetch the file again")
    return tensors


def read_pickled(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one ``.bin`` file, mapped from it; ``UserError`` if it pickles anything but tensors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        if "_use_new_zipfile_serialization" in str(error):
            raise UserError(f"{path}: written by PyTorch before 1.6; load it there and save it again") from None
        raise UserError(f"{path}: cannot be read as tensors alone ({str(error).splitlines()[0]})") from None
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in content.items() if isinstance(content, dict) else [("", None)]:
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES.values():
            raise UserError(f"{path}: {name!r} is not a tensor of dtype {', '.join(DTYPES)}")
        tensors[name] = TensorInfo(path, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes, pickled=tensor)
    return tensors


def _list_shards(directory: Path) -> tuple[list[Path], dict[str, Any]]:
    """Return the weight files of a directory and its index (empty without an index file); safetensors if both exist."""
    if any((directory / name).exists() for name in (INDEX_NAME, SINGLE_NAME)):
        return _list_shards_of(directory, INDEX_NAME, SINGLE_NAME)
    return _list_shards_of(directory, PICKLED_INDEX_NAME, PICKLED_NAME)


def _list_shards_of(directory: Path, index_name: str, single_name: str) -> tuple[list[Path], dict[str, Any]]:
    index_path = directory / index_name
    if index_path.exists():
        index = read_json_object(index_path)
        try:
            names = sorted(set(index["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index_path}: damaged ({type(error).__name__}: {error})") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index_path}: names a file outside the directory ({name!r})")
            if not (directory / name).exists():
                raise UserError(f"{directory}: {name} is listed in {index_name}, but missing; fetch it again")
            if Path(name).suffix != Path(single_name).suffix:
                raise UserError(f"{index_path}: names {name}, which is not a {Path(single_name).suffix} file")
        return [directory / name for name in names], index
    if (directory / single_name).exists():
        return [directory / single_name], {}
    raise UserError(f"{directory}: no weights: neither {SINGLE_NAME} or {INDEX_NAME} nor {PICKLED_NAME} or its index")


def _exported_digests(directory: Path) -> dict[str, str]:
    """Return digests by file name from ``weights.sha256`` (``sha256sum`` format), which ``conversion/`` writes."""
    path = directory / DIGESTS_NAME
    if not path.exists():
        return {}
    lines = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any(len(parts) != 2 or not re.fullmatch(r"[0-9a-f]{64}", parts[0]) for parts in lines):
        raise UserError(f"{path}: damaged; fetch it again")
    return {name: digest for digest, name in lines}


def _hub_digest(directory: Path, name: str) -> str | None:
    """Return the SHA-256 that the hub's client recorded for a file.

    In its cache a file is a link to a blob that is named by the digest. ``hf download`` to a folder writes notes beside
    (line 2: the etag, the digest for weights).
    """
    if (directory / name).is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob := (directory / name).resolve().name):
        return blob
    note = directory / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    lines = note.read_text(encoding="utf-8", errors="replace").splitlines() if note.is_file() else []
    return lines[1] if len(lines) > 1 and re.fullmatch(r"[0-9a-f]{64}", lines[1]) else None
