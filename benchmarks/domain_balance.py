"""Two domains with responses of 60 and of 6 tokens, a teacher each: which normaliser of the loss saves the short one?

    OMP_NUM_THREADS=1 python benchmarks/domain_balance.py RUN_DIRECTORY

In ``long`` the student writes the second of two numbers again and again, and its teacher the first; in ``short`` it
writes the first one, and its teacher the second. It is distilled from both teachers at once, from as many problems of
each domain, in arms that differ in ``loss_agg_mode`` or ``domain_weights``. Prints mean and standard error over seeds
of the share of solved problems, which no stage has seen, and of the KL to the teacher in the last steps
(docs/teachers.md).
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

MODULUS, LONGEST = 17, 64
TERMS = {"long": 56, "short": 2}  # of a response, before the answer in brackets
NUM_TEST = 89  # problems of each domain; the others are for training
DOMAINS = ("long", "short")
SAMPLING = {"temperature": 1.0, "max_response_length": LONGEST}
ARMS = {
    "token_mean": {},
    "seq_mean_token_mean": {"loss_agg_mode": "seq_mean_token_mean"},
    "domain_weights: equal": {"domain_weights": "equal"},
}


def rows_of(domain: str, *, by_teacher: bool) -> list[dict[str, str]]:
    """Return all problems of a domain with the solution of its teacher or of the start; the answer is the teacher's."""
    rows = []
    for first, second in itertools.product(range(MODULUS), repeat=2):
        right, other = (first, second) if domain == "long" else (second, first)
        term = right if by_teacher else other
        question = f"[ {first} {second} ] =" if domain == "long" else f"{first} {second} ="
        solution = " ".join(map(str, [*[term] * TERMS[domain], "[", term, "]"]))
        rows.append({"question": question, "answer": str(right), "solution": solution})
    return [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]


def write_data(folder: Path) -> None:
    """Write problems for the evaluation, and others for the teachers, the start and the distillation."""
    start = []
    for domain in DOMAINS:
        taught = rows_of(domain, by_teacher=True)
        write_rows(folder / f"{domain}_test.jsonl", taught[:NUM_TEST])
        write_rows(folder / f"{domain}_taught.jsonl", taught[NUM_TEST:])
        start += rows_of(domain, by_teacher=False)[NUM_TEST:]
    write_rows(folder / "both_start.jsonl", start)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def workflow(folder: Path, seed: int, settings: argparse.Namespace) -> dict:
    """Return the workflow of one seed: two teachers, one start, and the arms."""
    columns = {"question": "question", "answer": "answer", "solution": "solution"}
    data = {
        f"{domain}_{name}": {
            "type": "file", "path": str(folder / f"{domain}_{name}.jsonl"), "domain": domain, "template": "plain",
            "verifier": "modular_arithmetic", "columns": columns,
        }
        for domain, name in [*itertools.product(DOMAINS, ("taught", "test")), ("both", "start")]
    }  # fmt: skip
    sft = {"type": "sft", "optimizer": {"lr": 5.0e-3, "lr_schedule": "cosine", "warmup_steps": 10}}
    stages: dict[str, dict] = {
        f"{domain}_teacher": sft
        | {"model": "teacher", "data": f"{domain}_taught", "steps": steps, "global_batch_size": size}
        for domain, steps, size in (("long", settings.first_steps, 16), ("short", settings.first_steps, 64))
    }
    stages["start"] = sft | {
        "model": "student", "data": "both_start", "steps": settings.first_steps, "global_batch_size": 32,
    }  # fmt: skip
    taught = {
        "type": "opd", "init": "start", "teacher": {domain: f"{domain}_teacher" for domain in DOMAINS},
        "prompts": [f"{domain}_taught" for domain in DOMAINS], "steps": settings.steps, "train_batch_size": 16,
        "num_generations": 2, "sampling": SAMPLING, "optimizer": {"lr": settings.lr},
    }  # fmt: skip
    arms = {f"arm{number}": taught | arm for number, arm in enumerate(ARMS.values())}
    return {
        "name": "domain_balance", "seed": seed, "max_parallel_stages": 2, "precision": "float32",
        "tokenizer": "task:modular_arithmetic",
        "models": {"teacher": {"preset": "tiny-teacher"}, "student": {"preset": "tiny-student"}},
        "lengths": {"max_prompt_length": 8}, "data": data, "stages": stages | arms,
        "arms": {name: name for name in ["long_teacher", "short_teacher", "start", *arms]},
        "evaluation": {
            "prompts": [f"{domain}_test" for domain in DOMAINS], "samples_per_prompt": 4, "sampling": SAMPLING
        },
    }  # fmt: skip


def solved(run: Path, arm: str, domain: str) -> float:
    """Return the share of solved problems of a domain in percent."""
    rows = [json.loads(line) for line in (run / "evaluations" / arm / "evaluation.jsonl").read_text().splitlines()]
    return 100 * float(np.mean([row["rewards"] for row in rows if row["domain"] == domain]))


def last_kl(run: Path, arm: str, domain: str) -> float:
    """Return the mean KL to the teacher of a domain, nats a token, in the last five steps."""
    rows = [json.loads(line) for line in (run / "stages" / arm / "metrics.jsonl").read_text().splitlines()][-5:]
    return float(np.mean([row[f"domain/{domain}/kl"] for row in rows]))


def figures(run: Path) -> Iterator[tuple[str, list[float]]]:
    """Yield, for the teachers, the start and each arm, solved problems and, for arms, the KL of each domain."""
    yield "the teachers", [solved(run, f"{domain}_teacher", domain) for domain in DOMAINS] + [np.nan] * 2
    yield "the start", [solved(run, "start", domain) for domain in DOMAINS] + [np.nan] * 2
    for number, name in enumerate(ARMS):
        arm = f"arm{number}"
        yield name, [measure(run, arm, domain) for measure in (solved, last_kl) for domain in DOMAINS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=45, help="of distillation")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--first-steps", type=int, default=200, help="of the teachers and of the start")
    settings = parser.parse_args()
    values: dict[str, list[list[float]]] = {}
    for seed in range(1, settings.seeds + 1):
        folder = settings.directory / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder)
        (folder / "workflow.yaml").write_text(yaml.safe_dump(workflow(folder, seed, settings), sort_keys=False))
        command = [sys.executable, "-m", "megatron_s2d.cli", "run", str(folder / "workflow.yaml")]
        subprocess.run([*command, "--out", str(folder / "run")], check=True, stdout=subprocess.DEVNULL)
        for name, row in figures(folder / "run"):
            values.setdefault(name, []).append(row)
            print(seed, name, np.round(row, 4).tolist(), flush=True)
    print("| loss | long solved, % | short solved, % | KL, long | KL, short |\n|---|---|---|---|---|")
    for name, of_seeds in values.items():
        means = np.mean(of_seeds, axis=0)
        errors = np.std(of_seeds, axis=0, ddof=1) / len(of_seeds) ** 0.5 if len(of_seeds) > 1 else 0 * means
        cells = [
            "" if np.isnan(mean) else f"{mean:.{digits}f} ± {error:.{digits}f}"
            for mean, error, digits in zip(means, errors, (1, 1, 4, 4), strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
