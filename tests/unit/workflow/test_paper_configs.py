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
from megatron_s2d.report.contrasts import arm_of, check_matched
from megatron_s2d.stages.policy_loss import surrogate_of
from megatron_s2d.workflow.preflight import check_workflow

EURUS_END = "\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."
NUM_ROWS = 2200  # of each stand-in data set: enough for a step of every table after its filters
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
CONTROLS = [Path("s2d/teacher_free.yaml")]  # arms beside the papers' tables
TABLES = sorted(
    path
    for path in (file.relative_to(CONFIGS / "papers") for file in (CONFIGS / "papers").rglob("*.yaml"))
    if path.stem != "stages" and path not in CONTROLS
)
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
            "prompt": [
                [{"role": "system", "content": "Think."}, {"role": "user", "content": f"Program {i}.{EURUS_END}"}]
                for i in range(NUM_ROWS)
            ],
            "reward_model": [{"ground_truth": case}] * NUM_ROWS,
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


@pytest.mark.parametrize("table", TABLES + CONTROLS, ids=lambda path: f"{path.parent}-{path.stem}")
def test_full_size_table_passes_preflight(folder, table, monkeypatch):
    monkeypatch.chdir(folder)
    config = load_workflow(CONFIGS / "papers" / table)
    preflight = check_workflow(config, folder / "tokenizers")
    assert set(preflight.stages) == {stage for end in config.arms.values() for stage in config.chain(end)}
    if {
        "code",
        "livecodebench",
    } <= preflight.prompts.keys():  # one template for training and evaluation (G-OPD, appendix D)
        end = preflight.prompts["livecodebench"][0].text.partition("Add 1.")[2]
        assert preflight.prompts["code"][0].text == f"user: Program 0.{end}"


@pytest.mark.parametrize("size", ["papers", "tiny"])
def test_continued_rl_sees_new_prompts(size):
    config = load_workflow(CONFIGS / size / "g-opd" / "table1.yaml")
    teacher = config.stages["rl_math"]
    assert config.num_prompts_before("continued_rl_math") == teacher.steps * teacher.train_batch_size


def test_opd_example_passes_preflight(folder, monkeypatch):
    monkeypatch.chdir(folder)
    elsewhere = [f"rollout.sglang.python={sys.executable}"]  # these tests run without SGLang too
    preflight = check_workflow(load_workflow(CONFIGS / "opd_qwen3.yaml", elsewhere), folder / "tokenizers")
    assert set(preflight.stages) == {"base", "teacher", "opd"}


@pytest.mark.slow
def test_dry_run_of_a_full_size_table_starts_nothing(folder):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_s2d.cli", "run", CONFIGS / "papers/sg-opd/table3.yaml", "--dry-run"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr  # and no warning of a library
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
@pytest.mark.parametrize("size", ["papers", "tiny"])
def test_arms_of_contrasts_differ_in_the_declared_keys_only(size, table):
    config = load_workflow(CONFIGS / size / table)
    for contrast in config.contrasts:
        check_matched(contrast, {name: arm_of(config, name) for name in (contrast.a, contrast.b)})


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
            "ppo_epochs",
            "fixed_advantage",
            "reference",
        ):
            absent = 1 if key == "ppo_epochs" else None  # of a loaded checkpoint
            assert getattr(stage, key, absent) == getattr(other, key, absent), (name, key)


def test_every_row_of_the_papers_is_configured():
    rows = {
        str(table): len(yaml.safe_load((CONFIGS / "papers" / table).read_text())["table"]["rows"]) for table in TABLES
    }
    assert rows == {
        "g-opd/figure2.yaml": 8, "g-opd/figure3.yaml": 8, "g-opd/figure6a.yaml": 5, "g-opd/figure6b.yaml": 5,
        "g-opd/table1.yaml": 3, "g-opd/table2.yaml": 11, "g-opd/table3.yaml": 9, "g-opd/table8.yaml": 6,
        "s2d/table1.yaml": 3, "s2d/table2.yaml": 15, "s2d/table3.yaml": 3, "s2d/table4.yaml": 6, "s2d/table5.yaml": 6,
        "s2d/table6.yaml": 14, "sg-opd/appendix_h.yaml": 4, "sg-opd/appendix_h_teachers.yaml": 4,
        "sg-opd/table1.yaml": 6, "sg-opd/table2.yaml": 4, "sg-opd/table3.yaml": 23,
    }  # fmt: skip


@pytest.mark.parametrize("size", ["papers", "tiny"])
def test_the_control_without_a_teacher_is_matched_with_opd(size):
    """The arms differ in the advantage alone; the contrast's own check finds any other difference."""
    config = load_workflow(CONFIGS / size / "s2d/teacher_free.yaml")
    arms = {name: arm_of(config, name) for name in config.arms}
    for contrast in config.contrasts:
        check_matched(contrast, arms)
    control, opd = config.stages["fixed_8b"], config.stages["opd_sampled_8b"]
    assert control.model_copy(update={"fixed_advantage": None, "role": opd.role}) == opd
    setting = control.fixed_advantage
    assert (setting.value, setting.fraction, setting.selected_by) == (-0.5, 0.2, "student")
    assert config.stages["fixed_by_teacher_8b"].fixed_advantage.selected_by == "teacher"


def test_prompt_limits_of_the_sparse_to_dense_paper():
    """Table 8: 3,072 tokens for GRPO; table 9: 2,048 for the stages that distil."""
    config = load_workflow(CONFIGS / "papers/s2d/table2.yaml")
    limits = {"grpo": None, "opd": 2048, "teacher_cache": 2048}
    assert config.lengths.max_prompt_length == 3072
    for stage in config.stages.values():
        if stage.type in limits:
            assert stage.max_prompt_length == limits[stage.type]


@pytest.mark.parametrize("table", ["table2", "table4", "table5"])
def test_tiny_tables_update_several_times_on_a_sampled_batch(table):
    """So that old log-probabilities are scored and ratios are clipped (docs/papers.md has the clipped fraction)."""
    config = load_workflow(CONFIGS / f"tiny/s2d/{table}.yaml")
    stages = {name for end in config.arms.values() for name in config.chain(end) if name.startswith("stage3")}
    assert stages and all(not surrogate_of(config.stages[name]).on_policy for name in stages)
