"""Two domains whose responses differ tenfold in length, with each normaliser of the loss: a table (docs/teachers.md).

    OMP_NUM_THREADS=1 python benchmarks/domain_balance.py RUN_DIRECTORY

Short: the result of one operation modulo 17, four tokens. Long: a progression of 36 numbers and its last one, forty
tokens. Teacher and student are trained from scratch on both, the student shorter; then the student is distilled on its
own responses, as many of each domain, for the same steps in all arms, which differ in ``domain_weights`` alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

MODULUS, TERMS = 17, 36
SAMPLING = {"temperature": 1.0, "max_response_length": 44}
ARMS = {"one average over all tokens": None, "equal": "equal", "10 to 1": {"short": 10.0, "long": 1.0}}


def short() -> Iterator[dict[str, str]]:
    """Yield all operations on two numbers."""
    for a in range(MODULUS):
        for b in range(MODULUS):
            for sign, value in (("+", a + b), ("-", a - b), ("*", a * b)):
                result = str(value % MODULUS)
                yield {"question": f"{a} {sign} {b} =", "answer": result, "solution": f"[ {result} ]"}


def long() -> Iterator[dict[str, str]]:
    """Yield progressions: start, difference and an operand that only makes the question longer."""
    for start in range(MODULUS):
        for difference in range(1, MODULUS):
            for extra in range(3):
                terms = [str((start + number * difference) % MODULUS) for number in range(TERMS)]
                question = f"{start} + {difference} + {extra} ="
                yield {"question": question, "answer": terms[-1], "solution": " ".join([*terms, "[", terms[-1], "]"])}


def write_data(folder: Path) -> None:
    """Write of each domain the rows to train on, those to distil on, and those to evaluate on, disjoint."""
    for name, rows in (("short", list(short())), ("long", list(long()))):
        order = np.random.default_rng(5).permutation(len(rows))
        for part, indices in (("train", order[128:]), ("problems", order[:128])):
            text = "".join(json.dumps(rows[index]) + "\n" for index in indices)
            (folder / f"{name}_{part}.jsonl").write_text(text)


def workflow(folder: Path, steps: int) -> dict:
    """Return the workflow: a teacher and a student, and an arm for each normaliser."""
    data = {
        f"{name}_{part}": {
            "type": "file", "path": str(folder / f"{name}_{part}.jsonl"), "template": "plain", "domain": name,
            "verifier": "modular_arithmetic", "columns": {"solution": "solution"},
        }
        for name in ("short", "long") for part in ("train", "problems")
    }  # fmt: skip
    data["both"] = data["short_train"] | {"path": [str(folder / f"{name}_train.jsonl") for name in ("short", "long")]}
    teacher = {
        "type": "sft", "model": "student", "data": "both", "steps": 1200,
        "global_batch_size": 32, "optimizer": {"lr": 5.0e-3, "lr_schedule": "cosine", "warmup_steps": 20},
    }  # fmt: skip
    opd = {
        "type": "opd", "init": "start", "teacher": "teacher", "prompts": ["short_train", "long_train"], "steps": steps,
        "train_batch_size": 16, "num_generations": 2, "sampling": SAMPLING, "optimizer": {"lr": 5.0e-4},
        "kl_estimator": "full_vocab",
    }  # fmt: skip
    arms = {f"arm{number}": {"domain_weights": weights} for number, weights in enumerate(ARMS.values())}
    return {
        "name": "domain_balance", "seed": 1, "tokenizer": "task:modular_arithmetic", "precision": "float32",
        "models": {"student": {"preset": "tiny-student"}}, "lengths": {"max_prompt_length": 16}, "data": data,
        "stages": {"teacher": teacher, "start": {**teacher, "steps": 250, "seed": 1}}
        | {name: opd | settings for name, settings in arms.items()},
        "arms": {"start": "start", "teacher": "teacher"} | {name: name for name in arms},
        "evaluation": {"prompts": ["short_problems", "long_problems"], "samples_per_prompt": 4, "sampling": SAMPLING},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="of distillation")
    arguments = parser.parse_args()
    folder = arguments.directory
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    config = folder / "workflow.yaml"
    config.write_text(yaml.safe_dump(workflow(folder, arguments.steps), sort_keys=False))
    command = [sys.executable, "-m", "megatron_s2d.cli", "run", str(config), "--out", str(folder / "run")]
    subprocess.run(command, check=True, stdout=sys.stderr)
    print("| arm | short, solved % | long, solved % | short, mean KL of the last 10 steps | long |")
    print("|---|---|---|---|---|")
    names = {"start": "start", **{f"arm{number}": name for number, name in enumerate(ARMS)}, "teacher": "teacher"}
    for arm, name in names.items():
        rows = read(folder / "run" / "evaluations" / arm / "evaluation.jsonl")
        solved = {
            domain: 100 * statistics.mean(r for row in rows if row["domain"] == domain for r in row["rewards"])
            for domain in ("short", "long")
        }
        cells = [f"{value:.1f}" for value in solved.values()]
        metrics = read(folder / "run" / "stages" / arm / "metrics.jsonl")[-10:]
        if arm.startswith("arm"):
            cells += [f"{statistics.mean(row[f'domain/{d}/kl'] for row in metrics):.4f}" for d in ("short", "long")]
        print(f"| {name} | {' | '.join(cells)} |" + (" | |" if not arm.startswith("arm") else ""))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
