"""What each payload of a teacher service costs: bytes a response token, seconds a step, and when a copy is cheaper.

    OMP_NUM_THREADS=1 python benchmarks/teacher_service.py DIRECTORY

starts ``s2d serve-teacher`` with a random model in DIRECTORY and lets a student train one update after another against
it, asking for each payload in turn, and against the same teacher in its own process. The last table has no measurement:
it says from which bandwidth on the transfer of a token takes less than the teacher's forward pass on the trainer's
GPUs, at 40 % of an H200's bfloat16 peak. CPU seconds compare payloads; they say nothing about GPUs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.presets import PRESETS
from megatron_s2d.config.teacher_service import TeacherServiceConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.objectives.distill import divergence_objective
from megatron_s2d.objectives.terms import ResponseCounts, token_weights
from megatron_s2d.parallel.layout import Layout, build_layout, initialize_distributed, shutdown_distributed
from megatron_s2d.records import Sample
from megatron_s2d.stages.opd_teachers import AnyTeachers
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter
from megatron_s2d.teachers.service.client import TeacherClient
from megatron_s2d.teachers.service.teachers import ServiceTeachers, ServiceTopK, Wanted
from megatron_s2d.teachers.service.wire import bytes_per_token
from megatron_s2d.train.megatron_model import MegatronModel

VOCAB, TOP_K, GROUPS, GROUP_SIZE, PROMPT, RESPONSE, UPDATES = 25, 8, 4, 4, 16, 96, 4
PAYLOADS = {
    "sampled": Wanted("sampled"),
    "top_k of the teacher": Wanted("top_k", TOP_K),
    "top_k of the student": Wanted("top_k", TOP_K, "student"),
    "hidden": Wanted("hidden"),
}
PEAK, EFFICIENCY = 989e12, 0.4  # of an H200 in bfloat16, operations a second
EXAMPLES = (("Qwen3-8B", 8.2e9, 4096), ("Qwen3-32B", 32.8e9, 5120), ("Llama-3.3-70B", 70.6e9, 8192))


def model(preset: str, seed: int, layout: Layout) -> MegatronModel:
    spec = ModelConfig(preset=preset, vocab_size=VOCAB).resolve()
    return MegatronModel(spec, layout, precision="float32", max_tokens=2048, seed=seed)


def batch(seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    mask = np.arange(PROMPT + RESPONSE) >= PROMPT
    return [
        Sample(
            f"{seed}/{group}/{index}", str(group), str(group), "math", 0,
            rng.integers(0, VOCAB, PROMPT + RESPONSE), mask, 1.0, "stop",
        )
        for group in range(GROUPS)
        for index in range(GROUP_SIZE)
    ]  # fmt: skip


def steps(student: MegatronModel, teachers: AnyTeachers, source: object) -> Iterator[float]:
    """Yield the seconds of each step: scores or distributions, forward, backward and update."""
    objective = divergence_objective("forward_kl", tail="bucket" if isinstance(source, ServiceTopK) else None)
    for number in range(UPDATES):
        samples = batch(number)
        start = time.perf_counter()
        if isinstance(teachers, ServiceTeachers):
            teachers.begin_step(samples)
        if source is None:
            teachers.score(samples, holders=student.layout)
        lengths = [sample.response_length for sample in samples]
        columns = {"divergence_weight": token_weights(lengths, "token_mean", ResponseCounts.of(lengths))}
        if source is not None:
            batches = student.pack(samples, columns)
            distributions = source.distributions(MiniBatch(samples, columns), batches)  # type: ignore[attr-defined]
            student.forward_backward(batches, objective, distributions, num_tokens=sum(s.length for s in samples))
            student.optim_step()
        yield time.perf_counter() - start


def start_server(directory: Path) -> tuple[subprocess.Popen, str]:
    settings = ["tokenizer=task:modular_arithmetic", "precision=float32", "port=0"]
    command = [sys.executable, "-m", "megatron_s2d.cli", "serve-teacher", "--model", str(directory)]
    command += [part for setting in settings for part in ("--set", setting)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[2].rstrip(",")


def measure(directory: Path, preset: str) -> None:
    layout = build_layout(ParallelConfig())
    teacher = model(preset, 2, layout)
    teacher.save(directory / "teacher", {}, with_optimizer=False)
    teacher.freeze()
    hidden = int(PRESETS[preset]["hidden_size"])
    process, url = start_server(directory / "teacher")
    tokens = GROUPS * GROUP_SIZE * RESPONSE
    print(f"{tokens} response tokens a step, teacher {preset} (hidden {hidden}, float32)")
    print("| payload | bytes a response token | of 70B in bfloat16, k = 64 | seconds a step |\n|---|---|---|---|")
    try:
        for name, wanted in PAYLOADS.items():
            client = TeacherClient(TeacherServiceConfig(url=url), "benchmark")
            client.connect()
            student = model("tiny-student", 1, layout)
            student.prepare_training(OptimizerConfig(), UPDATES)
            teachers = ServiceTeachers({None: client}, student, wanted)
            source = None if name == "sampled" else FullTeacher(student, teachers)
            if wanted.payload == "top_k":
                source = ServiceTopK(student, teachers, "bucket")
            seconds = min(steps(student, teachers, source))
            sizes = bytes_per_token(hidden, "float32", TOP_K)[name], bytes_per_token(8192, "bfloat16", 64)[name]
            print(f"| {name} | {sizes[0]} | {sizes[1]} | {seconds:.3f} |", flush=True)
            teachers.close()
    finally:
        process.terminate()
        process.wait(30)
    student = model("tiny-student", 1, layout)
    student.prepare_training(OptimizerConfig(), UPDATES)
    router = TeacherRouter({None: teacher})
    seconds = min(steps(student, router, FullTeacher(student, router)))
    print(f"| none: the teacher in the trainer | 0 | 0 | {seconds:.3f} |\n")


def break_even() -> None:
    print("| teacher | weights, GB | hidden, bytes a token | forward pass on 8 H200, us a token | break-even, GB/s |")
    print("|---|---|---|---|---|")
    for name, parameters, hidden in EXAMPLES:
        seconds = 2 * parameters / (8 * EFFICIENCY * PEAK)
        size = 2 * hidden
        print(f"| {name} | {2e-9 * parameters:.0f} | {size} | {seconds * 1e6:.1f} | {size / seconds * 1e-9:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the teacher is written")
    parser.add_argument("--teacher", default="small-teacher", choices=("tiny-teacher", "small-teacher"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    initialize_distributed()
    measure(options.directory, options.teacher)
    break_even()
    shutdown_distributed()


if __name__ == "__main__":
    main()
