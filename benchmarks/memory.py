"""Memory of a training step compared with the estimate of ``s2d plan``: persistent tensors and the peak of a step.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --cases dense dense-full dense-bf16 ... [--json OUT]
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/memory.py --cases tp2sp pp2 dp2 ep2

A GPU has other cases (``GPU_CASES``) and reports the peak of the CUDA allocator.

Persistent: the total size of the storages of parameters, gradient buffers and optimizer state. Peak: the largest total
of PyTorch's CPU allocations beyond that during one step (or generation), from the profiler's events, including copies
inside operators. One row per case and pipeline rank; a case runs if its layout has as many ranks as were started.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from device_common import draw_weights
from torch.profiler import ProfilerActivity, profile

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import Fp8Config
from megatron_s2d.config.recompute import Recompute
from megatron_s2d.config.training import OptimizerConfig, RolloutConfig, SamplingConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.estimate.layers import Build, MicroBatchShape, ModelShard
from megatron_s2d.estimate.memory import (
    TeacherInputs,
    Workload,
    frozen_memory,
    generate_phases,
    train_phase,
    trained_memory,
    update_phase,
)
from megatron_s2d.objectives.distill import divergence_objective, sft_objective
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import build_layout, initialize_distributed, shutdown_distributed
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import Request, SamplingParams
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter
from megatron_s2d.train.megatron_model import MegatronModel

DENSE = {
    "family": "qwen3", "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 8,
    "num_query_groups": 4, "head_dim": 40, "vocab_size": 8000, "max_position_embeddings": 1024, "rope_theta": 1e4,
}  # fmt: skip
MOE = DENSE | {"family": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_ffn_hidden_size": 192}
TIED = DENSE | {"tie_word_embeddings": True, "vocab_size": 30_000}
LLAMA = DENSE | {"family": "llama"}
TEACHER = DENSE | {"num_layers": 2, "hidden_size": 384, "ffn_hidden_size": 1024}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its layout, and its training data."""

    model: dict
    layout: str = ""  # such as tp2sp, pp2, dp2, ep2; empty: one rank
    precision: str = "float32"
    recompute: str = "none"
    rows: int = 8  # samples of an update
    length: int = 192
    max_tokens: int = 10**6
    task: str = "supervised"  # or opd, generate
    fp8: str | None = None

    @property
    def parallel(self) -> ParallelConfig:
        sizes = {key: int(value) for key, value in re.findall(r"(tp|pp|dp|ep)(\d)", self.layout)}
        return ParallelConfig(
            tensor_model_parallel_size=sizes.get("tp", 1),
            pipeline_model_parallel_size=sizes.get("pp", 1),
            expert_model_parallel_size=sizes.get("ep", 1),
            data_parallel_size=sizes.get("dp", 1) * (1 if "tp" in sizes else sizes.get("ep", 1)),
            sequence_parallel="sp" in self.layout,
        )


CASES = {
    "dense": Case(DENSE),
    "dense-full": Case(DENSE, recompute="full"),
    "dense-selective": Case(DENSE, recompute="selective"),
    "dense-bf16": Case(DENSE, precision="bfloat16"),
    "dense-bf16-full": Case(DENSE, precision="bfloat16", recompute="full"),
    "tied": Case(TIED),
    "llama": Case(LLAMA),
    "moe": Case(MOE),
    "moe-bf16": Case(MOE, precision="bfloat16"),
    "opd": Case(DENSE, task="opd"),
    "opd-batches": Case(DENSE, task="opd", max_tokens=400),
    "generate": Case(DENSE, task="generate", rows=64, length=128),
    "generate-bf16": Case(DENSE, task="generate", rows=64, length=128, precision="bfloat16"),
    "tp2": Case(DENSE, "tp2"),
    "tp2sp": Case(DENSE, "tp2sp"),
    "tp2sp-full": Case(DENSE, "tp2sp", recompute="full"),
    "pp2": Case(DENSE, "pp2", max_tokens=400),
    "dp2": Case(DENSE, "dp2"),
    "dp2-bf16": Case(DENSE, "dp2", precision="bfloat16"),
    "ep2": Case(MOE, "ep2"),
    "moe-tp2sp": Case(MOE, "tp2spep2"),
    "opd-tp2sp": Case(DENSE, "tp2sp", task="opd"),
    "generate-tp2": Case(DENSE, "tp2", task="generate", rows=64, length=128),
}


