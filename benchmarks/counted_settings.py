"""Counts what settings change for one rank, on a CUDA runtime without a GPU: launches, waits, memory and traffic.

    python benchmarks/counted_settings.py [--only NAME ...]

Rank 4 of TP 2 x PP 2 x DP 2 (the last pipeline stage): supervised training of a model of Qwen3-8B's widths with eight
layers, packed, four micro-batches of 8,192 tokens; generation and off-loading with Qwen3-0.6B's on one GPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from typing import Any

from megatron_s2d.config.base import parse
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.estimate.stage_memory import StageShape
from megatron_s2d.measure.comparison import bytes_sent
from megatron_s2d.measure.limits import Limits
from megatron_s2d.measure.measure import RankLauncher, measure_stage
from megatron_s2d.measure.measurement import Measurement

PARALLEL = {
    "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "data_parallel_size": 2,
    "sequence_parallel": True,
}  # fmt: skip
LENGTH = 4096

# name -> (fields of the model, of parallel) of the run that is compared with the one without them
TRAINING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none of these": ({}, {}),
    "overlap_grad_reduce: false": ({}, {"overlap_grad_reduce": False}),
    "overlap_param_gather: false": ({}, {"overlap_param_gather": False}),
    "virtual_pipeline_model_parallel_size: 2": ({}, {"virtual_pipeline_model_parallel_size": 2}),
    "recompute: selective (attention)": ({"recompute": "selective"}, {}),
    "recompute: selective, recompute_modules: [mlp]": ({"recompute": "selective", "recompute_modules": ["mlp"]}, {}),
    "recompute: full": ({"recompute": "full"}, {}),
    "recompute: full, recompute_num_layers: 2": ({"recompute": "full", "recompute_num_layers": 2}, {}),
    "recompute: full, block, recompute_num_layers: 2": (
        {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 2},
        {},
    ),
}


def workflow(stage: dict[str, Any], model: dict[str, Any], **sections: Any) -> WorkflowConfig:
    """A stage after one that leaves its model's weights."""
    task = {"type": "task", "num_operations": 2, "num_prompts": 64}
    micro_batch = {"max_tokens_per_gpu": 2 * LENGTH, "sequence_packing": True}
    base = {
        "type": "sft",
        "model": "student",
        "role": "base",
        "data": "pool",
        "steps": 1,
        "global_batch_size": 16,
        "micro_batch": micro_batch,
    }
    document = {
        "name": "counted",
        "tokenizer": "task:modular_arithmetic",
        "precision": "bfloat16",
        "models": {"student": model},
        "data": {"pool": task | {"split": "pool"}, "problems": task | {"split": "eval"}},
        "stages": {"base": base, "counted": {"steps": 2, "role": "counted", "micro_batch": micro_batch} | stage},
        "arms": {"counted": "counted"},
        "evaluation": {"prompts": "problems"},
        **sections,
    }
    return parse(WorkflowConfig, document, "counted")


def trained(launcher: RankLauncher, model: dict[str, Any], parallel: dict[str, Any]) -> Measurement:
    """Measure an update of the last pipeline rank."""
    config = workflow(
        {"type": "sft", "model": "student", "data": "pool", "global_batch_size": 16},
        {"preset": "qwen3-8b", "num_layers": 8, **model},
        parallel=PARALLEL | parallel,
        rollout={"engine": "sglang", "sglang": {"urls": {"student": ["http://127.0.0.1:1"]}}},
    )
    return measure_stage(
        config, "counted", StageShape(16, 1, 0, 0, 256, LENGTH - 256), 4, limits=Limits(), launcher=launcher
    )


