"""Configs of the papers' tables: full-size files pass preflight with fake checkpoints, and tiny files match them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.models.families import hf_tensor_shapes
from megatron_s2d.workflow.preflight import check_workflow

NUM_ROWS = 2200  # of each stand-in data set: enough for a step of every table after its filters
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TABLES = sorted(path.relative_to(CONFIGS / "papers") for path in (CONFIGS / "papers").rglob("table*.yaml"))
MODELS = {
    "Qwen3-1.7B": "qwen3-1.7b",
    "Qwen3-4B": "qwen3-4b",
    "Qwen3-8B": "qwen3-8b",
    "Qwen3-14B": "qwen3-14b",
    "Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b",
    "Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Llama-3.3-70B-Instruct": "llama-3.3-70b",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Create the folder that full-size files expect, with sparse files as weights and a few invented problems."""
    root = tmp_path_factory.mktemp("papers")
    for name, preset in MODELS.items():
        write_model(root / "models" / name, ModelConfig(preset=preset).resolve())
    write_data(root / "data")
    return root


def write_model(directory, spec):
    """Write config.json, a byte-level tokenizer, and a sparse safetensors file of the right size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf_config_from_spec(spec, "bfloat16")))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    fast.save_pretrained(directory)
    header, end = {}, 0
    for name, shape in hf_tensor_shapes(spec):
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_data(directory):
    def lines(name, rows):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    import datasets

    directory.mkdir()
    problem = [f"What is {number} + 1?" for number in range(NUM_ROWS)]
    answer = [str(number + 1) for number in range(NUM_ROWS)]
    rows = list(zip(range(NUM_ROWS), problem, answer, strict=True))
    messages = [[{"role": "user", "content": text}] for text in problem]
    datasets.Dataset.from_dict({
        "prompt": messages,
        "reward_model": [{"ground_truth": a} for a in answer],
        "extra_info": [{"index": f"d{i}"} for i in range(NUM_ROWS)],
    }).to_parquet(directory / "dapo-math-17k.parquet")  # fmt: skip
    difficulty = [3.0 + i % 6 for i in range(NUM_ROWS)]
    datasets.Dataset.from_dict(
        {"question": problem, "final_answer": answer, "difficulty": difficulty, "r1_solution_1": answer}
    ).to_parquet(directory / "deepmath-103k.parquet")  # fmt: skip
    case = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    datasets.Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"Program {i}: add 1."}] for i in range(NUM_ROWS)],
            "reward_model": [{"ground_truth": case}] * NUM_ROWS,
            "extra_info": [{"index": f"c{i}"} for i in range(NUM_ROWS)],
        }
    ).to_parquet(directory / "eurus-2-rl-code.parquet")
    lines(
        "dapo-math-17k-traces.jsonl",
        [{"index": f"d{i}", "question": q, "answer": a, "response": f"\\boxed{{{a}}}"} for i, q, a in rows],
    )
    lines(
        "math500.jsonl", [{"unique_id": "u1", "problem": "What is 5 * 5?", "answer": "25", "solution": "\\boxed{25}"}]
    )
    for number, name in enumerate(("aime24", "aime25", "hmmt25_feb", "hmmt25_nov")):
        lines(f"{name}.jsonl", [{"id": name, "problem": f"What is {number} * 7?", "answer": str(number * 7)}])
    lines(
        "humaneval_plus.jsonl",
        [{"task_id": "HumanEval/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n", "entry_point": "f",
          "test": "def check(candidate):\n    assert candidate(1) == 1\n"}],
    )  # fmt: skip
    lines(
        "mbpp_plus.jsonl",
        [{"task_id": "Mbpp/2", "prompt": '"""\nReturn x.\nassert g(1) == 1\n"""\n', "entry_point": "g", "atol": 0,
          "canonical_solution": "def g(x):\n    return x\n", "base_input": [[1]], "plus_input": [[2]],
          "assertion": "assert g(1) == 1"}],
    )  # fmt: skip
    lines("livecodebench_v6.jsonl", [{"question_id": "l1", "question_content": "Add 1.", "tests": case}])


@pytest.mark.parametrize("table", TABLES, ids=lambda path: f"{path.parent}-{path.stem}")
def test_full_size_table_passes_preflight(folder, table, monkeypatch):
    monkeypatch.chdir(folder)
    config = load_workflow(CONFIGS / "papers" / table)
    preflight = check_workflow(config, folder / "tokenizers")
    assert set(preflight.stages) == {stage for end in config.arms.values() for stage in config.chain(end)}


def test_opd_example_passes_preflight(folder, monkeypatch):
    monkeypatch.chdir(folder)
    elsewhere = [f"rollout.sglang.python={sys.executable}"]  # these tests run without SGLang too
    preflight = check_workflow(load_workflow(CONFIGS / "opd_qwen3.yaml", elsewhere), folder / "tokenizers")
    assert set(preflight.stages) == {"base", "teacher", "opd"}


def test_dry_run_of_a_full_size_table_starts_nothing(folder):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_s2d.cli", "run", CONFIGS / "papers/sg-opd/table3.yaml", "--dry-run"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "sg-opd-table3: 25 stages, 21 evaluations" in done.stdout and not (folder / "runs").exists()


def test_incomplete_weights_are_detected_before_anything_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    weights = folder / "models" / "Qwen3-14B" / "model.safetensors"
    size = weights.stat().st_size
    with open(weights, "r+b") as file:
        file.truncate(size - 1)
    try:
        with pytest.raises(Exception, match=r"models.teacher_14b: .*model.safetensors"):
            check_workflow(load_workflow(CONFIGS / "papers/s2d/table1.yaml"), folder / "tokenizers")
    finally:
        with open(weights, "r+b") as file:
            file.truncate(size)


@pytest.mark.parametrize("table", TABLES, ids=lambda path: f"{path.parent}-{path.stem}")
def test_tiny_table_has_the_same_rows_and_methods(table):
    full, tiny = (load_workflow(CONFIGS / size / table) for size in ("papers", "tiny"))
    assert [(row.label, row.arm, row.paper) for row in full.table.rows] == [
        (row.label, row.arm, row.paper) for row in tiny.table.rows
    ]
    assert full.arms == tiny.arms
    methods = {"sft", "grpo"}  # tiny models are trained from scratch where the full size loads a checkpoint
    for name, stage in full.stages.items():
        other = tiny.stages[name]
        assert stage.type == other.type or (stage.type == "load_checkpoint" and other.type in methods)
        for key in (
            "reward_scale",
            "kl_estimator",
            "sign_gate",
            "divergence",
            "on_policy_fraction",
            "alpha",
            "only_correct",
        ):
            assert getattr(stage, key, None) == getattr(other, key, None), (name, key)


def test_every_row_of_the_papers_is_configured():
    rows = {
        str(table): len(yaml.safe_load((CONFIGS / "papers" / table).read_text())["table"]["rows"]) for table in TABLES
    }
    assert rows == {
        "g-opd/table1.yaml": 3, "g-opd/table2.yaml": 9, "g-opd/table3.yaml": 9, "g-opd/table8.yaml": 6,
        "s2d/table1.yaml": 3, "s2d/table2.yaml": 15, "s2d/table3.yaml": 3, "s2d/table4.yaml": 6, "s2d/table5.yaml": 6,
        "s2d/table6.yaml": 14, "sg-opd/table1.yaml": 6, "sg-opd/table2.yaml": 4, "sg-opd/table3.yaml": 23,
    }  # fmt: skip
