"""Streaming conversion of checkpoints between Hugging Face and Megatron, comparison of two, and inspection of one.

One parameter of one layer is in memory at a time (the largest is usually the embedding), whatever the model's size.
Sources are checked before anything is written, and the result appears in one rename. To load weights into a running
model no conversion is needed: ``models.weights.import_weights`` with a ``models.hf_checkpoint.HfCheckpoint``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_s2d.artifacts.files import atomic_directory, json_digest, read_json_object
from megatron_s2d.config.hf_config import hf_config_from_spec, spec_from_hf_config
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.conversion.files import read_ahead
from megatron_s2d.conversion.global_tensors import pieces
from megatron_s2d.conversion.hf_writer import HfWriter, PlannedTensor
from megatron_s2d.conversion.megatron_format import SPEC_NAME, Chunk, MegatronReader, MegatronWriter, read_chunks
from megatron_s2d.conversion.progress import Report, silent
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import check_layout, hf_tensor_shapes
from megatron_s2d.models.fused_experts import ExpertJoiner
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.peft_files import PeftAdapter
from megatron_s2d.models.shards import join_shards

_GENERATION_NAME = "generation_config.json"

ASSETS = (
    _GENERATION_NAME,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that are copied with a Hugging Face checkpoint, beside weights and ``config.json``."""

_ASSETS_DIRECTORY = "hf"
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Converted:
    """Model of a converted checkpoint, and notes for the user on what could not be done."""

    spec: ModelSpec
    notes: tuple[str, ...] = ()


def hf_to_megatron(
    hf_directory: str | Path,
    megatron_directory: str | Path,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    report: Report = silent,
) -> Converted:
    """Write a Megatron checkpoint from a Hugging Face directory.

    It loads at every layout; the sizes choose the layout that its chunks are split for, so that a rank of that layout
    reads only its share. Dtypes are preserved. Raises ``UserError`` for a damaged or unsupported source, sizes that do
    not divide the model, an existing target, and a full disk; then no target is created.
    """
    source = HfCheckpoint(hf_directory)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        # Needed for a valid layout; they do not change the stored checkpoint.
        data_parallel_size=expert_model_parallel_size,
        sequence_parallel=tensor_model_parallel_size > 1,
    )
    check_layout(source.spec, parallel)
    for piece in pieces(source.spec):
        if len({source.tensors[name].dtype for name in piece.entry.hf_names}) > 1:
            raise UserError(f"{hf_directory}: {' and '.join(piece.entry.hf_names)} are fused, but differ in dtype")
    with report("checking", source.num_bytes) as advance:
        unchecked = len(source.shards) - source.verify_digests(advance)
    with atomic_directory(megatron_directory) as target:
        writer = MegatronWriter(target, source.spec, parallel)
        with contextlib.closing(writer), report("hf to megatron", source.num_bytes) as advance:
            with contextlib.closing(read_ahead(_chunks(source, parallel))) as chunks:
                for chunk in chunks:
                    writer.write(chunk)
                    advance(chunk.tensor.nbytes)
            _copy_files(("config.json", *ASSETS), source.directory, target / _ASSETS_DIRECTORY)
            writer.finish()
    if not unchecked:
        return Converted(source.spec)
    files = f"{unchecked} of {len(source.shards)} weight files"
    return Converted(source.spec, (f"{files} have no recorded SHA-256: only their sizes and headers were checked",))


