"""Self-distillation with right and wrong hints at tiny size: accuracies with standard errors (docs/teachers.md).

    OMP_NUM_THREADS=1 python benchmarks/self_distillation.py RUN_DIRECTORY

A small student is trained on worked problems of arithmetic, half of them with their steps in front of the question, so
that it can read a hint, until it solves some problems without one. Then it teaches itself: as teacher (the start, or
the student as it is) it reads the steps of a solution in front of the question, as student it does not. A wrong hint is
the steps of another solution. Prints mean and standard error over seeds of the share of solved problems, which no stage
has seen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

MODULUS, NUM_OPERATIONS = 7, 2
SAMPLING = {"temperature": 1.0, "max_response_length": 8}
ARMS = {
    "right hints, reverse KL": {},
    "right hints, forward KL": {"divergence": "forward_kl"},
    "right hints, JSD": {"divergence": "jsd", "beta": 0.5},
    "wrong hints, reverse KL": {"prompts": "wrong"},
    "right hints, reverse KL, the student as it is teaches": {"teacher": "self"},
}


def problems(count: int, seed: int) -> list[tuple[str, list[int]]]:
    """Return (question, results of the operations) of distinct problems; seeds draw from disjoint sets."""
    rng, seen, result = np.random.default_rng(seed), set(), []
    while len(result) < count:
        value = start = int(rng.integers(MODULUS))
        words, steps = [str(start)], []
        for _ in range(NUM_OPERATIONS):
            operator, operand = str(rng.choice(["+", "-"])), int(rng.integers(1, 10))
            value = (value + operand if operator == "+" else value - operand) % MODULUS
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


def hint(steps: list[int]) -> str:
    return " ".join(["[", *map(str, steps), "]"])


def write_data(folder: Path, num_worked: int) -> None:
    """Write the rows for the first training (with right hints and without), the prompts with hints, the evaluation."""
    rng = np.random.default_rng(9)
    worked = []
    for question, steps in problems(num_worked, seed=0):
        for start in ("", hint(steps) + " "):
            row = {"question": start + question, "answer": str(steps[-1]), "solution": solution(steps)}
            worked.append(row)
    write_rows(folder / "worked.jsonl", worked)
    right, wrong = [], []
    for question, steps in problems(600, seed=1):
        other = [int((step + rng.integers(1, MODULUS)) % MODULUS) for step in steps]
        row = {"question": question, "answer": str(steps[-1])}
        right.append(row | {"hint": hint(steps)})
        wrong.append(row | {"hint": hint(other)})
    write_rows(folder / "right.jsonl", right)
    write_rows(folder / "wrong.jsonl", wrong)
    test = problems(256, seed=2)
    write_rows(folder / "test.jsonl", [{"question": question, "answer": str(steps[-1])} for question, steps in test])
    hinted = [{"question": f"{hint(steps)} {question}", "answer": str(steps[-1])} for question, steps in test]
    write_rows(folder / "hinted.jsonl", hinted)


def source(path: Path, **columns: str) -> dict:
    return {"type": "file", "path": str(path), "template": "plain", "verifier": "modular_arithmetic",
            "columns": columns}  # fmt: skip


def workflow(folder: Path, seed: int, settings: argparse.Namespace) -> dict:
    """Return the workflow of one seed: one start, and arms that differ in the hint, the divergence or the teacher."""
    first = {
        "type": "sft", "model": "student", "data": "worked", "steps": settings.first_steps, "global_batch_size": 64,
        "optimizer": {"lr": 5.0e-3, "lr_schedule": "cosine", "warmup_steps": 20},
    }  # fmt: skip
    taught = {
        "type": "opd", "init": "first", "teacher": "first", "prompts": "right", "steps": settings.steps,
        "train_batch_size": 32, "num_generations": 4, "sampling": SAMPLING, "optimizer": {"lr": settings.lr},
        "teacher_view": {"context": "{solution} {question}"},
    }  # fmt: skip
    arms = {f"arm{number}": taught | changes for number, changes in enumerate(ARMS.values())}
    return {
        "name": "self_distillation", "seed": seed, "max_parallel_stages": 2,
        "tokenizer": f"task:modular_arithmetic/{MODULUS}",
        "precision": "float32", "models": {"student": {"preset": settings.preset}},
        "lengths": {"max_prompt_length": 16},
        "data": {
            "worked": source(folder / "worked.jsonl", solution="solution"),
            "right": source(folder / "right.jsonl", solution="hint"),
            "wrong": source(folder / "wrong.jsonl", solution="hint"),
            "test": source(folder / "test.jsonl"),
            "hinted": source(folder / "hinted.jsonl") | {"domain": "hinted"},
        },
        "stages": {"first": first} | arms,
        "arms": {"start": "first"} | {name: name for name in arms},
        "evaluation": {"prompts": ["test", "hinted"], "samples_per_prompt": 8, "sampling": SAMPLING},
    }  # fmt: skip


def figures(run: Path, stage: str, *, hinted: bool = False) -> tuple[float, float]:
    """Return the share of solved problems in percent and the tokens of a response; hinted: with the hint in front."""
    rows = [json.loads(line) for line in (run / "evaluations" / stage / "evaluation.jsonl").read_text().splitlines()]
    rows = [row for row in rows if (row["domain"] == "hinted") == hinted]
    return 100 * float(np.mean([row["rewards"] for row in rows])), float(
        np.mean([row["response_lengths"] for row in rows])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="tiny-teacher")
    parser.add_argument("--worked", type=int, default=300, help="problems of the first training")
    parser.add_argument("--first-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=120, help="of self-distillation")
    parser.add_argument("--lr", type=float, default=2e-3, help="of self-distillation")
    settings = parser.parse_args()
    values: dict[str, list[tuple[float, float]]] = {}
    for seed in range(1, settings.seeds + 1):
        folder = settings.directory / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder, settings.worked)
        (folder / "workflow.yaml").write_text(yaml.safe_dump(workflow(folder, seed, settings), sort_keys=False))
        command = [sys.executable, "-m", "megatron_s2d.cli", "run", str(folder / "workflow.yaml")]
        subprocess.run([*command, "--out", str(folder / "run")], check=True, stdout=subprocess.DEVNULL)
        for name, stage in (("start", "first"), *((name, f"arm{number}") for number, name in enumerate(ARMS))):
            values.setdefault(name, []).append(figures(folder / "run", stage))
            print(seed, name, np.round(values[name][-1], 2).tolist(), flush=True)
            if stage == "first":
                name = "start, with the right hint in front"
                values.setdefault(name, []).append(figures(folder / "run", stage, hinted=True))
                print(seed, name, np.round(values[name][-1], 2).tolist(), flush=True)
    print("| arm | solved, % | tokens a response |\n|---|---|---|")
    for name, of_seeds in values.items():
        means = np.mean(of_seeds, axis=0)
        errors = np.std(of_seeds, axis=0, ddof=1) / len(of_seeds) ** 0.5 if len(of_seeds) > 1 else 0 * means
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in zip(means, errors, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
