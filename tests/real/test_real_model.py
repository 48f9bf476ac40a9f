"""The whole workflow on a real pretrained model: ``configs/real.yaml``, which `make real` runs (docs/real-model.md).

Slow. Models come from ``real-model/`` and the run from ``runs/real/`` of the checkout; both are made if they are not
there, and reused by the next call.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS, RUN = ROOT / "real-model", ROOT / "runs" / "real"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")),
        reason="gguf or accelerate is not installed (extra `real`)",
    ),
]


def command(*arguments: object) -> str:
    """Run a Python program from the top of the repository; return what it printed."""
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=7200, check=False
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


def s2d(*arguments: object) -> str:
    return command("-m", "megatron_s2d.cli", *arguments)


@pytest.fixture(scope="module")
def models() -> Path:
    command("benchmarks/real_model.py", "real-model")
    return MODELS


@pytest.fixture(scope="module")
def run(models) -> Path:
    s2d("run", "configs/real.yaml")
    return RUN


def column(stage: str, metric: str) -> list[float]:
    lines = (RUN / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[metric] for line in lines]


def first_and_last(values: list[float], count: int) -> tuple[float, float]:
    return float(np.mean(values[:count])), float(np.mean(values[-count:]))


def responses(job: str) -> dict[str, str]:
    """Greedy responses by problem."""
    rows = map(json.loads, (RUN / "evaluations" / job / "responses.jsonl").read_text().splitlines())
    return {row["problem_id"]: row["response"] for row in rows}


def of_transformers(directory: Path, count: int) -> dict[str, str]:
    """The same with transformers' ``generate``: one prompt at a time, so that nothing is padded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    texts = {}
    for line in (MODELS / "eval.jsonl").read_text().splitlines()[:count]:
        row = json.loads(line)
        messages = [{"role": "user", "content": row["question"]}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(
            **inputs, max_new_tokens=32, do_sample=False, stop_strings=["."], tokenizer=tokenizer
        )  # fmt: skip
        texts[f"eval/{row['id']}"] = tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def test_import_and_export_keep_every_bit(models, tmp_path):
    from safetensors.torch import load_file

    s2d("convert", "hf-to-megatron", models / "student", tmp_path / "megatron", "--no-progress")
    s2d("convert", "megatron-to-hf", tmp_path / "megatron", tmp_path / "hf", "--assets", models / "student")
    before, after = (load_file(folder / "model.safetensors") for folder in (models / "student", tmp_path / "hf"))
    assert before.keys() == after.keys() and len(before) == 9 * 27 + 2
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize(("job", "directory"), [("teacher_base", "teacher"), ("student_base", "student")])
def test_greedy_text_is_that_of_transformers(run, job, directory):
    expected = of_transformers(MODELS / directory, 12)
    assert {name: text for name, text in responses(job).items() if name in expected} == expected


def test_top_k_divergence_to_the_teacher_falls(run):
    first, last = first_and_last(column("opd_top_k", "kl"), 5)
    assert len(column("opd_top_k", "kl")) == 30 and 0 < last < 0.85 * first


def test_divergence_of_sampled_tokens_falls(run):
    """From the model as it was before stage 1 to the one after it."""
    first, last = first_and_last(column("opd_sampled", "kl"), 5)
    assert len(column("opd_sampled", "kl")) == 30 and last < 0.7 * first


def test_exact_divergence_falls_after_the_warm_up(run):
    first, last = first_and_last(column("opd", "kl"), 5)
    assert first < np.mean(column("opd_top_k", "kl")[:5]) and 0 < last < 0.9 * first


def test_warm_up_learns_from_the_cached_hidden_states(run):
    losses = column("forward_kl", "loss")
    assert losses[-1] < 0.6 * losses[0]


def test_reward_of_the_teacher_rises(run):
    first, last = first_and_last(column("rl_teacher", "reward"), 3)
    assert last > first


def test_student_answers_more_problems(run):
    results = json.loads((run / "results.json").read_text())
    accuracy = {arm: row["avg_at_k"] for arm, row in results["arms"].items()}
    assert accuracy["student"] < 0.1 < accuracy["bridge"]


def test_exported_student_chats_as_in_the_run(run, tmp_path):
    s2d("convert", "megatron-to-hf", run / "stages" / "stage3" / "model", tmp_path / "hf", "--no-progress")
    expected = of_transformers(tmp_path / "hf", 6)
    assert {name: text for name, text in responses("stage3").items() if name in expected} == expected
    question = "Anna has 5 coins and gets 3 more. How many coins does Anna have now?"
    assert "coins" in s2d("generate", run, "four_stages", "--prompt", question, "--temperature", "0")
