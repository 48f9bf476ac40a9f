"""Loads checkpoints at several layouts on four ranks and saves one; started by test_conversion_layouts.py.

Arguments: a directory with, per model, ``hf/`` (the checkpoint), ``tokens.pt``, ``logits.pt`` (what transformers
computes) and ``megatron/`` (an import). Writes the largest differences found to ``results.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.models.build import build_model
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.weights import export_weights, import_weights
from megatron_s2d.parallel import layout as layouts
from megatron_s2d.parallel.checkpoint import load_checkpoint, save_checkpoint
from megatron_s2d.parallel.step import TrainableModel, forward_only

from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # isort: skip

LAYOUTS = {
    "tp1": {"data_parallel_size": 4},
    "tp2": {"tensor_model_parallel_size": 2, "data_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2, "data_parallel_size": 2},
    "tp2pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    "tp4": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
    "ep2": {"expert_model_parallel_size": 2, "data_parallel_size": 4},
    "ep2tp2pp2": {
        "expert_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}


def forward_step(model, tokens):
    output = model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)

    def result(logits, non_loss_data=False):
        logits = gather_from_tensor_model_parallel_region(logits)
        if non_loss_data:
            return logits
        return logits.square().mean() * tokens.numel(), torch.tensor(tokens.numel()), None

    return output, result


def difference(chunks, layout, tokens, expected) -> float:
    """Largest difference from ``expected`` over this job's ranks."""
    largest = torch.zeros(())
    outputs = forward_only(chunks, layout, forward_step, [tokens])
    if outputs:
        largest = (outputs[0][..., : expected.size(-1)] - expected).abs().max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def check_model(directory: Path) -> dict:
    source = HfCheckpoint(directory / "hf")
    spec = source.spec
    tokens = torch.load(directory / "tokens.pt", weights_only=True)
    expected = torch.load(directory / "logits.pt", weights_only=True)
    found: dict = {"live": {}, "converted": {}, "exported": {}}
    for name, fields in LAYOUTS.items():
        if name.startswith("ep") and not spec.num_experts:
            continue
        layout = layouts.build_layout(ParallelConfig(**fields))
        live = build_model(spec, layout)
        import_weights(live, spec, layout, source)
        found["live"][name] = difference(live, layout, tokens, expected)
        tensors = dict(export_weights(live, spec, layout, bucket_bytes=50_000))
        equal = tensors.keys() == source.tensors.keys()
        found["exported"][name] = equal and all(torch.equal(tensors[key], source.read(key)) for key in tensors)
        converted = build_model(spec, layout)
        load_checkpoint(directory / "megatron", converted, layout, model_spec=spec.to_dict())
        found["converted"][name] = difference(converted, layout, tokens, expected)
    found["resharded"] = reshard(directory, spec, tokens)
    return found


def reshard(directory: Path, spec, tokens) -> dict:
    """Train an update at TP2 x PP2 and save with the optimizer's state; load at TP1, save; load at TP4."""
    layout = layouts.build_layout(ParallelConfig(**LAYOUTS["tp2pp2"]))
    chunks = build_model(spec, layout)
    import_weights(chunks, spec, layout, HfCheckpoint(directory / "hf"))
    trainable = TrainableModel(chunks, layout, OptimizerConfig(lr=1e-2), total_steps=1)
    trainable.forward_backward(forward_step, [tokens])
    trainable.update()
    position = {"step": 1, "updates": 1}
    save_checkpoint(
        directory / "a", chunks, layout, model_spec=spec.to_dict(), position=position, trainable=trainable
    )
    digests = {"tp2pp2": weights(chunks, spec, layout)}
    layout = layouts.build_layout(ParallelConfig(**LAYOUTS["tp1"]))
    chunks = build_model(spec, layout)
    load_checkpoint(directory / "a", chunks, layout, model_spec=spec.to_dict())
    digests["tp1"] = weights(chunks, spec, layout)
    save_checkpoint(directory / "b", chunks, layout, model_spec=spec.to_dict(), position=position)
    layout = layouts.build_layout(ParallelConfig(**LAYOUTS["tp4"]))
    chunks = build_model(spec, layout)
    load_checkpoint(directory / "b", chunks, layout, model_spec=spec.to_dict())
    digests["tp4"] = weights(chunks, spec, layout)
    first = digests["tp2pp2"]
    original = HfCheckpoint(directory / "hf")
    return {
        "moved": max(float((first[key] - original.read(key)).abs().max()) for key in first),
        "equal": all(torch.equal(first[key], other[key]) for other in digests.values() for key in first),
    }


def weights(chunks, spec, layout) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in export_weights(chunks, spec, layout)}


def main() -> None:
    torch.set_num_threads(1)
    layouts.initialize_distributed()
    root = Path(sys.argv[1])
    results = {path.name: check_model(path) for path in sorted(root.iterdir()) if path.is_dir()}
    if dist.get_rank() == 0:
        (root / "results.json").write_text(json.dumps(results))
    layouts.shutdown_distributed()


if __name__ == "__main__":
    main()
