"""Updates a running SGLang server from training layouts of two ranks and compares log-probabilities.

Started by test_sglang_server.py with torchrun; arguments: address, file with its API key, directory, output file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from sglang_model import change, make_policy, make_requests, rollout_gap, rollout_settings

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.parallel import layout as layouts
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.rollout.sglang.backend import sglang_server_group

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {"data_parallel_size": 2},
}


def all_gather_object(value):
    """Return every rank's ``value``."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main() -> None:
    torch.set_num_threads(1)
    url, key_file, directory, output = sys.argv[1], *map(Path, sys.argv[2:])
    layouts.initialize_distributed()
    results = {}
    for name, fields in LAYOUTS.items():
        policy = make_policy(layouts.build_layout(ParallelConfig(**fields)))
        for sync in ("disk", "distributed", "tensor"):
            engine = ServedEngine(sglang_server_group(
                policy.chunks, policy.spec, policy.layout, policy.score_replicated,
                rollout_settings(sync, api_key_file=key_file),
                directory / name / sync, urls=[url],
            ))  # fmt: skip
            change(policy, 0.01)
            engine.update_weights(policy.chunks, 1)
            local_requests = make_requests()[policy.layout.dp_rank :: policy.layout.dp_size]
            samples = engine.generate(local_requests)
            merged = [sample for part in all_gather_object(samples) for sample in part]
            results[f"{name}/{sync}"] = {
                "gap": rollout_gap(policy, merged),
                "weight_sync/max_log_prob_diff": engine.metrics()["weight_sync/max_log_prob_diff"],
                "samples": len({sample.id for sample in merged}),
            }
            engine.close()
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    layouts.shutdown_distributed()


if __name__ == "__main__":
    main()