MEDIUM = {"preset": "qwen3-1.7b", "vocab_size": 151_936}
_LONG = {"precision": "bfloat16", "rows": 4, "length": 4096, "max_tokens": 8192}
GPU_CASES = {
    "1.7b": Case(MEDIUM, **_LONG),
    "1.7b-full": Case(MEDIUM, recompute="full", **_LONG),
    "1.7b-fp8": Case(MEDIUM, fp8="tensorwise", **_LONG),
    "1.7b-opd": Case(MEDIUM, task="opd", **_LONG),
    "1.7b-generate": Case(MEDIUM, precision="bfloat16", task="generate", rows=256, length=1024),
}
if device.capabilities().cuda:
    CASES = (
        GPU_CASES
        if device.capabilities().transformer_engine
        else {name: case for name, case in GPU_CASES.items() if case.fp8 is None}
    )


def make_samples(case: Case) -> list[Sample]:
    """Return samples of one length, the second half of each a response."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(case.rows):
        samples.append(
            Sample(
                id=str(index), prompt_id=str(index), group_id=str(index), domain="test", seed=index,
                token_ids=rng.integers(0, case.model["vocab_size"], case.length),
                response_mask=np.arange(case.length) >= case.length // 2, temperature=1.0, finish_reason="stop",
            )
        )  # fmt: skip
    return samples


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the distinct storages of ``tensors``."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def persistent_tensors(policy: MegatronModel) -> Iterator[torch.Tensor]:
    """Yield parameters and, for a trainable model, gradient buffers, master weights and Adam's moments."""
    for chunk in policy.chunks:
        yield from chunk.parameters()
    if policy.trainable is None:
        return
    for chunk in policy.trainable.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            yield buffer.param_data
            yield buffer.grad_data
    wrapped = policy.trainable.optimizer
    for optimizer in getattr(wrapped, "chained_optimizers", [wrapped]):
        for group in optimizer.shard_fp32_from_float16_groups:
            yield from (tensor for tensor in group if tensor is not None)
        for state in optimizer.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of bytes allocated during ``run``, on a CPU without earlier allocations.

    Allocations without a recorded free are ignored: gloo frees its copies in threads that the profiler does not record.
    On a GPU: the peak of its allocator, including earlier allocations.
    """
    if device.capabilities().cuda:
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes, live = [], {}
    for time, pointer, size in sorted(_allocations(profiler.profiler.kineto_results.experimental_event_tree())):
        if size > 0:
            live[pointer] = (time, size)
        elif pointer in live:
            begin, size = live.pop(pointer)
            changes += [(begin, size), (time, -size)]
    current = peak = 0
    for _, size in sorted(changes):
        current += size
        peak = max(peak, current)
    return peak


def _allocations(events: Iterable) -> Iterator[tuple[int, int, int]]:
    """Yield (nanoseconds, address, bytes) of every allocation; negative bytes for a free."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def build_policy(model: dict, case: Case, layout, seed: int = 1) -> MegatronModel:
    """Build a model of the case at its layout."""
    options = ModelConfig(recompute=case.recompute, **model)
    on_gpu = device.capabilities().cuda
    policy = MegatronModel(
        options.resolve(), layout, precision=case.precision, max_tokens=case.max_tokens, seed=None if on_gpu else seed,
        options=options, fp8=None if case.fp8 is None else Fp8Config(recipe=case.fp8),
    )  # fmt: skip
    if on_gpu:
        draw_weights(policy)
    return policy


def measure(case: Case) -> dict[str, object]:
    """Measure and estimate persistent and peak bytes of this rank."""
    layout = build_layout(case.parallel)
    policy = build_policy(case.model, case, layout)
    shard = ModelShard(policy.spec, case.parallel, layout.pp_rank)
    capabilities, size = device.capabilities(), 4 if case.precision == "float32" else 2
    build = Build(
        size, fused=capabilities.transformer_engine, recompute=Recompute(case.recompute), fp8=case.fp8 is not None
    )
    if case.task == "generate":
        persistent, estimate = [frozen_memory(shard, build, "student")], generate_estimate(case, shard, build)
        step = generation(case, policy, layout)
        step()
    else:
        policy.prepare_training(OptimizerConfig(), 10)
        persistent = [trained_memory(shard, build)]
        step, work, states, teacher = training(case, policy, layout)
        step()
        train = train_phase(shard, build, work, on_gpu=capabilities.cuda, teacher=states)
        estimate = max(
            train, update_phase(shard, build, on_gpu=capabilities.cuda), key=lambda phase: sum(phase.values())
        )
        if teacher is not None:
            persistent.append(frozen_memory(ModelShard(teacher.spec, case.parallel, shard.pp_rank), build, "teacher"))
            policy_tensors = [*persistent_tensors(policy), *persistent_tensors(teacher)]
    tensors = list(persistent_tensors(policy))
    if case.task == "opd":
        tensors = policy_tensors
    peak, persistent_bytes = peak_bytes(step), storage_bytes(tensors)
    return {
        "pp_rank": shard.pp_rank,
        "persistent": persistent_bytes,
        "persistent_estimate": sum(item.total for item in persistent),
        "peak": peak - persistent_bytes if capabilities.cuda else peak,
        "peak_estimate": sum(estimate.values()),
        "parts": estimate,
    }


