"""Seconds and GB/s of a weight update of an SGLang server by each method, including its checks.

    python benchmarks/weight_update.py --preset qwen3-0.6b --json OUT
    python benchmarks/weight_update.py --preset qwen3-8b --precision bfloat16 --json OUT      (on a GPU)

One server on this machine, random weights. ``transfer`` is weight_sync/gb_per_s in ``metrics.jsonl``: full tensors are
gathered from the trainer's layout, sent and loaded. ``total`` adds the checks of every update. The best of the repeats.
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
    parser.add_argument("--python", help="interpreter with sglang; default: this one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    initialize_distributed()
    layout = build_layout(ParallelConfig())
    rows = []
    with tempfile.TemporaryDirectory() as name:
        tokenizer = load_tokenizer("task:modular_arithmetic", Path(name) / "tokenizer")
        spec = ModelConfig(preset=options.preset).resolve(len(tokenizer))
        policy = MegatronModel(spec, layout, precision=options.precision, max_tokens=4096, seed=1)

        def server_group(sync: str, urls=()) -> ServerGroup:
            settings = RolloutConfig(engine="sglang", sglang=SglangConfig(weight_sync=sync, python=options.python))
            directory = Path(name) / f"{sync}{len(urls)}"
            return sglang_server_group(
                policy.chunks, spec, layout, policy.score, settings, directory, urls=urls, tokenizer=tokenizer
            )

        owner = server_group("disk")
        try:
            for sync in ("disk", "distributed", "tensor"):
                attached = server_group(sync, [server.url for server in owner.pool.servers])  # includes a first update
                times = []
                for version in range(1, options.repeats + 1):
                    begin = time.perf_counter()
                    attached.update_weights(policy.chunks, version)
                    times.append((attached.last_update.seconds, time.perf_counter() - begin))
                transfer, total = map(min, zip(*times, strict=True))
                size = attached.last_update.num_bytes / 1e9
                rows.append({
                    "preset": options.preset, "precision": options.precision, "sync": sync, "gigabytes": size,
                    "transfer_seconds": transfer, "gb_per_second": size / transfer, "total_seconds": total,
                })  # fmt: skip
                attached.close()
        finally:
            owner.close()
    print("| `weight_sync` | GB | transfer, s | GB/s | total, s |\n|---|---|---|---|---|")
    for row in rows:
        fields = ("gigabytes", "transfer_seconds", "gb_per_second", "total_seconds")
        print(f"| `{row['sync']}` | " + " | ".join(f"{row[field]:.2f}" for field in fields) + " |")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
