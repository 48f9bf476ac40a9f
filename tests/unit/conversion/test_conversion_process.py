"""Conversions in subprocesses: killed at any write, their peak memory, and parsing without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.conversion import convert
from megatron_s2d.conversion.hf_writer import HfWriter, PlannedTensor
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import hf_tensor_shapes

# Forks a process for every point; each runs a conversion and kills itself with SIGKILL there.
KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_s2d.artifacts import files as artifacts
from megatron_s2d.conversion import convert
from megatron_s2d.conversion.files import HashedFile

root = Path(sys.argv[1])
write, rename = HashedFile.write, os.rename

def run(direction, point):
    writes = []

    def counted(file, content):
        writes.append(1)
        if len(writes) == point:
            # Only half of the content is written.
            file._file.write(memoryview(content).cast("B")[: len(memoryview(content).cast("B")) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, content)

    def killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    HashedFile.write = counted
    if point == "rename":
        artifacts.os.replace = killed
    if point == "finish":
        convert.MegatronWriter.finish = convert.HfWriter.finish = killed
    if direction == "hf_to_megatron":
        convert.hf_to_megatron(root / "hf", root / f"hf_to_megatron_{point}", tensor_model_parallel_size=2)
    else:
        convert.megatron_to_hf(root / "megatron", root / f"megatron_to_hf_{point}", max_shard_bytes=60_000)

for direction in ("hf_to_megatron", "megatron_to_hf"):
    for point in (1, 7, 30, "finish", "rename"):
        child = os.fork()
        if child == 0:
            run(direction, point)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (direction, point, status)
"""

# Peak resident bytes of a conversion in each direction, above those of the imported modules.
PEAK = """
import resource, sys
from megatron_s2d.conversion.convert import megatron_to_hf, hf_to_megatron

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
hf_to_megatron(sys.argv[1] + "/hf", sys.argv[1] + "/megatron", tensor_model_parallel_size=2)
forward = peak()
megatron_to_hf(sys.argv[1] + "/megatron", sys.argv[1] + "/back")
print(forward - before, peak() - before)
"""


def write_random(directory, spec, dtype=torch.bfloat16) -> int:
    """A random checkpoint without recorded digests; returns its bytes."""
    directory.mkdir()
    plan = [PlannedTensor(name, dtype, shape) for name, shape in hf_tensor_shapes(spec)]
    writer = HfWriter(directory, plan, 10**9)
    for tensor in plan:
        writer.write(tensor.name, torch.randn(tensor.shape).to(dtype))
    writer.finish()
    (directory / "config.json").write_text(json.dumps(hf_config_from_spec(spec, "bfloat16")))
    return writer.num_bytes


def python(code: str, *arguments) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_killed_conversion_leaves_nothing_that_loads(tmp_path):
    spec = ModelConfig(preset="tiny-teacher", num_layers=4).resolve(101)
    write_random(tmp_path / "hf", spec)
    convert.hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    python(KILLED, tmp_path)
    remaining = {path.name for path in tmp_path.iterdir()} - {"hf", "megatron"}
    points = [
        f"{direction}_{point}"
        for direction in ("hf_to_megatron", "megatron_to_hf")
        for point in (1, 7, 30, "finish", "rename")
    ]
    # Hidden directories only; no target exists.
    assert remaining == {f".{name}.partial" for name in points}
    for name in points:
        with pytest.raises(UserError):
            convert.inspect_checkpoint(tmp_path / name)
        if not name.endswith("rename"):
            # Up to the rename not even what is hidden loads; at the rename it is complete.
            with pytest.raises(UserError):
                convert.inspect_checkpoint(tmp_path / f".{name}.partial")
    convert.hf_to_megatron(tmp_path / "hf", tmp_path / "hf_to_megatron_7")
    convert.check_conversion(tmp_path / "hf", tmp_path / "hf_to_megatron_7")
    convert.megatron_to_hf(tmp_path / "hf_to_megatron_7", tmp_path / "megatron_to_hf_7")
    assert {path.name for path in tmp_path.iterdir() if "_7" in path.name} == {"hf_to_megatron_7", "megatron_to_hf_7"}


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_model(tmp_path):
    """A checkpoint of 30 layers, 26 times as large as its largest layer or tensor, within four times that bound."""
    spec = ModelConfig(
        preset="tiny-teacher", num_layers=30, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=8, head_dim=64
    ).resolve(5000)
    total = write_random(tmp_path / "hf", spec)
    shapes = {name: 2 * torch.Size(shape).numel() for name, shape in hf_tensor_shapes(spec)}
    bound = max(sum(size for name, size in shapes.items() if ".layers.0." in name), shapes["model.embed_tokens.weight"])
    assert total > 25 * bound
    forward, both = map(int, python(PEAK, tmp_path).split())
    assert forward < 4 * bound and both < 4 * bound, (forward / bound, both / bound)


def test_parsing_needs_no_torch():
    code = (
        "import argparse, sys\n"
        "from megatron_s2d.conversion import cli\n"
        "parser = argparse.ArgumentParser()\n"
        "cli.add_parser(parser.add_subparsers())\n"
        "parser.parse_args(['convert', 'hf-to-megatron', 'a', 'b', '--tensor-model-parallel-size', '2'])\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    assert python(code) == "[]\n"
