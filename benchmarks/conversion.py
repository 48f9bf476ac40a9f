"""Speed and peak memory of checkpoint conversion, compared with a plain copy of the same bytes on the same disk.

    python benchmarks/conversion.py --preset llama-3.3-70b --num-layers 4 --directory DIR

Writes a random checkpoint of the preset's shapes with fewer layers, then runs each step in a process of its own with
a cold page cache and a final sync of the disk, alternating copies and conversions. Prints the fastest of the repeats,
its rate relative to the copy, and the largest resident set of all repeats. Needs three times the checkpoint's size on
the disk and deletes everything at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

COPY = "import shutil; shutil.copytree('{root}/{source}', '{root}/copy')"
STEPS = {
    "copy of the Hugging Face directory": COPY.replace("{source}", "hf"),
    "hf-to-megatron": (
        "from megatron_s2d.conversion.convert import hf_to_megatron; "
        "hf_to_megatron('{root}/hf', '{root}/megatron', tensor_model_parallel_size={tensor})"
    ),
    "copy of the Megatron directory": COPY.replace("{source}", "megatron"),
    "megatron-to-hf": (
        "from megatron_s2d.conversion.convert import megatron_to_hf; megatron_to_hf('{root}/megatron', '{root}/back')"
    ),
    "check": (
        "from megatron_s2d.conversion.convert import check_conversion; "
        "check_conversion('{root}/back', '{root}/megatron')"
    ),
}
PEAK = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"


def write_source(directory: Path, preset: str, num_layers: int) -> tuple[int, int]:
    """Write a random bfloat16 checkpoint; return its bytes and those of its largest layer or tensor outside layers."""
    import torch

    from megatron_s2d.arithmetic import ceil_div
    from megatron_s2d.config.hf_config import hf_config_from_spec
    from megatron_s2d.config.model import ModelConfig
    from megatron_s2d.conversion.hf_writer import HfWriter, PlannedTensor
    from megatron_s2d.models.families import hf_tensor_shapes

    spec = ModelConfig(preset=preset, num_layers=num_layers).resolve()
    directory.mkdir(parents=True)
    plan = [PlannedTensor(name, torch.bfloat16, shape) for name, shape in hf_tensor_shapes(spec)]
    writer = HfWriter(directory, plan, 5 * 10**9)
    noise = torch.randn(2**26).bfloat16()
    for tensor in plan:
        count = tensor.num_bytes // 2
        writer.write(tensor.name, noise.repeat(ceil_div(count, noise.numel()))[:count].view(tensor.shape))
    writer.finish()
    # Without recorded digests, like most published checkpoints.
    (directory / "weights.sha256").unlink()
    (directory / "config.json").write_text(json.dumps(hf_config_from_spec(spec, "bfloat16")))
    layer = sum(tensor.num_bytes for tensor in plan if ".layers.0." in tensor.name)
    outside = max(tensor.num_bytes for tensor in plan if ".layers." not in tensor.name)
    return writer.num_bytes, max(layer, outside)


@dataclasses.dataclass
class Measurement:
    seconds: float = float("inf")
    peak: int = 0


def measure(code: str, root: Path) -> Measurement:
    """Run ``code`` with a cold page cache, including the sync of its results to the disk."""
    os.sync()
    for path in root.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    finished = subprocess.run([sys.executable, "-c", code + PEAK], capture_output=True, text=True, check=True)
    os.sync()
    return Measurement(time.perf_counter() - start, int(finished.stdout.split()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llama-3.3-70b")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, required=True, help="a new directory on the disk to measure")
    arguments = parser.parse_args()
    root = arguments.directory
    root.mkdir(parents=True)
    best = {name: Measurement() for name in STEPS}
    try:
        # In a process of its own, because a child inherits the peak memory of its parent.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            total, bound = pool.apply(write_source, (root / "hf", arguments.preset, arguments.num_layers))
        print(f"{arguments.preset}, {arguments.num_layers} layers: {total / 2**30:.1f} GiB, of which the largest layer")
        print(f"or tensor outside the layers has {bound / 2**30:.2f} GiB\n")
        for repeat in range(arguments.repeats):
            for name, code in STEPS.items():
                result = measure(code.format(root=root, tensor=arguments.tensor_model_parallel_size), root)
                print(f"repeat {repeat}: {name}: {result.seconds:.1f} s", file=sys.stderr, flush=True)
                best[name].seconds = min(best[name].seconds, result.seconds)
                best[name].peak = max(best[name].peak, result.peak)
                shutil.rmtree(root / "copy", ignore_errors=True)
            for name in ("megatron", "back"):
                shutil.rmtree(root / name)
    finally:
        shutil.rmtree(root)
    print("| step | seconds | MB/s | rate relative to the copy | peak RSS GiB |\n|---|---|---|---|---|")
    for name, result in best.items():
        if name.startswith("copy"):
            copy_seconds = result.seconds
        ratio = f"{copy_seconds / result.seconds:.2f}"
        rate = total / result.seconds / 1e6
        print(f"| {name} | {result.seconds:.1f} | {rate:.0f} | {ratio} | {result.peak / 2**30:.2f} |")


if __name__ == "__main__":
    main()
