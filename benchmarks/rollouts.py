"""Rollout throughput with an SGLang server, compared with SGLang's own benchmark client at the same load.

    python benchmarks/rollouts.py --preset tiny-student --json OUT
    python benchmarks/rollouts.py --preset qwen3-1.7b --precision bfloat16 --requests 512 --json OUT      (on a GPU)

Both send random prompts to the same server, with the same number of requests in flight, for responses of a fixed length
with log-probabilities. Ours also checks every reply and builds samples. Rounds alternate, and the best round of each
counts. Bar: 0.95 of the client's rate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import RolloutConfig, SglangConfig
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.records import Prompt
from megatron_s2d.rollout.engine import Request, SamplingParams
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.rollout.sglang.backend import sglang_server_group
from megatron_s2d.train.megatron_model import MegatronModel


def make_requests(options: argparse.Namespace, vocab_size: int, round_number: int) -> list[Request]:
    """Return prompts that differ between rounds, so that the server has no cached prefix of them."""
    generator = np.random.default_rng(round_number)
    params = SamplingParams(options.response_tokens, ())
    requests = []
    for number in range(options.requests):
        token_ids = generator.integers(0, vocab_size, options.prompt_tokens)
        prompt = Prompt(f"r{round_number}p{number}", token_ids, "", "math", None, None)
        requests.append(Request(f"{prompt.id}#0@0", prompt, prompt.id, number, params))
    return requests


def client_rate(options: argparse.Namespace, url: str, tokenizer: Path, seed: int) -> float:
    """Return the tokens per second measured by SGLang's client."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "out.jsonl"
        command = [
            options.python or sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url,
            "--model", str(tokenizer), "--tokenizer", str(tokenizer),
            "--dataset-name", "random-ids", "--tokenize-prompt", "--num-prompts", str(options.requests),
            "--random-input-len", str(options.prompt_tokens), "--random-output-len", str(options.response_tokens),
            "--random-range-ratio", "1", "--max-concurrency", str(options.concurrency), "--return-logprob",
            "--temperature", "1", "--disable-stream", "--disable-tqdm", "--seed", str(seed), "--flush-cache",
            "--output-file", str(output),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(output.read_text().splitlines()[-1])["output_throughput"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny-student")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--python", help="interpreter with sglang; default: this one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    initialize_distributed()
    layout = build_layout(ParallelConfig())
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer = load_tokenizer("task:modular_arithmetic", directory / "tokenizer")
        tokenizer.save_pretrained(directory / "client")
        spec = ModelConfig(preset=options.preset).resolve(len(tokenizer))
        policy = MegatronModel(spec, layout, precision=options.precision, max_tokens=8192, seed=1)
        settings = SglangConfig(python=options.python)
        engine = ServedEngine(sglang_server_group(
            policy.chunks, spec, layout, policy.score, RolloutConfig(engine="sglang", sglang=settings),
            directory / "servers", tokenizer=tokenizer,
        ))  # fmt: skip
        try:
            (url,) = engine.urls
            rates: dict[str, list[float]] = {"rollouts": [], "client": []}
            for round_number in range(options.repeats + 1):  # the first is warm-up
                requests = make_requests(options, len(tokenizer), round_number)
                begin = time.perf_counter()
                samples = engine.generate(requests)
                rates["rollouts"].append(sum(s.response_length for s in samples) / (time.perf_counter() - begin))
                rates["client"].append(client_rate(options, url, directory / "client", round_number))
        finally:
            engine.close()
    best = {name: max(values[1:]) for name, values in rates.items()}
    row = {"preset": options.preset, "precision": options.precision, "requests": options.requests,
           "concurrency": options.concurrency, "tokens": [options.prompt_tokens, options.response_tokens],
           "tokens_per_second": best, "ratio": best["rollouts"] / best["client"]}  # fmt: skip
    print(json.dumps(row, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(row))


if __name__ == "__main__":
    main()