def megatron_to_hf(
    megatron_directory: str | Path,
    hf_directory: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    assets: str | Path | None = None,
    report: Report = silent,
) -> Converted:
    """Write a Hugging Face directory from a Megatron checkpoint of any layout, converted or saved by a training run.

    Tokenizer and configuration files come from ``assets`` (a Hugging Face directory of the same model, or of its
    tokenizer), else from the files that ``hf_to_megatron`` stored. ``config.json`` and ``generation_config.json`` are
    generated if they are missing there; a tokenizer is not. Optimizer state is left out. Raises ``UserError`` as
    ``hf_to_megatron`` does.
    """
    source = MegatronReader(megatron_directory)
    asset_directory = Path(assets) if assets is not None else source.directory / _ASSETS_DIRECTORY
    if assets is not None and not asset_directory.is_dir():
        raise UserError(f"{assets}: no such directory")
    config = _config_document(source, asset_directory)
    with report("checking", source.num_files_bytes) as advance:
        source.verify_digests(advance)
    dtypes = {
        name: source.entries[piece.key].properties.dtype for piece in source.pieces for name in piece.entry.hf_names
    }
    plan = _plan(source.spec, dtypes)
    with atomic_directory(hf_directory) as target:
        writer = HfWriter(target, plan, max_shard_bytes)
        with contextlib.closing(writer), report("megatron to hf", writer.num_bytes) as advance:
            with contextlib.closing(read_ahead(_hf_tensors(source))) as tensors:
                joiner = ExpertJoiner(source.spec)
                for name, row, tensor in tensors:
                    for joined_name, joined in joiner.add(name, tensor):
                        writer.write(joined_name, joined, row)
                    advance(tensor.nbytes)
            writer.finish()
        copied = _copy_files(ASSETS, asset_directory, target)
        if _GENERATION_NAME not in copied:
            _write_json(target / _GENERATION_NAME, _generation_document(config))
        # Last, because no loader accepts a directory without it.
        _write_json(target / "config.json", config)
    if any("token" in name for name in copied):
        return Converted(source.spec)
    return Converted(source.spec, ("no tokenizer files: give a directory that has them with --assets",))


def merge_adapter(
    hf_directory: str | Path,
    adapter_directory: str | Path,
    merged_directory: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    report: Report = silent,
) -> Converted:
    """Write the Hugging Face directory of a model with a LoRA adapter (a PEFT directory) in its weights.

    W + alpha / rank B A is computed in float32 and stored in the dtype of W, as stages that train an adapter do. Raises
    ``UserError`` as ``hf_to_megatron`` does, and for an adapter of another model.
    """
    source = HfCheckpoint(hf_directory)
    adapter = PeftAdapter(Path(adapter_directory), source.spec)
    with report("checking", source.num_bytes) as advance:
        source.verify_digests(advance)
    dtypes = {name: source.tensors[name].dtype for name, _ in hf_tensor_shapes(source.spec)}
    with atomic_directory(merged_directory) as target:
        writer, joiner = HfWriter(target, _plan(source.spec, dtypes), max_shard_bytes), ExpertJoiner(source.spec)
        with contextlib.closing(writer), report("merging", writer.num_bytes) as advance:
            for name, dtype in dtypes.items():
                tensor, delta = source.read(name), adapter.delta(name)
                if delta is not None:
                    tensor = (tensor.float() + delta).to(dtype)
                for joined_name, joined in joiner.add(name, tensor):
                    writer.write(joined_name, joined)
                advance(tensor.nbytes)
            writer.finish()
        _copy_files(ASSETS, source.directory, target)
        document = read_json_object(source.directory / "config.json")
        document.pop("quantization_config", None)  # the weights were dequantised when they were read
        _write_json(target / "config.json", document)
    return Converted(source.spec)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Number and bytes of the tensors that ``check_conversion`` compared as equal."""

    num_tensors: int
    num_bytes: int


def check_conversion(
    hf_directory: str | Path, megatron_directory: str | Path, *, report: Report = silent
) -> Comparison:
    """Compare every tensor bit by bit; a ``UserError`` names the first that differs. ``logits.py`` compares outputs."""
    reference, converted = HfCheckpoint(hf_directory), MegatronReader(megatron_directory)
    _same_model(reference.spec, converted.spec, hf_directory, megatron_directory)
    count = 0
    with (
        report("comparing", reference.num_bytes) as advance,
        contextlib.closing(read_ahead(_hf_tensors(converted))) as tensors,
    ):
        for name, row, tensor in tensors:
            expected = reference.read(name, 0, row, row + tensor.size(0))
            if tensor.dtype != expected.dtype:
                raise UserError(f"{name}: {expected.dtype} in {hf_directory}, {tensor.dtype} in {megatron_directory}")
            # Bytes, because NaN is unequal to itself and -0 is equal to 0.
            if not torch.equal(tensor.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)):
                raise UserError(f"{name}: differs between {hf_directory} and {megatron_directory}")
            count += row == 0
            advance(tensor.nbytes)
    return Comparison(count, reference.num_bytes)


def inspect_checkpoint(directory: str | Path, *, report: Report = silent) -> dict[str, Any]:
    """Describe a Hugging Face or Megatron directory: format, model, dtypes, layout, parameters, bytes, digest."""
    path = Path(directory)
    if (path / SPEC_NAME).is_file():
        source = MegatronReader(path)
        description = {"format": "megatron", "layout": source.layout(), "optimizer_state": source.has_optimizer_state}
        num_bytes, digest = source.num_files_bytes, source.digest
    else:
        source = HfCheckpoint(path)
        num_bytes = source.num_bytes
        description = {"format": "huggingface", "layout": {"shards": len(source.shards)}}
        with report("hashing", num_bytes) as advance:
            digest = json_digest(source.file_digests(advance))
    spec = source.spec
    return {
        **description,
        "model": spec.to_dict(),
        "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in source.dtypes),
        "num_parameters": spec.num_parameters,
        "num_active_parameters": spec.num_active_parameters,
        "num_bytes": num_bytes,
        "digest": digest,
    }


def _chunks(source: HfCheckpoint, parallel: ParallelConfig) -> Iterator[Chunk]:
    tp_size = parallel.tensor_model_parallel_size
    for piece in pieces(source.spec, tp_size):
        yield from read_chunks(piece, source.spec, source, tp_size)


def _hf_tensors(source: MegatronReader) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield Hugging Face tensors as (name, first row, rows): chunk by chunk if chunks are rows, otherwise as one."""
    for piece in source.pieces:
        is_whole = piece.entry.expert is not None and source.spec.parts.fused_experts  # it becomes a part of another
        by_rows = not is_whole and piece.entry.parallelism in ("vocab_parallel", "gate_up_column_parallel")
        if by_rows and source.is_split_by_rows(piece):
            yield from source.read_rows(piece)
        else:
            for name, tensor in join_shards(piece.entry, source.spec, [source.read(piece)]):
                yield name, 0, tensor


