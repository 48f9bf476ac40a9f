"""Seconds of a distillation step on 1, 2, 4 and 8 CPU ranks against what ``s2d simulate`` predicts for them.

    python benchmarks/simulate_validation.py

A step is the real training loop with samples exchanged, teacher forward passes, exact divergence, backward passes and
update on gloo ranks, forked from one process, without generation (the engine is a stand-in). The machine of the
prediction is measured on one rank before: its rate in the layers and the divergence from a step on a quarter of the
samples, its memory's bandwidth by copies, of which a link gets a quarter. All numbers of ranks are predicted from that.
Cases take turns for a few rounds, and the least seconds of each count.

Compared are processor seconds of a rank, which other programs on the machine change least. Ranks beyond the cores share
them, so the predicted wall time is multiplied by ranks / cores; it holds only for a machine without other programs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path

import control_plane
import numpy as np
import torch
import torch.distributed as dist
from device_common import draw_weights

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.hardware import AssumptionsConfig, Gpu
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.simulation import SimulationConfig
from megatron_s2d.config.training import CheckpointConfig, OptimizerConfig
from megatron_s2d.estimate.roofline import Machine
from megatron_s2d.parallel.layout import build_layout, initialize_distributed, shutdown_distributed
from megatron_s2d.stages.opd import DivergenceOpdSource, distribution_teacher, opd_objective
from megatron_s2d.studies.simulate import Prediction, predict
from megatron_s2d.teachers.frozen import TeacherRouter
from megatron_s2d.train.loop import LoopSettings, train
from megatron_s2d.train.megatron_model import MegatronModel

SIZES = (1, 2, 4, 8)
NUM_GROUPS, RESPONSE_LENGTH = 8, 96
MEAN_RESPONSE, MEAN_PROMPT = 0.625 * RESPONSE_LENGTH, 13  # of control_plane's stand-ins
STEPS = 5  # of which the first warms up
TOLERANCE, LATENCY = 0.25, 1e-4
OF_THE_STEP = ("teacher forward", "teacher states", "student passes", "KL", "update", "host")
MODELS = {
    "teacher": {"preset": "tiny-teacher", "num_layers": 4, "hidden_size": 384, "ffn_hidden_size": 1536,
                "num_attention_heads": 6, "num_query_groups": 6, "head_dim": 64, "vocab_size": 4096},
    "student": {"preset": "tiny-student", "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 1024,
                "num_attention_heads": 4, "num_query_groups": 4, "head_dim": 64, "vocab_size": 4096},
}  # fmt: skip


def simulation(num_groups: int, ranks: Sequence[int]) -> SimulationConfig:
    """Return the step as ``s2d simulate`` describes it."""
    return SimulationConfig(
        name="cpu", gpu="h200", num_gpus=list(ranks), parallel={"tensor_model_parallel_size": 1},
        train_batch_size=num_groups, num_generations=control_plane.GROUP_SIZE, prompt_tokens=MEAN_PROMPT,
        response_tokens=round(MEAN_RESPONSE), micro_batch_tokens=2048, **MODELS,
    )  # fmt: skip


def machine(flops: float, memory_rate: float, link_rate: float, latency: float) -> Machine:
    """Return a core of this machine as a GPU of ``s2d simulate``, with measured rates."""
    gpu = Gpu("CPU core", 2**40, flops, None, memory_rate, link_rate, (0, 0))
    rates = {"matmul_efficiency": 1.0, "memory_efficiency": 1.0, "link_efficiency": 1.0}
    return Machine(gpu, AssumptionsConfig(**rates, network_bandwidth=link_rate, gpus_per_node=64, latency=latency))


def seconds(prediction: Prediction) -> float:
    """Return the predicted seconds of what is measured."""
    return sum(prediction.seconds[phase] for phase in OF_THE_STEP)


# -------------------------------------------------------------------------------- measured


class Timed:
    """A source that notes process and wall time at the start of each step."""

    def __init__(self, source: DivergenceOpdSource):
        self._source, self.times = source, []

    def resume(self, state: dict) -> None:
        self._source.resume(state)

    def step(self, step: int):
        dist.barrier()
        self.times.append((time.process_time(), time.perf_counter()))
        return self._source.step(step)


def train_rank(rank: int, size: int, num_groups: int, directory: Path) -> None:
    """Train for a few steps as ``rank`` of ``size`` and write the seconds of each."""
    torch.set_num_threads(1)
    initialize_distributed(rank=rank, world_size=size, rendezvous=directory / "store")
    layout = build_layout(ParallelConfig(data_parallel_size=size))
    config = simulation(num_groups, [size])
    student, teacher = (
        MegatronModel(getattr(config, name).resolve(), layout, precision="float32", packed=True, max_tokens=2048)
        for name in ("student", "teacher")
    )
    for model in (student, teacher):
        draw_weights(model)
    teacher.freeze()
    student.prepare_training(OptimizerConfig(), STEPS + 1)
    stage = control_plane.opd_stage(num_groups, RESPONSE_LENGTH, kl_estimator="full_vocab")
    buffer = control_plane.buffer_of(layout, num_groups, RESPONSE_LENGTH, STEPS + 1)
    router = TeacherRouter({None: teacher})
    source = Timed(DivergenceOpdSource(stage, student, buffer, router, None, 1))
    settings = LoopSettings(STEPS + 1, CheckpointConfig(interval_steps=10**6))
    student.start_saving = lambda *_, **__: types.SimpleNamespace(is_written=lambda: True, finish=lambda: None)
    distributions = distribution_teacher(stage, student, router, None)
    path = directory / "stage"
    path.mkdir(exist_ok=True)
    train(
        student, source, opd_objective(stage), StageDirectory(path), settings, teacher=distributions,
        engine=buffer.worker.engine,
    )  # fmt: skip
    (directory / f"{rank}.json").write_text(json.dumps(np.diff(source.times, axis=0)[1:].tolist()))
    shutdown_distributed()


def measure(size: int, num_groups: int) -> tuple[float, float]:
    """Return processor seconds (mean over ranks) and wall seconds of a step: the least of those after the first."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ranks = [context.Process(target=train_rank, args=(rank, size, num_groups, directory)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"a rank of {size} failed; its error is above")
        times = np.array([json.loads((directory / f"{rank}.json").read_text()) for rank in range(size)])
    return float(times[:, :, 0].mean(axis=0).min()), float(times[:, :, 1].max(axis=0).min())


