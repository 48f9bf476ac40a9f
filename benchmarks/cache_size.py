"""Memory and time of reading a teacher cache of 10^9 response tokens, on sparse files.

    python benchmarks/cache_size.py        # a million responses of 1,000 tokens, top-64, in 128 parts

The index and the ids are written in full. Lines and shards have their full size (half a terabyte) and are holes, with
content where the measured steps read it. One data-parallel rank of 128 then reads steps of 1,024 responses as a
``forward_kl`` stage does: the distributions of its own, and records of the others. Bar, checked here: 256 MB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
import types
import zlib
from pathlib import Path

import numpy as np
import torch

from megatron_s2d.artifacts.files import atomic_write_json, json_digest
from megatron_s2d.data.cache import FORMAT, VERSION, CacheHeader, TeacherCache, content_digest, token_digest
from megatron_s2d.data.cache_index import ID_BYTES, ROW_BYTES, ids_file, index_row, sealed
from megatron_s2d.data.cache_writer import join_parts
from megatron_s2d.data.row_digests import row_digests
from megatron_s2d.data.stored_samples import OfflineSamples
from megatron_s2d.records import Sample, own_samples, sample_to_json
from megatron_s2d.stages.sft import shuffled

PROMPT, RESPONSE, K, VOCAB = 100, 1000, 64, 32_000
RANKS, BATCH, STEPS = 128, 1024, 5
LARGEST_GROWTH = 256e6
_TYPES = {torch.int32: "I32", torch.float32: "F32"}
HEADER = CacheHeader(
    representation="top_k", teacher_digest="t", tokenizer_fingerprint="f", template_fingerprint="c", temperature=1.0,
    vocab_size=VOCAB, k=K,
)  # fmt: skip


def response(index: int) -> Sample:
    """Sample ``index``: all have the same tokens, and ids of the same length."""
    name = f"p{index:09d}"
    tokens = np.random.default_rng(0).integers(0, VOCAB, PROMPT + RESPONSE)
    mask = np.arange(PROMPT + RESPONSE) >= PROMPT
    return Sample(f"{name}#0@1", name, f"{name}@1.0", "math", 0, tokens, mask, 1.0, "stop")


def distribution() -> dict[str, torch.Tensor]:
    """The rows of every sample."""
    log_probs = torch.log_softmax(torch.randn(RESPONSE, K, generator=torch.Generator().manual_seed(0)), 1)
    ids = torch.arange(K, dtype=torch.int32).repeat(RESPONSE, 1)
    digests = torch.from_numpy(row_digests(response(0)))
    return {"ids": ids, "log_probs": log_probs, "log_tail_mass": torch.zeros(RESPONSE), "token_digests": digests}


def write_part(path: Path, first: int, count: int, read: list[int], own: list[int]) -> None:
    """Write samples ``first`` to ``first + count``. read, own: indices of the samples whose line and rows are read."""
    path.mkdir()
    sample, tensors = response(first), distribution()
    line = sample_to_json(sample).encode() + b"\n"
    tokens, content = token_digest(sample), content_digest(tensors)
    row = index_row(sample, line, position=0, offset=0, shard=0, start=0, tokens=tokens, content=content)
    index = np.repeat(np.array([row]), count)
    index["position"], index["offset"] = np.arange(count), np.arange(count) * len(line)
    index["start"] = np.arange(count) * RESPONSE
    with open(path / "samples.jsonl", "wb") as file:
        file.truncate(count * len(line))
        for number in read:
            line = sample_to_json(response(number)).encode() + b"\n"
            os.pwrite(file.fileno(), line, int(index["offset"][number - first]))
            names = line[: row["name_bytes"]]
            index[number - first]["names"], index[number - first]["line"] = zlib.crc32(names), zlib.crc32(line)
    (path / "index.bin").write_bytes(b"".join(sealed(row).tobytes() for row in index))
    (path / "ids.bin").write_bytes(ids_file([f"p{number:09d}#0@1" for number in range(first, first + count)]))
    described, offset, starts = {}, 0, {}
    for name, tensor in tensors.items():
        shape = [count * RESPONSE, *tensor.shape[1:]]
        starts[name], size = offset, tensor.nbytes * count
        described[name] = {"dtype": _TYPES[tensor.dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    with open(path / "shard-00000.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        for number in own:
            for name, tensor in tensors.items():
                start = 8 + len(text) + starts[name] + (number - first) * tensor.nbytes
                os.pwrite(file.fileno(), tensor.numpy().tobytes(), start)
    sizes = {"samples.jsonl": count * len(line), "index.bin": count * ROW_BYTES, "ids.bin": count * ID_BYTES}
    body = {
        "header": HEADER.model_dump(), "samples": count, "tokens": count * RESPONSE, "longest_response": RESPONSE,
        "num_shards": 1, "shard_bytes": 8 + len(text) + offset, "captured_mass": 1.0,
        "shards": [{"sha256": "", "bytes": 8 + len(text) + offset, "rows": count * RESPONSE}],
        "files": {name: {"sha256": "", "bytes": size} for name, size in sizes.items()},
    }  # fmt: skip
    atomic_write_json(
        path / "header.json", {"format": FORMAT, "version": VERSION, "body": body, "body_digest": json_digest(body)}
    )


def resident() -> dict[str, float]:
    """Resident memory of this process in bytes, by kind: anonymous, and pages of files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][3:-1].lower(): 1024.0 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssFile:")}


def main() -> None:
    """Write the cache, read some steps, print what they cost, and check the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="responses of 1,000 tokens")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="s2d_cache_"))
    size = -(-options.samples // RANKS)
    order = shuffled(size * RANKS, 1)
    read = order(0, STEPS * BATCH)
    own = {index for step in range(STEPS) for index in order(step * BATCH, BATCH)[::RANKS]}
    try:
        for part in range(RANKS):
            first = part * size
            of_part = [index for index in read if first <= index < first + size]
            write_part(directory / f"part_{part:05d}", first, size, of_part, [n for n in of_part if n in own])
        join_parts(directory, [f"part_{part:05d}" for part in range(RANKS)], HEADER)
        before, start = resident(), time.perf_counter()
        cache = TeacherCache.open(directory, expect=HEADER)
        samples = OfflineSamples(cache.stored(temperature=1.0), order)
        opened, layout = time.perf_counter() - start, types.SimpleNamespace(dp_rank=0, dp_size=RANKS)
        start = time.process_time()
        for step in range(STEPS):
            for sample in own_samples(samples.read(step * BATCH, BATCH, layout)):
                cache.distribution(sample)
        seconds = (time.process_time() - start) / STEPS
        growth = {kind: size - before[kind] for kind, size in resident().items()}
        files = [path.stat() for path in directory.rglob("*") if path.is_file()]
        print(
            f"{len(cache) * RESPONSE:,} tokens, {sum(file.st_size for file in files) / 1e9:,.0f} GB "
            f"({sum(512 * file.st_blocks for file in files) / 1e9:.2f} GB on the disk), {len(files)} files: opened in "
            f"{opened:.3f} s; {seconds:.2f} CPU s a step of {BATCH} responses; memory grew by "
            f"{growth['anon'] / 1e6:.0f} MB, and {growth['file'] / 1e6:.0f} MB of pages of files"
        )
    finally:
        shutil.rmtree(directory)
    if growth["anon"] > LARGEST_GROWTH:
        raise SystemExit("memory grows by more than 256 MB")


if __name__ == "__main__":
    main()