def _plan(spec: ModelSpec, dtypes: Mapping[str, torch.dtype]) -> list[PlannedTensor]:
    """Return the tensors of the files in the order in which they are complete. dtypes: of each tensor of the model."""
    shapes, joiner = dict(hf_tensor_shapes(spec)), ExpertJoiner(spec)
    return [
        PlannedTensor(joined_name, joined.dtype, tuple(joined.shape))
        for name, dtype in dtypes.items()
        for joined_name, joined in joiner.add(name, torch.empty(shapes[name], dtype=dtype, device="meta"))
    ]


def _same_model(left: ModelSpec, right: ModelSpec, left_name: Any, right_name: Any) -> None:
    for field in dataclasses.fields(ModelSpec):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if a != b:
            raise UserError(f"different models: {field.name} is {a} in {left_name} and {b} in {right_name}")


def _config_document(source: MegatronReader, assets: Path) -> dict[str, Any]:
    """Return ``config.json``: that of the assets, if it describes this model, with the dtype of the weights."""
    dtype = str(source.entries["model.embedding.word_embeddings.weight"].properties.dtype).removeprefix("torch.")
    path = assets / "config.json"
    if not path.is_file():
        return {**hf_config_from_spec(source.spec, dtype), **_special_tokens(assets)}
    document = read_json_object(path)
    _same_model(spec_from_hf_config(document, str(path)), source.spec, path, source.directory)
    document.pop("quantization_config", None)  # the weights were dequantised when they were read
    document["dtype" if "dtype" in document else "torch_dtype"] = dtype
    return document


def _special_tokens(directory: Path) -> dict[str, int]:
    """Return ids of the special tokens of a tokenizer's directory; empty if it has no tokenizer."""
    if not (directory / "tokenizer_config.json").is_file():
        return {}
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: the tokenizer cannot be loaded ({str(error).splitlines()[0]})") from None
    return {name: getattr(tokenizer, name) for name in _SPECIAL_TOKENS if getattr(tokenizer, name) is not None}


def _generation_document(config: dict[str, Any]) -> dict[str, Any]:
    """Return ``generation_config.json`` in the form that transformers derives from a model's configuration."""
    return {
        "_from_model_config": True,
        **{name: config[name] for name in _SPECIAL_TOKENS if config.get(name) is not None},
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_files(names: tuple[str, ...], source: Path, target: Path) -> list[str]:
    """Copy the files ``names`` that exist in ``source``, and return their names."""
    existing = [name for name in names if (source / name).is_file()]
    target.mkdir(exist_ok=True)
    for name in existing:
        shutil.copyfile(source / name, target / name)
    return existing
