"""Scores responses with checkpoints at several layouts on two ranks; started by test_family_layouts.py.

Arguments: a directory with a folder ``hf`` for each model, the JSON file of results, and MODEL/LAYOUT names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from open_layout import open_layout

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.weights import export_buckets, import_weights
from megatron_s2d.parallel import layout as layouts
from megatron_s2d.records import Sample
from megatron_s2d.train.megatron_model import MegatronModel

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2, "data_parallel_size": 2},
}
PACKED = ("tp2", "cp2")
LENGTHS = (40, 7, 33, 18)  # shorter and longer than the windows


def samples(vocab_size: int) -> list[Sample]:
    generator = np.random.default_rng(1)
    return [
        Sample(
            f"{n}#0@0", str(n), f"{n}@0.0", "math", 0, generator.integers(0, vocab_size, length),
            np.arange(length) >= 2, 1.0, "data",
        )
        for n, length in enumerate(LENGTHS)
    ]  # fmt: skip


def run(directory: Path, name: str) -> dict:
    """Scores of all samples, each with its index, and whether the exported tensors are the checkpoint's."""
    source = HfCheckpoint(directory)
    with open_layout(ParallelConfig(**LAYOUTS[name])) as layout:
        model = MegatronModel(source.spec, layout, precision="float32", max_tokens=64, packed=name in PACKED)
        import_weights(model.chunks, source.spec, layout, source)
        every = samples(source.spec.vocab_size)
        scores = model.score_replicated(every)
        exported = dict(item for bucket in export_buckets(model.chunks, source.spec, layout) for item in bucket)
    same = exported.keys() == source.tensors.keys()
    same = same and all(torch.equal(exported[key], source.read(key)) for key in exported)
    return {"scores": [row.tolist() for row in scores], "exported": same}


def main() -> None:
    torch.set_num_threads(1)
    layouts.initialize_distributed()
    root, output, *names = sys.argv[1:]
    results = {}
    for name in names:
        model, layout = name.split("/")
        results[name] = run(Path(root) / model, layout)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    layouts.shutdown_distributed()


if __name__ == "__main__":
    main()