def copied_bytes_per_second() -> float:
    """Return the bytes that one core reads and writes in a second of its time."""
    source = torch.ones(64 << 20, dtype=torch.uint8)
    target, begin = torch.empty_like(source), time.process_time()
    for _ in range(8):
        target.copy_(source)
    return 8 * 2 * len(source) / (time.process_time() - begin)


def calibrated(num_groups: int, cpu_seconds: float, memory_rate: float) -> Machine:
    """Return the machine whose prediction for one rank and ``num_groups`` is ``cpu_seconds``."""
    config, rates = simulation(num_groups, [1]), (memory_rate, memory_rate / 4, LATENCY)
    # Every rate but the products' is fixed, so the predicted seconds are a / flops + b.
    one, two = (seconds(predict(config, machine(flops, *rates))[0]) for flops in (1e9, 2e9))
    return machine(2 * (one - two) * 1e9 / (cpu_seconds - (2 * two - one)), *rates)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and fail if a prediction is off by more than a quarter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=SIZES)
    parser.add_argument("--groups", type=int, default=NUM_GROUPS, help="prompts of a step, at every number of ranks")
    parser.add_argument("--rounds", type=int, default=3, help="of all cases in turn; the least seconds of each count")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    few, cores = max(1, options.groups // 4), len(os.sched_getaffinity(0))
    cases = [(1, few), *((size, options.groups) for size in sorted(options.ranks))]
    rounds, memory_rate = [], 0.0
    for number in range(options.rounds):
        memory_rate = max(memory_rate, copied_bytes_per_second())
        rounds.append([measure(*case) for case in cases])
        print(f"round {number + 1}, CPU s: " + ", ".join(f"{cpu:.2f}" for cpu, _ in rounds[-1]), flush=True)
    (calibration, _), *measured = np.min(rounds, axis=0).tolist()
    core = calibrated(few, calibration, memory_rate)
    print(f"one core: {core.flops / 1e9:.1f} GFLOP/s in a step, {core.memory_rate / 1e9:.1f} GB/s copied")
    print("| ranks | CPU s a rank, predicted | measured | error | wall s, predicted | measured |")
    print("|---|---|---|---|---|---|")
    errors = []
    for prediction, (cpu, wall) in zip(predict(simulation(options.groups, options.ranks), core), measured, strict=True):
        expected = seconds(prediction)
        errors.append(expected / cpu - 1)
        print(
            f"| {prediction.num_gpus} | {expected:.2f} | {cpu:.2f} | {100 * errors[-1]:+.0f} % "
            f"| {expected * max(1.0, prediction.num_gpus / cores):.2f} | {wall:.2f} |"
        )
    if max(map(abs, errors)) > TOLERANCE:
        raise SystemExit(f"a prediction is off by more than {100 * TOLERANCE:.0f} %")


if __name__ == "__main__":
    main(sys.argv[1:])
