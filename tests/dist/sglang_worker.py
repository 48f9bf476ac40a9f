"""The served engine at several layouts over toy servers of rank 0, in one launch of four ranks; writes results as JSON.

Started by test_sglang_layouts.py through torchrun. Some requests fail, so that the ranks have to recover together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from open_layout import open_layout

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "rollout"))
from fake_sglang import FakeServer, log_prob_table

from megatron_s2d.config.base import UserError
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import RolloutConfig, ServerConfig, SglangConfig
from megatron_s2d.data.sample_exchange import broadcast_samples
from megatron_s2d.models.build import build_model
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.parallel import layout as layouts
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.records import Prompt
from megatron_s2d.rollout.buffer import BufferPolicy, RolloutBuffer
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker
from megatron_s2d.rollout.sampling_client import single_turn
from megatron_s2d.rollout.served import server_pool
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.rollout.served.senders import Senders
from megatron_s2d.rollout.sglang import weight_sync
from megatron_s2d.rollout.sglang.admin import ServerControl
from megatron_s2d.rollout.sglang.backend import sglang_server_group

VOCAB_SIZE = 27
CASES = {
    "tiny-llama/one": {},
    "tiny-llama/tp2": {"tensor_model_parallel_size": 2},
    "tiny-llama/tp2pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tiny-moe/one": {},
    "tiny-moe/ep2pp2": {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tiny-moe/ep4tp2sp": {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True},
}


def requests() -> list[Request]:
    params = SamplingParams(6, (3,))
    generator = np.random.default_rng(1)
    batch = []
    for number in range(6):
        prompt = Prompt(f"p{number}", generator.integers(0, VOCAB_SIZE, 2 + number), "", "math", None, None)
        for group in range(2):
            seed = sample_seed(1, 0, prompt.id, group)
            batch.append(Request(f"p{number}#{group}@0", prompt, f"p{number}@0.0", seed, params))
    return batch


def run(preset: str, parallel: ParallelConfig, directory: Path) -> dict:
    with open_layout(parallel) as layout:
        return run_at(layout, preset, directory)


def run_at(layout: layouts.Layout, preset: str, directory: Path) -> dict:
    spec = dataclasses.replace(ModelConfig(preset=preset).resolve(VOCAB_SIZE), initializer_range=0.1)
    chunks = build_model(spec, layout, seed=3)

    def score(samples):
        embedding = dict(chain.from_iterable(export_buckets(chunks, spec, layout)))["model.embed_tokens.weight"]
        table = log_prob_table(embedding.numpy()).astype(np.float32)
        pairs = [(sample.token_ids[:-1], sample.token_ids[1:]) for sample in samples]
        return [np.concatenate([np.zeros(1, np.float32), table[pair]]) for pair in pairs]

    servers = [FakeServer(np.zeros((VOCAB_SIZE, 4), np.float32)) for _ in range(2)] if dist.get_rank() == 0 else []
    urls = broadcast_from_rank0(lambda: [server.url for server in servers])
    settings = RolloutConfig(
        engine="sglang", sglang=SglangConfig(bucket_bytes=20_000), server=ServerConfig(max_attempts=2, max_restarts=3)
    )
    senders = Senders.of(dist.get_rank() == 2)  # as on two machines
    with recorded_pushes() as pushes:
        group = sglang_server_group(chunks, spec, layout, score, settings, directory, urls=urls, senders=senders)
        engine = ServedEngine(group)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(1.5)
    engine.update_weights(chunks, 4)
    for server in servers:
        server.faults.extend(["stale", "nan", "500", "malformed"])
    cuts = {1: [], 2: [6], 4: [0, 6, 8]}[layout.dp_size]  # the first of four data-parallel ranks has no requests
    mine = np.split(np.arange(12), cuts)[layout.dp_rank]
    samples = engine.generate([requests()[index] for index in mine])
    for server in servers:
        server.score_faults.extend(["nan", "capped", "stale"])
    likeliest = engine.top_tokens(samples, 3)  # of this replica's own samples
    embedding = dict(chain.from_iterable(export_buckets(chunks, spec, layout)))["model.embed_tokens.weight"]
    table = log_prob_table(embedding.numpy())
    best = [np.argsort(-table[sample.token_ids[:-1]], axis=1)[:, :3] for sample in samples]
    top_agree = len(likeliest) == len(samples) and all(
        np.array_equal(top.ids[sample.prompt_length :], ids[sample.prompt_length - 1 :])
        for sample, top, ids in zip(samples, likeliest, best, strict=True)
    )
    faults_left = broadcast_from_rank0(lambda: sum(len(server.faults) for server in servers))
    for server in servers:
        server.control_faults["/update_weights_from_disk"] = "500"
    try:
        engine.update_weights(chunks, 5)
        refused = ""
    except UserError as error:
        refused = str(error)
    engine.close()
    partial = run_partial_rollouts(chunks, spec, layout, score, servers, urls, mine, directory)
    for server in servers:
        server.close()
    everyone = all_gather_object({sample.id: [sample.token_ids.tolist(), sample.finish_reason] for sample in samples})
    merged: dict = {}
    for part in everyone:
        for name, sample in part.items():
            assert merged.setdefault(name, sample) == sample
    gaps = [
        float(np.abs(sample.rollout_log_probs - expected)[sample.response_mask].max())
        for sample, expected in zip(samples, score(samples), strict=True)
    ]
    return partial | {
        "samples": merged,
        "gap": max(all_gather_object(max(gaps, default=0.0))),
        "refused": all_gather_object(refused),
        "faults_left": faults_left,
        "top_agree": all_gather_object(top_agree),
        "pushed_to": [[urls.index(url) for url in own] for own in all_gather_object(pushes["urls"])],
        "files": all_gather_object(pushes["files"]),
    }


@contextlib.contextmanager
def recorded_pushes() -> Iterator[dict[str, list[str]]]:
    """Record the servers that this rank has load weights, and the files of weights that it writes."""
    pushes, post, save = {"urls": [], "files": []}, ServerControl._post, weight_sync.save_file

    def recording_post(self, url, path, body):
        if path == "/update_weights_from_disk":
            pushes["urls"].append(url)
        post(self, url, path, body)

    def recording_save(contents, path, **options):
        pushes["files"].append(path.name)
        save(contents, path, **options)

    ServerControl._post, weight_sync.save_file = recording_post, recording_save
    try:
        yield pushes
    finally:
        ServerControl._post, weight_sync.save_file = post, save


def run_partial_rollouts(chunks, spec, layout, score, servers, urls, mine, directory: Path) -> dict:
    """Interrupt responses by a weight update and continue them."""
    settings = SglangConfig(bucket_bytes=20_000)
    stalled = set()
    for server in servers:
        server.control_faults.clear()
        server.holds = lambda body, n: (
            servers[0].weight_version.endswith("-0") and n == 2 and not stalled.add(body["rid"])
        )
    engine = ServedEngine(
        sglang_server_group(
            chunks,
            spec,
            layout,
            score,
            RolloutConfig(engine="sglang", sglang=settings),
            directory / "beside",
            urls=urls,
        )
    )
    mine_endless = [dataclasses.replace(requests()[index], params=SamplingParams(6, ())) for index in mine]
    tables = {0: table_of(chunks, spec, layout)}
    engine.start({request.id: single_turn(request) for request in mine_endless})
    broadcast_from_rank0(lambda: wait_for(lambda: len(stalled) == 12))
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(0.9)
    engine.pause(interrupt=True)
    engine.update_weights(chunks, 1)
    tables[1] = table_of(chunks, spec, layout)
    found = engine.wait(lambda ended: len(ended) == len(mine_endless))
    samples = broadcast_samples([found[request.id] for request in mine_endless] if found else [], layout)
    gap = max((split_gap(tables, sample) for sample in samples), default=0.0)
    mixed = sum(len(sample.weight_versions) == 2 for sample in samples) * (layout.groups.mp.rank() == 0)
    taken = run_buffer(engine, chunks, layout)
    engine.close()
    return {
        "taken": all_gather_object(taken),
        "partial": sorted({sample.id for part in all_gather_object(samples) for sample in part}),
        "partial_gap": max(all_gather_object(gap)),
        "mixed": sum(all_gather_object(mixed)),
    }


def run_buffer(engine, chunks, layout) -> list[list[list[str]]]:
    """Over-sample beside the trainer for three steps; return the ids of each step's samples, and its largest age."""
    worker = RolloutWorker(layout, engine, SamplingParams(6, ()), 7, None)
    prompts = [request.prompt for request in requests()[::2]]
    policy = BufferPolicy(max_staleness=2, async_mode="partial_rollout", over_sampling_ratio=1.5)
    buffer = RolloutBuffer(PromptDataLoader(prompts, 4, 5), worker, 4, 2, 3, policy)
    taken = []
    for step in range(1, 4):
        samples = buffer.next_batch(step).samples
        taken.append([sample.id for sample in samples])
        buffer.update_weights(chunks, 1 + step)
        assert 0 <= buffer.metrics()["rollout/staleness_max"] <= 2
    return taken


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def table_of(chunks, spec, layout) -> np.ndarray:
    embedding = dict(chain.from_iterable(export_buckets(chunks, spec, layout)))["model.embed_tokens.weight"]
    return log_prob_table(embedding.numpy())


def split_gap(tables: dict[int, np.ndarray], sample) -> float:
    """Largest difference from the log-probabilities under the weights that the sample's spans name."""
    worst = 0.0
    for span in sample.weight_versions:
        positions = np.arange(span.start, span.stop)
        expected = tables[span.version][sample.token_ids[positions - 1], sample.token_ids[positions]]
        worst = max(worst, float(np.abs(sample.rollout_log_probs[positions] - expected).max()))
    return worst


def all_gather_object(value):
    """Return every rank's ``value``."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main() -> None:
    torch.set_num_threads(1)
    server_pool._FIRST_PAUSE_SECONDS = 0.01
    layouts.initialize_distributed()
    output = Path(sys.argv[1])
    results = {}
    for name, fields in CASES.items():
        taken = fields.get("tensor_model_parallel_size", 1) * fields.get("pipeline_model_parallel_size", 1)
        parallel = ParallelConfig(**fields, data_parallel_size=4 // taken)
        results[name] = run(name.partition("/")[0], parallel, output.parent / name.replace("/", "-"))
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    layouts.shutdown_distributed()


if __name__ == "__main__":
    main()
