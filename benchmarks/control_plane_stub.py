"""Host and device memory of one rank of 1,024 and of 8,192, on a CUDA runtime without a GPU (docs/measure.md).

    python benchmarks/control_plane_stub.py

The rank runs two steps of GRPO with 8 responses on every data-parallel rank, at tensor parallelism 8: the update has
8 x 128 and 8 x 1,024 responses. Bar, checked here: neither memory grows by more than 10 %.
"""

from __future__ import annotations

import resource
import time

from megatron_s2d.config.base import parse
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.estimate.stage_memory import StageShape
from megatron_s2d.measure.limits import Limits
from megatron_s2d.measure.measure import measure_stage

TENSOR_PARALLEL, GROUPS_PER_RANK, GROUP_SIZE = 8, 2, 4
PROMPT, RESPONSE = 128, 896
MEMORY_GROWTH = 0.10


def workflow(ranks: int) -> WorkflowConfig:
    """GRPO of a small model on ``ranks`` ranks."""
    data_parallel = ranks // TENSOR_PARALLEL
    model = {"preset": "tiny-teacher", "num_layers": 4, "hidden_size": 512, "num_attention_heads": 8}
    model |= {"num_query_groups": 8, "ffn_hidden_size": 2048, "vocab_size": 32_000, "max_position_embeddings": 2048}
    micro_batch = {"max_tokens_per_gpu": 2048, "sequence_packing": True}
    task = {"type": "task", "num_operations": 2, "num_prompts": 512}
    document = {
        "name": "control_plane",
        "tokenizer": "task:modular_arithmetic",
        "precision": "bfloat16",
        "models": {"model": model},
        "data": {"pool": task | {"split": "pool"}, "problems": task | {"split": "eval"}},
        "stages": {
            "base": {
                "type": "sft", "role": "base", "model": "model", "data": "pool", "steps": 1, "global_batch_size": ranks,
                "micro_batch": micro_batch,
            },
            "measured": {
                "type": "grpo", "role": "rl", "init": "base", "prompts": "pool", "steps": 2,
                "num_generations": GROUP_SIZE, "train_batch_size": GROUPS_PER_RANK * data_parallel,
                "sampling": {"max_response_length": RESPONSE},
                "micro_batch": micro_batch,
            },
        },
        "arms": {"arm": "measured"},
        "evaluation": {"prompts": "problems"},
        "parallel": {
            "tensor_model_parallel_size": TENSOR_PARALLEL, "data_parallel_size": data_parallel,
            "sequence_parallel": True,
        },
    }  # fmt: skip
    return parse(WorkflowConfig, document, f"{ranks} ranks")


def main() -> None:
    """Measure both sizes, print a table, and check the bar."""
    print("| ranks | responses of the update | host memory, MB | device memory, MB | seconds |")
    print("|---|---|---|---|---|")
    host, device = [], []
    for ranks in (1024, 8192):
        config = workflow(ranks)
        groups = config.stages["measured"].train_batch_size
        shape = StageShape(groups * GROUP_SIZE, 1, groups * GROUP_SIZE, groups, PROMPT, RESPONSE)
        start = time.perf_counter()
        limits = Limits(micro_batches=GROUPS_PER_RANK * GROUP_SIZE, decoded_tokens=2)
        measurement = measure_stage(config, "measured", shape, 0, limits=limits)
        # Of the largest child so far: the second rank is one of more ranks.
        host.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
        device.append(measurement.peak_bytes)
        print(
            f"| {ranks:,} | {shape.responses:,} | {host[-1] / 1e6:,.0f} | {device[-1] / 1e6:,.0f} "
            f"| {time.perf_counter() - start:.0f} |",
            flush=True,
        )
    for name, (small, large) in (("host", host), ("device", device)):
        if large > small * (1 + MEMORY_GROWTH):
            raise SystemExit(f"{name} memory grows by {100 * (large / small - 1):.0f} %")


if __name__ == "__main__":
    main()
