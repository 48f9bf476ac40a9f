"""``s2d plan --measure`` as a user types it: the tables of a rank, and a layout that does not fit."""

import importlib.util
import re
import subprocess
import sys

import pytest
import yaml

CONFIG = """
name: measured
tokenizer: task:modular_arithmetic
parallel: {data_parallel_size: 8}
models: {student: {preset: qwen3-8b}}
data:
  problems: {type: task, split: pool, num_operations: 2, num_prompts: 64}
  test: {type: task, split: eval, num_operations: 2, num_prompts: 8}
stages:
  grpo:
    type: grpo
    model: student
    prompts: problems
    train_batch_size: 16
    num_generations: 8
    kl_loss_coef: 0
    steps: 10
    sampling: {max_response_length: 2048}
    micro_batch: {max_tokens_per_gpu: 16384, sequence_packing: true}
arms: {grpo: grpo}
evaluation: {prompts: test}
"""


@pytest.fixture
def plan(stub, tmp_path):
    path = tmp_path / "measured.yaml"
    path.write_text(CONFIG)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "megatron_s2d.cli", "plan", str(path), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    return run


def test_a_layout_that_does_not_fit_says_where_and_what_fits(plan):
    result = plan("--measure", "--rank", "5")
    assert result.returncode == 1, result.stderr
    assert "rank 5 of 8 (tp 0, pp 0, cp 0, dp 5)" in result.stdout
    (tensor, line) = re.search(r"OUT OF MEMORY on rank 5 in train, for (.*), at (.*)", result.stdout).groups()
    assert re.match(r"activations of layer \d+|logits of a chunk|the loss's operands", tensor), tensor
    package = r"(megatron_s2d|megatron/core|transformer_engine)"
    assert re.match(package + r"/\S+\.py:\d+ \w+: CUDA out of memory. Tried to allocate", line)
    (settings,) = re.findall(r"estimated to fit: (.*)", result.stdout)
    engine = importlib.util.find_spec("transformer_engine") is not None
    estimate = ("--gpu", "h100", "--assume", f"transformer_engine={str(engine).lower()}")
    assert "stage grpo does not fit" in plan(*estimate).stdout
    assert "does not fit" not in plan(*estimate, *settings.split()).stdout
    result = plan("--measure", "--rank", "5", *settings.split())
    assert result.returncode == 0, f"{settings} does not fit:\n{result.stdout}"
    for title in ("Measured: stage grpo", "Collectives of one call", "Waits of the host", "Matrix products"):
        assert title in result.stdout


SERVICE = {"teacher_service": {"url": "http://127.0.0.1:9"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"type": "opd", "kl_estimator": "full_vocab", **SERVICE}, {"type": "grpo", "teacher_advantage": SERVICE}],
    ids=["opd", "grpo"],
)
def test_a_served_teacher_is_measured_without_its_server(stub, tmp_path, settings):
    document = yaml.safe_load(CONFIG)
    document["models"] = {"student": {"preset": "qwen3-0.6b"}}
    document["stages"]["taught"] = settings | {
        "init": "grpo", "prompts": "problems", "train_batch_size": 8, "num_generations": 2, "steps": 2,
        "sampling": {"max_response_length": 256}, "micro_batch": {"max_tokens_per_gpu": 4096},
    }  # fmt: skip
    if settings["type"] == "grpo":
        document["stages"]["taught"]["label_reuse"] = "allow"
    document["arms"] = {"taught": "taught"}
    path = tmp_path / "served.yaml"
    path.write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "megatron_s2d.cli", "plan", str(path), "--measure", "--stage", "taught"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    assert "Measured: stage taught" in result.stdout and "127.0.0.1" not in result.stdout + result.stderr
