"""Seconds and GB/s of bringing a model's weights to an SGLang server, by each way, the proof of every push included.

    python benchmarks/weight_push.py --preset qwen3-0.6b --json OUT
    python benchmarks/weight_push.py --preset qwen3-8b --precision bfloat16 --json OUT      (on a GPU)

One server on this machine, random weights. ``push`` is what ``metrics.jsonl`` has as weight_sync/gb_per_s: full tensors
from the trainer's layout, sent, loaded. ``whole`` adds the probes that every push must pass. The best of the repeats.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import RolloutConfig, SglangConfig
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.rollout.served.server_group import ServerGroup
from megatron_s2d.rollout.sglang.backend import sglang_server_group
from megatron_s2d.train.megatron_model import MegatronModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="qwen3-0.6b")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--python", help="interpreter that has sglang; without it this one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    initialize_distributed()
    layout = build_layout(ParallelConfig())
    rows = []
    with tempfile.TemporaryDirectory() as name:
        tokenizer = load_tokenizer("task:modular_arithmetic", Path(name) / "tokenizer")
        spec = ModelConfig(preset=options.preset).resolve(len(tokenizer))
        policy = MegatronModel(spec, layout, precision=options.precision, max_tokens=4096, seed=1)

        def fleet(sync: str, urls=()) -> ServerGroup:
            settings = RolloutConfig(engine="sglang", sglang=SglangConfig(weight_sync=sync, python=options.python))
            directory = Path(name) / f"{sync}{len(urls)}"
            return sglang_server_group(
                policy.chunks, spec, layout, policy.score, settings, directory, urls=urls, tokenizer=tokenizer
            )

        started = fleet("disk")
        try:
            for sync in ("disk", "distributed", "tensor"):
                attached = fleet(sync, [server.url for server in started.pool.servers])  # with a first push
                times = []
                for version in range(1, options.repeats + 1):
                    begin = time.perf_counter()
                    attached.update_weights(policy.chunks, version)
                    times.append((attached.last_update.seconds, time.perf_counter() - begin))
                push, whole = map(min, zip(*times, strict=True))
                size = attached.last_update.num_bytes / 1e9
                rows.append({"preset": options.preset, "precision": options.precision, "sync": sync, "gigabytes": size,
                             "push_seconds": push, "gb_per_second": size / push, "whole_seconds": whole})  # fmt: skip
                attached.close()
        finally:
            started.close()
    print("| `weight_sync` | GB | transfer, s | GB/s | total, s |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| `{row['sync']}` | {row['gigabytes']:.2f} | {row['push_seconds']:.2f} | {row['gb_per_second']:.2f} "
              f"| {row['whole_seconds']:.2f} |")  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
