"""``s2d init``: every recipe passes the checks of ``--dry-run`` on a model and data of the user."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_s2d.cli import main
from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.conversion.hf_writer import HfWriter, PlannedTensor
from megatron_s2d.data.prompts import prompts_of
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.models.families import hf_tensor_shapes
from megatron_s2d.workflow import recipes
from megatron_s2d.workflow.preflight import check_workflow
from megatron_s2d.workflow.recipes import RECIPES


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder with a model, its tokenizer, and 500 problems."""
    folder = tmp_path_factory.mktemp("user")
    tokenizer = load_tokenizer("task:modular_arithmetic", folder / "cache")
    tokenizer.save_pretrained(folder / "model")
    spec = ModelConfig(preset="tiny-llama", vocab_size=len(tokenizer), max_position_embeddings=64).resolve()
    plan = [PlannedTensor(name, torch.float32, tuple(shape)) for name, shape in hf_tensor_shapes(spec)]
    writer = HfWriter(folder / "model", plan, 10**9)
    for tensor in plan:
        writer.write(tensor.name, torch.zeros(tensor.shape))
    writer.finish()
    (folder / "model" / "config.json").write_text(json.dumps(hf_config_from_spec(spec, "float32")))
    rows = [
        {"question": f"{n % 17} + {n // 17 % 17} + {n // 289} =", "answer": str(n % 5), "solution": "3"}
        for n in range(500)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def init(user, target, recipe, *more):
    lengths = ("--max-prompt-length", "32", "--max-response-length", "8")
    models = ("--student", str(user / "model"), "--teacher", str(user / "model"))
    data = ("--data", str(user / "problems.jsonl"), "--num-gpus", "0")
    return main(["init", str(target), "--recipe", recipe, *models, *data, *lengths, *more])


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_pass_the_checks(user, tmp_path, recipe, capsys):
    target = tmp_path / "my.yaml"
    solutions = ("--solution-column", "solution") if recipe in ("sft", "self-distillation") else ()
    assert init(user, target, recipe, *solutions) == 0, capsys.readouterr().err
    config = load_workflow(target)
    assert config.name == "my" and config.precision == "float32"
    assert ("teacher" in config.models) == (recipe in ("opd", "four-stages"))
    train, held_out = (prompts_of(config, name, load_tokenizer(config.tokenizer, tmp_path)).prompts
                       for name in ("train", "eval"))  # fmt: skip
    assert (len(train), len(held_out)) == (400, 100) and not set(train.values("id")) & set(held_out.values("id"))
    assert target.read_text().count("#") > 8  # it is commented
    assert init(user, target, recipe) == 1 and "exists already" in capsys.readouterr().err


def test_adapters_of_a_rank_are_trained_at_ten_times_the_rate(user, tmp_path, capsys):
    target = tmp_path / "my.yaml"
    assert init(user, target, "four-stages", "--lora-rank", "4") == 0, capsys.readouterr().err
    stages = load_workflow(target).stages
    rates = {name: stage.optimizer.lr for name, stage in stages.items() if getattr(stage, "lora", None)}
    assert rates == {"rl_teacher": 1e-5, "forward_kl": 5e-5, "opd": 1e-5, "stage3": 1e-5}
    assert stages["opd"].lora.rank == 4
    assert init(user, tmp_path / "other.yaml", "grpo", "--lora-rank", "4096") == 1
    assert "lora.rank: 4096 is more than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "line"),
    [("sft", "have no reference solution"), ("self-distillation", "has no solution; name its column")],
)
def test_missing_solutions_are_named(user, tmp_path, capsys, recipe, line):
    assert init(user, tmp_path / "my.yaml", recipe) == 1
    assert line in capsys.readouterr().err and not (tmp_path / "my.yaml").exists()


def test_micro_batches_fit_the_memory_of_a_machine_without_gpus(user, tmp_path, capsys, monkeypatch):
    assert init(user, tmp_path / "large.yaml", "opd") == 0, capsys.readouterr().err
    assert load_workflow(tmp_path / "large.yaml").stages["opd"].micro_batch.max_tokens_per_gpu == 16384
    monkeypatch.setattr(recipes.psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * 2**20))
    assert init(user, tmp_path / "small.yaml", "opd") == 0, capsys.readouterr().err
    config = load_workflow(tmp_path / "small.yaml")
    tokens = config.stages["opd"].micro_batch.max_tokens_per_gpu
    assert 40 <= tokens <= 8192  # prompt and response
    preflight = check_workflow(config, tmp_path / "run")
    assert all(item.total <= 16 * 2**20 for item in preflight.memory(on_gpu=False).values())


def test_gpus_get_a_layout_that_fits(user, tmp_path, capsys):
    target = tmp_path / "my.yaml"
    assert init(user, target, "opd", "--num-gpus", "4", "--gpu", "h100") == 0, capsys.readouterr().err
    config = load_workflow(target)
    assert config.parallel.world_size == 4 and config.precision == "bfloat16"


def test_what_is_missing_is_named_without_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(["init", str(tmp_path / "my.yaml"), "--recipe", "opd"]) == 1
    assert "give --student" in capsys.readouterr().err
