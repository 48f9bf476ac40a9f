"""Trains a tiny model with and without overlapped gradient reduction and weight gathering, and writes digests as JSON.

Started by test_overlap.py through torchrun: arguments are the output file and layouts as in training_worker.py.
"""

import functools
import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from training_worker import STEPS, parse_layout, policy, samples, weights

from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.sample_exchange import keep_own
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.parallel import trainable_model
from megatron_s2d.parallel.layout import build_layout, initialize_distributed, shutdown_distributed

VARIANTS = {
    "none": {"overlap_grad_reduce": False},
    "reduce": {"overlap_grad_reduce": True, "overlap_param_gather": False},
    "both": {"overlap_grad_reduce": True},
}
SMALL_BUCKETS = functools.partial(trainable_model.DistributedDataParallelConfig, bucket_size=3000)


def run(name: str, variant: str, preset: str, *, small: bool) -> list[dict]:
    """Losses, gradient norms, and what is read between updates: scores and a digest of the exported weights."""
    config = parse_layout(name).model_copy(update=VARIANTS[variant])
    layout = build_layout(config)
    trainable_model.DistributedDataParallelConfig = SMALL_BUCKETS if small else SMALL_BUCKETS.func
    batch = samples()
    columns = {"supervised_weight": weights(batch, "token_mean")}
    model = policy(preset, layout, 1)
    # The norm is summed bucket by bucket; with clipping its rounding would reach the weights.
    model.prepare_training(OptimizerConfig(lr=3e-3, weight_decay=0.01, grad_clip=0.0 if small else 0.1), STEPS)
    rows = []
    for step in range(STEPS + 1):
        batches = model.pack(keep_own(batch, layout), columns)
        count = sum(sample.length for sample in batch)
        metrics = model.forward_backward(batches, sft_objective(), num_tokens=count)
        row = {"loss": metrics["loss"].value(), "norm": model.optim_step()}
        if step == 1:  # the other updates are followed by the next forward pass
            row["pending"] = sum(group.param_gather_handle is not None for group in model.trainable._bucket_groups())
            row["digest"] = digest(model, layout)
            row["scores"] = [score.tolist() for score in model.score_replicated(batch)]
        rows.append(row)
    rows[0]["buckets"] = max(len(chunk.bucket_groups) for chunk in model.trainable.chunks)
    rows[-1]["scores"] = [score.tolist() for score in model.score_replicated(batch)]
    rows[-1]["digest"] = digest(model, layout)
    layout.destroy()
    return rows


def digest(model, layout) -> str:
    sha = hashlib.sha256()
    for bucket in export_buckets(model.chunks, model.spec, layout):
        for name, tensor in bucket:
            sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    output, *names = sys.argv[1:]
    initialize_distributed()
    results = {}
    for name in names:
        preset = "tiny-moe" if "ep" in name else "tiny-teacher"
        for variant in VARIANTS:
            for small in (False, True):
                results[f"{name}/{variant}/{small}"] = run(name, variant, preset, small=small)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results), encoding="utf-8")
    shutdown_distributed()


if __name__ == "__main__":
    main()