def training(case: Case, policy: MegatronModel, layout):
    """Return (one update as a function, its workload, the teacher inputs of the estimate, the teacher)."""
    batch = make_samples(case)
    column = "divergence_weight" if case.task == "opd" else "supervised_weight"
    columns = {column: [1e-3] * len(batch)}
    teacher = source = states = None
    objective = sft_objective()
    if case.task == "opd":
        model = {"preset": "qwen3-4b", "vocab_size": 151_936} if device.capabilities().cuda else TEACHER
        teacher = build_policy(model, case, layout, seed=2)
        teacher.freeze()
        source = FullTeacher(policy, TeacherRouter({None: teacher}))
        states = TeacherInputs("hidden", teacher.spec)
        objective = divergence_objective("reverse_kl")
    count = sum(len(sample.token_ids) for sample in batch)

    def step() -> None:
        update = MiniBatch(batch, columns)
        batches = policy.pack(batch, columns)
        distributions = source.distributions(update, batches) if source else None
        policy.forward_backward(batches, objective, distributions, num_tokens=count)
        policy.optim_step()

    packed = policy.pack(batch, columns)
    largest = max(packed, key=lambda item: item.token_ids.numel())
    shape = MicroBatchShape(largest.token_ids.numel(), largest.token_ids.shape[1], int(largest.response_mask.sum()))
    return step, Workload(shape, len(packed)), states, teacher


def generation(case: Case, policy: MegatronModel, layout) -> Callable[[], object]:
    """Return a function that generates ``rows`` responses of full length, four per prompt."""
    engine = MegatronEngine(policy.chunks, policy.spec.vocab_size, layout)
    rng = np.random.default_rng(0)
    params = SamplingParams(max_new_tokens=case.length // 2, stop_token_ids=(), temperature=1.0)
    prompts = [
        Prompt(str(i), rng.integers(0, policy.spec.vocab_size, case.length // 2), "", "test", None, None)
        for i in range(case.rows // 4)
    ]
    requests = [Request(f"{p.id}/{k}", p, p.id, i, params) for i, p in enumerate(prompts) for k in range(4)]
    return lambda: engine.generate(requests)


def generate_estimate(case: Case, shard: ModelShard, build: Build) -> dict[str, int]:
    """Return the estimate of ``generation``."""
    half = case.length // 2
    phases = generate_phases(
        shard, build, requests=case.rows, prompts=case.rows // 4, prompt_length=half,
        sampling=SamplingConfig(max_response_length=half), rollout=RolloutConfig(),
    )  # fmt: skip
    return max(phases.values(), key=lambda phase: sum(phase.values()))


def error(estimate: float, measured: float) -> float:
    """Return the relative error of an estimate."""
    return estimate / measured - 1


def row_of(name: str, result: dict) -> dict[str, object]:
    """Return a case's measurement with the errors of persistent memory, of the peak beyond it, and of their sum."""
    total = result["persistent"] + result["peak"]
    estimate = result["persistent_estimate"] + result["peak_estimate"]
    return (
        {"case": name}
        | result
        | {
            "persistent_error": error(result["persistent_estimate"], result["persistent"]),
            "peak_error": error(result["peak_estimate"], result["peak"]),
            "total_error": error(estimate, total),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), help="default: all that need the started number of ranks"
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    initialize_distributed()
    names = arguments.cases or [name for name in CASES if CASES[name].parallel.world_size == dist.get_world_size()]
    rows = []
    for name in names:
        by_rank: list[dict] = [{}] * dist.get_world_size()
        dist.all_gather_object(by_rank, measure(CASES[name]))
        for pp_rank in range(CASES[name].parallel.pipeline_model_parallel_size):
            fullest = max((item for item in by_rank if item["pp_rank"] == pp_rank), key=lambda item: item["peak"])
            rows.append(row_of(name, fullest))
    if dist.get_rank() == 0:
        print("| case | pp rank | persistent, MiB | error | peak beyond, MiB | error | total |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            persistent, peak = (f"{row[key] / 2**20:.1f}" for key in ("persistent", "peak"))
            errors = [f"{100 * row[f'{key}_error']:+.1f} %" for key in ("persistent", "peak", "total")]
            name = f"{row['case']} | {row['pp_rank']}"
            print(f"| {name} | {persistent} | {errors[0]} | {peak} | {errors[1]} | {errors[2]} |")
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    shutdown_distributed()


if __name__ == "__main__":
    main()