def sampled(launcher: RankLauncher, *, enforce_eager: bool) -> Measurement:
    """Measure a GRPO step with an off-loaded optimizer on one GPU."""
    stage = {
        "type": "grpo",
        "init": "base",
        "prompts": "pool",
        "train_batch_size": 8,
        "num_generations": 4,
        "num_mini_batches": 2,
        "offload_optimizer": True,
        "kl_loss_coef": 0,
        "sampling": {"max_response_length": 768},
        "micro_batch": {"max_tokens_per_gpu": 4096},
    }
    config = workflow(
        stage, {"preset": "qwen3-0.6b", "num_layers": 8}, parallel={}, rollout={"enforce_eager": enforce_eager}
    )
    limits = Limits(decoded_tokens=64)
    return measure_stage(config, "counted", StageShape(16, 2, 32, 8, 256, 768), 0, limits=limits, launcher=launcher)


def training_row(name: str, measurement: Measurement, parallel: dict[str, Any]) -> str:
    """A line of the table of training."""
    train, update = measurement.call("train"), measurement.call("update")
    layout = parse(WorkflowConfig.model_fields["parallel"].annotation, PARALLEL | parallel, name)
    hidden = (
        bytes_sent(measurement.overlapped("train"), layout),
        bytes_sent(measurement.overlapped("update"), layout, "weights"),
    )
    sent = bytes_sent(train.collectives, layout)
    gathered = bytes_sent(update.collectives, layout, "weights")
    cells = [
        f"{train.num_launches / train.micro_batches / 4:,.0f}",
        f"{train.num_waits / train.micro_batches:.2f}",
        f"{train.flops / train.micro_batches / 1e12:.1f}",
        f"{train.peak_bytes / 2**30:.1f}",
        f"{sent.get('pipeline', 0) / 2**30:.2f}",
        f"{hidden[0].get('gradients', 0) / 2**30:.2f} of {sent.get('gradients', 0) / 2**30:.2f}",
        f"{hidden[1].get('weights', 0) / 2**30:.2f} of {gathered.get('weights', 0) / 2**30:.2f}",
    ]
    return f"| `{name}` | {' | '.join(cells)} |"


def sampling_row(name: str, measurement: Measurement) -> str:
    """A line of the table of sampling."""
    decode, update, train = (measurement.call(phase) for phase in ("decode", "update", "train"))
    reserved = max(call.reserved_bytes for call in measurement.calls)
    allocated = max(call.peak_bytes for call in measurement.calls)
    cells = [
        f"{decode.num_launches:,}",
        f"{decode.num_waits}",
        f"{train.num_waits + update.num_waits}",
        f"{allocated / 2**30:.2f}",
        f"{reserved / 2**30:.2f}",
    ]
    return f"| `{name}` | {' | '.join(cells)} |"


def print_table(head: Iterable[str], rows: Iterable[str]) -> None:
    """Print Markdown."""
    head = list(head)
    print("| " + " | ".join(head) + " |\n|---|" + "--:|" * (len(head) - 1))
    for row in rows:
        print(row, flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of settings, as they are printed; none: no training")
    only = parser.parse_args().only
    names = [name for name in TRAINING if only is None or name in only]
    with RankLauncher() as launcher:
        head = ["setting", "launches a layer", "waits", "TFLOP", "peak GiB", "pipeline GiB", "gradients overlapped GiB"]
        print_table(
            [*head, "weights overlapped GiB"],
            (training_row(name, trained(launcher, *TRAINING[name]), TRAINING[name][1]) for name in names),
        )
    print()
    head = ["setting", "launches, 64 tokens", "waits, 64 tokens", "waits of an update", "allocated GiB", "reserved GiB"]
    rows = []
    for segments in (True, False):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:{segments}"
        with RankLauncher() as launcher:  # the allocator reads the variable when it starts
            for eager in (False, True) if segments else (False,):
                name = f"expandable_segments: {str(segments).lower()}, enforce_eager: {str(eager).lower()}"
                rows.append(sampling_row(name, sampled(launcher, enforce_eager=eager)))
    print_table(head, rows)


if __name__ == "__main__":
    main()
