"""Self-distillation with right and wrong hints at tiny size: a table of accuracies (docs/teachers.md).

    OMP_NUM_THREADS=1 python benchmarks/self_distillation.py RUN_DIRECTORY

A tiny student is trained on 1500 worked problems of arithmetic, half of them with the answer in front of the question,
so that it can read a hint. Then it teaches itself (``teacher: self``): as teacher it reads the hint, as student not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

MODULUS, NUM_OPERATIONS = 17, 2
SAMPLING = {"temperature": 1.0, "max_response_length": 8}


def problems(count: int, seed: int) -> list[tuple[str, list[int]]]:
    """Return (question, results of the operations) of distinct problems; seeds draw from disjoint sets."""
    rng, seen, result = np.random.default_rng(seed), set(), []
    while len(result) < count:
        value = start = int(rng.integers(MODULUS))
        words, steps = [str(start)], []
        for _ in range(NUM_OPERATIONS):
            operator, operand = str(rng.choice(["+", "-", "*"])), int(rng.integers(1, 10))
            value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % MODULUS
            words += [operator, str(operand)]
            steps.append(value)
        question = " ".join([*words, "="])
        if sum(question.encode()) % 3 == seed % 3 and question not in seen:
            seen.add(question)
            result.append((question, steps))
    return result


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def solution(steps: list[int]) -> str:
    return " ".join(map(str, [*steps, "[", steps[-1], "]"]))


def write_data(folder: Path) -> None:
    """Write the rows for the first training (with right hints and without), the prompts with hints, the evaluation."""
    rng = np.random.default_rng(9)
    worked = []
    for number, (question, steps) in enumerate(problems(1500, seed=0)):
        hint = f"[ {steps[-1]} ] " if number % 2 else ""
        worked.append({"question": hint + question, "answer": str(steps[-1]), "solution": solution(steps)})
    write_rows(folder / "worked.jsonl", worked)
    right, wrong = [], []
    for question, steps in problems(1024, seed=1):
        other = int((steps[-1] + rng.integers(1, MODULUS)) % MODULUS)
        row = {"question": question, "answer": str(steps[-1])}
        right.append(row | {"hint": f"[ {steps[-1]} ]"})
        wrong.append(row | {"hint": f"[ {other} ]"})
    write_rows(folder / "right.jsonl", right)
    write_rows(folder / "wrong.jsonl", wrong)
    write_rows(folder / "test.jsonl", [{"question": q, "answer": str(s[-1])} for q, s in problems(256, seed=2)])


def source(path: Path, **columns: str) -> dict:
    return {"type": "file", "path": str(path), "template": "plain", "verifier": "modular_arithmetic",
            "columns": columns}  # fmt: skip


def workflow(folder: Path, steps: int) -> dict:
    """Return the workflow: one start, and arms that differ in the hint or in the divergence."""
    first = {
        "type": "sft", "model": "student", "data": "worked", "steps": 400, "global_batch_size": 64,
        "optimizer": {"lr": 5.0e-3, "lr_schedule": "cosine", "warmup_steps": 20},
    }  # fmt: skip
    taught = {
        "type": "opd", "init": "first", "teacher": "self", "prompts": "right", "steps": steps, "train_batch_size": 32,
        "num_generations": 4, "sampling": SAMPLING, "optimizer": {"lr": 1.0e-3},
        "teacher_view": {"context": "{solution} {question}"},
    }  # fmt: skip
    arms = {
        "right_reverse": {},
        "right_forward": {"divergence": "forward_kl"},
        "right_jsd": {"divergence": "jsd", "beta": 0.5},
        "wrong_reverse": {"prompts": "wrong"},
    }
    return {
        "name": "self_distillation", "seed": 1, "tokenizer": "task:modular_arithmetic", "precision": "float32",
        "models": {"student": {"preset": "tiny-student"}}, "lengths": {"max_prompt_length": 16},
        "data": {
            "worked": source(folder / "worked.jsonl", solution="solution"),
            "right": source(folder / "right.jsonl", solution="hint"),
            "wrong": source(folder / "wrong.jsonl", solution="hint"),
            "test": source(folder / "test.jsonl"),
        },
        "stages": {"first": first} | {name: taught | settings for name, settings in arms.items()},
        "arms": {"start": "first"} | {name: name for name in arms},
        "evaluation": {"prompts": "test", "samples_per_prompt": 8, "sampling": SAMPLING},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="of self-distillation")
    arguments = parser.parse_args()
    folder = arguments.directory
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    config = folder / "workflow.yaml"
    config.write_text(yaml.safe_dump(workflow(folder, arguments.steps), sort_keys=False))
    command = [sys.executable, "-m", "megatron_s2d.cli", "run", str(config), "--out", str(folder / "run")]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
