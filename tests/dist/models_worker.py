"""Runs models at several layouts in one start of four ranks; rank 0 writes what it found to the JSON file given.

Started by test_models_layouts.py through torchrun. Every layout sees the same eight sequences and the same seed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_layout import open_layout

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.models.build import build_model
from megatron_s2d.models.families import padded_vocab_size
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.parallel import layout as layouts
from megatron_s2d.parallel.trainable_model import TrainableModel, forward_only

from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # isort: skip

VOCAB_SIZE = 27
LAYOUTS = {
    "dp4": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp2sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp2pp2sp": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    "tp4": {"tensor_model_parallel_size": 4},
    "ep2": {"expert_model_parallel_size": 2},
    "ep2pp2": {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "ep2tp2sp": {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "ep4tp2sp": {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True},
}
DENSE = ("dp4", "tp2", "pp2", "tp2pp2", "tp2sp", "tp2pp2sp", "tp4")
# 27 tokens; tp4 has more tensor ranks than key/value groups in the Llama.
CASES = {
    "tiny-teacher": ("dp4", "tp2", "pp2", "tp2pp2", "tp2sp", "tp2pp2sp"),
    "tiny-llama": DENSE,
    "tiny-moe": ("dp4", "pp2", "tp2sp", "ep2", "ep2pp2", "ep2tp2sp", "ep4tp2sp"),
}


def forward_step(model, tokens):
    """Cross-entropy summed over the predicted tokens; the outputs as well when only going forward."""
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    output = model(tokens, positions, None)

    def result(logits, non_loss_data=False):
        logits = gather_from_tensor_model_parallel_region(logits)[..., :VOCAB_SIZE]
        if non_loss_data:
            return logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        return losses, torch.tensor(tokens[:, 1:].numel()), losses.detach()

    return output, result


def run(preset: str, parallel: ParallelConfig) -> dict:
    with open_layout(parallel) as layout:
        return run_at(layout, preset)


def run_at(layout: layouts.Layout, preset: str) -> dict:
    """Logits before training, then losses and gradient norms of three updates, and digests of the weights."""
    spec = ModelConfig(preset=preset).resolve(VOCAB_SIZE)
    chunks = build_model(spec, layout, seed=3)
    tokens = torch.randint(0, VOCAB_SIZE, (8, 12), generator=torch.Generator().manual_seed(0))
    share = 8 // layout.dp_size
    mine = tokens[layout.dp_rank * share : (layout.dp_rank + 1) * share]
    result = {"before": digest(chunks, spec, layout, bucket_bytes=20_000)}
    logits = forward_only(chunks, layout, forward_step, list(tokens.split(4)))
    result["logits"] = broadcast_from_last_stage(torch.cat(logits) if logits else None, layout).tolist()

    trainable = TrainableModel(chunks, layout, OptimizerConfig(lr=1e-2), total_steps=3)
    result["losses"], result["norms"] = [], []
    for _ in range(3):
        losses = trainable.forward_backward(forward_step, list(mine.split(1)))
        total = torch.stack(losses).sum() if losses else None
        total = broadcast_from_last_stage(total, layout)
        dist.all_reduce(total, group=layout.groups.dp)
        result["losses"].append(float(total) / (8 * 11))
        result["norms"].append(trainable.optim_step())
    bare = [chunk.module for chunk in trainable.chunks]
    after = {name: tensor for bucket in export_buckets(bare, spec, layout) for name, tensor in bucket}
    result["after"] = {name: float(tensor.double().norm()) for name, tensor in after.items()}
    result["padding"] = padding_of(bare[0], spec, layout)
    return result


def padding_of(model, spec, layout) -> float:
    """Largest magnitude in the padded rows of the embedding after training, over the ranks."""
    largest = torch.zeros(())
    if layout.is_pipeline_first_stage:
        share = padded_vocab_size(spec.vocab_size, layout.tp_size) // layout.tp_size
        real = max(0, min(share, spec.vocab_size - layout.tp_rank * share))
        padding = model.embedding.word_embeddings.weight[real:].detach()
        largest = padding.abs().max() if padding.numel() else largest
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def broadcast_from_last_stage(tensor, layout):
    if layout.pp_size == 1:
        return tensor
    shape = [tuple(tensor.shape) if tensor is not None else None]
    dist.broadcast_object_list(shape, group=layout.groups.pp, group_src=layout.pp_size - 1)
    tensor = tensor.contiguous() if tensor is not None else torch.empty(shape[0])
    dist.broadcast(tensor, group=layout.groups.pp, group_src=layout.pp_size - 1)
    return tensor


def digest(chunks, spec, layout, **options) -> str:
    total = hashlib.sha256()
    tensors = [item for bucket in export_buckets(chunks, spec, layout, **options) for item in bucket]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    layouts.initialize_distributed()
    results = {}
    wanted = sys.argv[2:]
    for preset, names in CASES.items():
        for name in [name for name in names if f"{preset}/{name}" in wanted]:
            fields = dict(LAYOUTS[name])
            taken = fields.get("tensor_model_parallel_size", 1) * fields.get("pipeline_model_parallel_size", 1)
            fields["data_parallel_size"] = 4 // taken
            results[f"{preset}/{name}"] = run(preset, ParallelConfig(**fields))
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results), encoding="utf-8")
    layouts.shutdown_distributed()


if __name__ == "__main__":
    main()
