"""Seconds to plan, look at and report a run directory of ten thousand stages and their evaluations.

    python benchmarks/many_stages.py        # 10,000 stages in chains of four, and 10,000 evaluations

The directories are those of finished jobs, with weights that are holes of their full size (sparse files), a few rows of
metrics and responses, and an evaluation of 16 problems. Timed are reading the workflow, its checks, the plan (which
``s2d run`` makes first, when it starts and when it resumes), the plan's tables, the first jobs of a resumed run, `s2d
eval` and `s2d report`. With half the stages it is done again, and the exponent of growth is printed: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from rich.console import Console

from megatron_s2d.artifacts.files import atomic_write_json
from megatron_s2d.config.base import dump
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.workflow import runner
from megatron_s2d.workflow.collect_results import EVALUATION_NAME
from megatron_s2d.workflow.evaluations import print_evaluations
from megatron_s2d.workflow.plan import Job, make_plan
from megatron_s2d.workflow.plan_table import print_plan
from megatron_s2d.workflow.preflight import check_workflow

CHAIN, PROBLEMS, SAMPLES = 4, 16, 4
LARGEST_EXPONENT = 1.3
MODEL_BYTES = 16 << 30


def workflow(directory: Path, num_stages: int) -> Path:
    """Write a workflow of ``num_stages`` stages, every one the end of an arm, and return its file."""
    stages, arms, contrasts = {}, {}, []
    for number in range(num_stages):
        name = f"s{number:05d}"
        start = {"init": f"s{number - 1:05d}"} if number % CHAIN else {"model": "student"}
        stages[name] = {
            "type": "sft", "role": f"r{number % CHAIN}", "data": "pool", "steps": 2, "global_batch_size": 8, **start,
            "seed": number,
        }  # fmt: skip
        arms[name] = name
        if number % (10 * CHAIN) == CHAIN:
            contrasts.append({"a": name, "b": "s00000", "factor": "seed", "differs": ["*"]})
    document = {
        "name": "many", "tokenizer": "task:modular_arithmetic", "precision": "float32",
        "lengths": {"max_prompt_length": 24}, "models": {"student": {"preset": "tiny-student"}},
        "data": {"pool": {"type": "task", "split": "pool", "num_prompts": 64},
                 "problems": {"type": "task", "split": "eval", "num_prompts": PROBLEMS}},
        "stages": stages, "arms": arms, "contrasts": contrasts,
        "evaluation": {"prompts": "problems", "samples_per_prompt": SAMPLES, "sampling": {"max_response_length": 32}},
    }  # fmt: skip
    path = directory / "many.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def finish(job: Job, problems: list[str]) -> None:
    """Write the directory of a finished job, with stand-in results."""
    directory = job.directory
    directory.path.mkdir(parents=True)
    directory.config_path.write_text(json.dumps(dict(job.resolved)))
    lineage = {"inputs": dict(job.inputs), "seeds": {}, "code": {}, "libraries": {}, "resumed": [], "started": "0"}
    directory.lineage_path.write_text(json.dumps({**lineage, "finished": "1"}))
    directory.finished_path.write_text(json.dumps({"seconds": 1.0, "key": job.key, "outputs": {}}))
    if job.is_stage:
        rows = [
            {"step": step, "loss": 1 / step, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 10.0} for step in (1, 2)
        ]
        directory.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        directory.model_path.mkdir()
        with open(directory.model_path / "weights.safetensors", "wb") as file:
            file.truncate(MODEL_BYTES)
        return
    rows = [
        {"problem_id": problem, "domain": "math", "rewards": [float(n % 2) for n in range(SAMPLES)],
         "response_lengths": [9.0] * SAMPLES, "finish_reasons": ["stop"] * SAMPLES,
         "verifier_labels": ["correct"] * SAMPLES}
        for problem in problems
    ]  # fmt: skip
    (directory.path / EVALUATION_NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(num_stages: int) -> dict[str, float]:
    """Return the seconds of each part for ``num_stages`` stages and as many evaluations."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[name] = time.process_time() - start
        print(f"{num_stages:,} stages: {name}: {seconds[name]:.2f} s", file=sys.stderr, flush=True)

    directory = Path(tempfile.mkdtemp(prefix="s2d_many_"))
    console = Console(file=open(directory / "printed.txt", "w"), width=200)  # noqa: SIM115, closed with the process
    try:
        run_dir, path = directory / "run", workflow(directory, num_stages)
        with timed("read the workflow"):
            config = load_workflow(path)
        with timed("checks"):
            preflight = check_workflow(config, run_dir / "tokenizer")
        with timed("plan, nothing finished"):
            jobs = make_plan(config, run_dir)
        with timed("s2d plan: tables"):
            print_plan(preflight, jobs, run_dir, console)
        problems = preflight.prompts["problems"].values("id")
        half = jobs[: num_stages // 2] + jobs[num_stages : num_stages + num_stages // 2]
        for job in half:
            finish(job, problems)
        with timed("plan, half finished"):
            jobs = make_plan(config, run_dir)
        with timed("resume: next jobs"):
            started = _start(config, run_dir, jobs, console)
        assert started == config.max_parallel_stages, started
        for job in jobs:
            if job.is_pending:
                finish(job, problems)
        atomic_write_json(run_dir / "config.json", dump(config))
        with timed("plan, all finished"):
            jobs = make_plan(config, run_dir)
        assert not any(job.is_pending for job in jobs)
        with timed("s2d eval"):
            print_evaluations(run_dir, None, as_json=False, console=console)
        with timed("s2d report"):
            runner.rewrite_report(run_dir, console)
    finally:
        shutil.rmtree(directory)
    return seconds


def _start(config, run_dir: Path, jobs: list[Job], console: Console) -> int:
    """Start the next jobs of a resumed run, without processes; return how many."""

    class Processes:
        started = 0

        def start(self, *_: object) -> list:
            self.started += 1
            return []

    processes = Processes()
    run = runner._Runner(config, run_dir, jobs, {}, processes, console)
    run._start_ready()
    return processes.started


def main() -> None:
    """Measure both sizes, print a table, and fail if something grows faster than linearly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=10_000)
    options = parser.parse_args()
    half, full = measure(options.stages // 2), measure(options.stages)
    print(f"| CPU seconds | {options.stages // 2:,} stages | {options.stages:,} stages | exponent |\n|---|---|---|---|")
    slow = []
    for name, seconds in full.items():
        exponent = math.log2(max(seconds, 1e-3) / max(half[name], 1e-3))
        slow += [name] if exponent > LARGEST_EXPONENT and seconds > 1 else []
        print(f"| {name} | {half[name]:.2f} | {seconds:.2f} | {exponent:.1f} |")
    if slow:
        raise SystemExit(f"grows faster than the number of stages: {', '.join(slow)}")


if __name__ == "__main__":
    main()
