"""Seconds of a distillation step on 1, 2, 4 and 8 CPU ranks against what ``s2d simulate`` predicts for them.

    python benchmarks/simulate_validation.py

A step is the real training loop with samples exchanged, teacher forward passes, exact divergence, backward passes and
update on gloo ranks, forked from one process, without generation (the engine is a stand-in).

The machine of the prediction is calibrated apart from the steps that are predicted. One rank trains on fewer samples
than any of them, at three sizes, from which follow its rate in products, and what a step and a micro-batch cost beside
their tokens. Copies in memory give its bandwidth, and collectives of two ranks give bytes per second and latency of a
link. All numbers of ranks are predicted from that, one rank included.

Compared are processor seconds of a rank, which other programs on the machine change least. Every core is busy in every
case, with several copies of a case of fewer ranks, so that all cases share caches and memory alike. Cases take turns
for a few rounds, and the median of steps and rounds counts. Ranks beyond the cores share them, so the predicted wall
time is multiplied by ranks / cores; it holds only for a machine without other programs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from device_common import draw_weights
from stand_ins import GROUP_SIZE, buffer_of, opd_stage

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.hardware import AssumptionsConfig, Gpu
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.simulation import SimulationConfig
from megatron_s2d.config.training import CheckpointConfig, OptimizerConfig
from megatron_s2d.estimate.roofline import Machine
from megatron_s2d.parallel.layout import build_layout, initialize_distributed, shutdown_distributed
from megatron_s2d.stages.opd import DivergenceOpdSource, opd_objective
from megatron_s2d.stages.opd_teachers import distribution_teacher
from megatron_s2d.studies.simulate import Prediction, predict
from megatron_s2d.teachers.frozen import TeacherRouter
from megatron_s2d.train.loop import LoopSettings, train
from megatron_s2d.train.megatron_model import MegatronModel

SIZES = (1, 2, 4, 8)
NUM_GROUPS, RESPONSE_LENGTH = 16, 96
CALIBRATION_GROUPS = (2, 6, 8)  # on one rank: one, one and two micro-batches
STEPS = 4  # that are measured; the first connects, and the last saves
MEAN_RESPONSE, MEAN_PROMPT = 0.625 * RESPONSE_LENGTH, 13  # of the stand-ins
MICRO_BATCH_TOKENS, BYTES_PER_VALUE = 2048, 4  # float32
TOLERANCE = 0.25
LINK_VALUES, LINK_CALLS = 4 << 20, 8
OF_THE_STEP = ("teacher forward", "teacher states", "student passes", "KL", "update", "host")
MODELS = {
    "teacher": {"preset": "tiny-teacher", "num_layers": 4, "hidden_size": 384, "ffn_hidden_size": 1536,
                "num_attention_heads": 6, "num_query_groups": 6, "head_dim": 64, "vocab_size": 4096},
    "student": {"preset": "tiny-student", "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 1024,
                "num_attention_heads": 4, "num_query_groups": 4, "head_dim": 64, "vocab_size": 4096},
}  # fmt: skip


def simulation(num_groups: int, ranks: Sequence[int], fixed: Sequence[float] = (0.0, 0.0)) -> SimulationConfig:
    """Return the step as ``s2d simulate`` describes it. fixed: seconds of a step, and of a micro-batch."""
    return SimulationConfig(
        name="cpu", gpu="h200", num_gpus=list(ranks), parallel={"tensor_model_parallel_size": 1},
        train_batch_size=num_groups, num_generations=GROUP_SIZE, prompt_tokens=MEAN_PROMPT,
        response_tokens=round(MEAN_RESPONSE), micro_batch_tokens=MICRO_BATCH_TOKENS, **MODELS,
        measured={"step_seconds": fixed[0], "micro_batch_seconds": fixed[1]},
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
        MegatronModel(
            getattr(config, name).resolve(), layout, precision="float32", packed=True, max_tokens=MICRO_BATCH_TOKENS
        )
        for name in ("student", "teacher")
    )
    for model in (student, teacher):
        draw_weights(model)
    teacher.freeze()
    num_steps = STEPS + 2
    student.prepare_training(OptimizerConfig(), num_steps)
    stage = opd_stage(num_groups, RESPONSE_LENGTH, kl_estimator="full_vocab")
    buffer = buffer_of(layout, num_groups, RESPONSE_LENGTH, num_steps)
    router = TeacherRouter({None: teacher})
    source = Timed(DivergenceOpdSource(stage, student, buffer, router, None, 1))
    settings = LoopSettings(num_steps, CheckpointConfig(interval_steps=10**6))
    student.start_saving = lambda *_, **__: types.SimpleNamespace(is_written=lambda: True, finish=lambda: None)
    distributions = distribution_teacher(stage, student, router, None)
    path = directory / "stage"
    path.mkdir(exist_ok=True)
    train(
        student, source, opd_objective(stage), StageDirectory(path), settings, teacher=distributions,
        rollouts=buffer,
    )  # fmt: skip
    (directory / f"{rank}.json").write_text(json.dumps(np.diff(source.times, axis=0)[1:].tolist()))
    shutdown_distributed()


def measure(size: int, num_groups: int) -> np.ndarray:
    """Return [steps, 2]: processor seconds (mean over ranks) and wall seconds of each step, with every core busy."""
    copies = max(1, len(os.sched_getaffinity(0)) // size)
    return run_ranks(train_rank, size, (num_groups,), copies)


def run_ranks(function: Callable[..., None], size: int, arguments: tuple, copies: int = 1) -> np.ndarray:
    """Call ``function`` of ``copies`` jobs of ``size`` forked ranks; return [rows, 2] means of what the ranks wrote.

    The first column is the mean over all ranks, the second the largest of a job, the mean over jobs.
    """
    context = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as stack:
        directories = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(copies)]
        ranks = [
            context.Process(target=function, args=(rank, size, *arguments, directory))
            for directory in directories
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"a rank of {size} failed; its error is above")
        times = np.array(
            [[json.loads((path / f"{rank}.json").read_text()) for rank in range(size)] for path in directories]
        )  # [copies, ranks, rows, 2]
    return np.stack([times[..., 0].mean(axis=(0, 1)), times[..., 1].max(axis=1).mean(axis=0)], axis=1)


def use_link(rank: int, size: int, directory: Path) -> None:
    """Reduce gradients and gather weights as an update does, then small sums; write seconds of each."""
    torch.set_num_threads(1)
    initialize_distributed(rank=rank, world_size=size, rendezvous=directory / "store")
    gradients, part = torch.ones(LINK_VALUES), torch.empty(LINK_VALUES // size)
    small, rows = torch.ones(1), []
    for _ in range(LINK_CALLS):
        start = time.process_time()
        dist.reduce_scatter_tensor(part, gradients)
        dist.all_gather_into_tensor(gradients, part)
        middle = time.process_time()
        for _ in range(100):
            dist.all_reduce(small)
        rows.append((middle - start, (time.process_time() - middle) / 100))
    (directory / f"{rank}.json").write_text(json.dumps(rows[1:]))
    shutdown_distributed()


def link_rates() -> tuple[float, float]:
    """Return bytes per second and seconds of latency of a link between two ranks, in time of a core."""
    large, latency = np.median(run_ranks(use_link, 2, ()), axis=0)
    return 2 * 4 * LINK_VALUES / 2 / float(large - 2 * latency), float(latency)


def copied_bytes_per_second() -> float:
    """Return the bytes that one core reads and writes in a second of its time."""
    source = torch.ones(64 << 20, dtype=torch.uint8)
    target, begin = torch.empty_like(source), time.process_time()
    for _ in range(8):
        target.copy_(source)
    return 8 * 2 * len(source) / (time.process_time() - begin)


def calibrated(cpu_seconds: Sequence[float], rates: tuple[float, float, float]) -> tuple[Machine, tuple[float, float]]:
    """Return the machine, and the seconds of a step and of a micro-batch, that explain one rank's ``cpu_seconds``.

    cpu_seconds: of ``CALIBRATION_GROUPS``. rates: bytes per second of memory and link, latency. Three unknowns, none
    negative, from three steps.
    """
    rows, known = [], []
    for num_groups in CALIBRATION_GROUPS:
        # Predicted seconds are a / flops + b, and one more of each constant adds its count.
        values = []
        for flops, fixed in ((1e9, (0, 0)), (2e9, (0, 0)), (2e9, (1, 0)), (2e9, (0, 1))):
            (prediction,) = predict(simulation(num_groups, [1], fixed), machine(flops, *rates), BYTES_PER_VALUE)
            values.append(seconds(prediction))
        one, two, with_step, with_micro_batch = values
        rows.append((2 * (one - two), with_step - two, with_micro_batch - two))
        known.append(2 * two - one)
    # Errors count relative to the step's time.
    weights = 1 / np.array(cpu_seconds)
    fitted = non_negative(np.array(rows) * weights[:, None], (np.array(cpu_seconds) - known) * weights)
    return machine(1e9 / fitted[0], *rates), (float(fitted[1]), float(fitted[2]))


def non_negative(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the x >= 0 with the least squares of ``matrix @ x - values``: the best of all choices of zeros.

    matrix [rows, unknowns], values [rows].
    """
    best, least = np.zeros(matrix.shape[1]), np.inf
    for used in itertools.product((False, True), repeat=matrix.shape[1]):
        solution = np.zeros(matrix.shape[1])
        solution[list(used)] = np.linalg.lstsq(matrix[:, used], values)[0]
        error = float(np.sum((matrix @ solution - values) ** 2))
        if error < least and (solution >= 0).all():
            best, least = solution, error
    return best


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and fail if a prediction is off by more than a quarter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=SIZES)
    parser.add_argument("--groups", type=int, default=NUM_GROUPS, help="prompts of a step, at every number of ranks")
    parser.add_argument("--rounds", type=int, default=2, help="of all cases in turn")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    calibration = [(1, groups) for groups in CALIBRATION_GROUPS]
    cases = [*calibration, *((size, options.groups) for size in sorted(options.ranks))]
    rounds, rates = [], []
    for number in range(options.rounds):
        rates.append((copied_bytes_per_second(), *link_rates()))
        rounds.append([measure(*case) for case in cases])
        medians = [np.median(times[:, 0]) for times in rounds[-1]]
        print(f"round {number + 1}, CPU s: " + ", ".join(f"{cpu:.2f}" for cpu in medians), flush=True)
    measured = [np.median(np.concatenate(times), axis=0).tolist() for times in zip(*rounds, strict=True)]
    memory_rate, link_rate, latency = np.median(rates, axis=0).tolist()
    core, fixed = calibrated([cpu for cpu, _ in measured[: len(calibration)]], (memory_rate, link_rate, latency))
    print(
        f"one core, on {', '.join(str(groups * GROUP_SIZE) for groups in CALIBRATION_GROUPS)} responses: "
        f"{core.flops / 1e9:.1f} GFLOP/s, {fixed[0]:.2f} s a step and {fixed[1]:.2f} s a micro-batch; "
        f"{memory_rate / 1e9:.1f} GB/s copied, {link_rate / 1e9:.2f} GB/s and {1e3 * latency:.2f} ms of a link"
    )
    print("| ranks | CPU s a rank, predicted | measured | error | wall s, predicted | measured |")
    print("|---|---|---|---|---|---|")
    errors = []
    predictions = predict(simulation(options.groups, options.ranks, fixed), core, BYTES_PER_VALUE)
    for prediction, (cpu, wall) in zip(predictions, measured[len(calibration) :], strict=True):
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
