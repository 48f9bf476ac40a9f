"""LoRA in plans and checks: resume keys, memory, refusals, and the recipes of ``s2d init``."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from megatron_s2d.config.lora import LoraConfig, num_adapter_values
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.models.peft_files import adapter_shapes, write_adapter
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.preflight import check_workflow

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"
GRPO = "stages.student_grpo"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def check(cache, *overrides):
    return check_workflow(load_workflow(SMOKE, list(overrides)), cache)


def key(tmp_path, *overrides):
    jobs = make_plan(load_workflow(SMOKE, list(overrides)), tmp_path)
    return next(job for job in jobs if job.id == "stages/student_grpo").key


def test_the_adapter_is_part_of_the_resume_key(cache, tmp_path):
    spec, lora = check(cache).specs["student"], LoraConfig(rank=2)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        tensors = {name: torch.randn(shape) for name, shape in adapter_shapes(spec, lora).items()}
        write_adapter(tmp_path / name, lora, tensors, "")
    overrides = ["{rank: 2}", "{rank: 3}", "{rank: 2, alpha: 8}", "{rank: 2, targets: [q_proj]}"]
    overrides += [f"{{rank: 2, adapter: {tmp_path / name}}}" for name in "ab"]
    keys = [key(tmp_path), *(key(tmp_path, f"{GRPO}.lora={text}") for text in overrides)]
    assert len(set(keys)) == len(keys)
    assert key(tmp_path, f"{GRPO}.lora=null") == keys[0]
    (tmp_path / "b").rename(tmp_path / "c")  # the content counts, not its place
    assert key(tmp_path, f"{GRPO}.lora={{rank: 2, adapter: {tmp_path / 'c'}}}") == keys[-1]
    with pytest.raises(UserError, match=r"lora\.rank is not that of .*, which is 2"):
        check(cache, f"{GRPO}.lora={{rank: 3, adapter: {tmp_path / 'a'}}}")
    with pytest.raises(UserError, match="name the stage whose weights are the reference"):
        check(cache, f"{GRPO}.lora={{rank: 2, adapter: {tmp_path / 'a'}}}", f"{GRPO}.kl_loss_coef=0.1")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{rank: 64}", r"stages\.student_grpo\.lora\.rank: 64 is more than 48"),
        ("{rank: 2, targets: [experts]}", r"stages\.student_grpo\.lora\.targets: the model is dense"),
        ("{rank: 2, targets: [lm_head]}", "lm_head"),
        ("{rank: 2, dropout: 0.1}", "dropout is not implemented"),
        ("{rank: 2, adapter: nowhere}", "nowhere: not a PEFT directory"),
    ],
)
def test_impossible_adapters_are_refused(cache, lora, message):
    with pytest.raises(UserError, match=message):
        check(cache, f"{GRPO}.lora={lora}")


def test_memory_has_one_model_and_the_state_of_the_adapter(cache):
    penalty = [f"{GRPO}.kl_loss_coef=0.1", "precision=bfloat16"]
    full = check(cache, *penalty).memory(on_gpu=True, transformer_engine=False)["student_grpo"]
    preflight = check(cache, *penalty, f"{GRPO}.lora={{rank: 4}}")
    adapted = preflight.memory(on_gpu=True, transformer_engine=False)["student_grpo"]
    assert [item.role for item in full.models] == ["student", "reference"]
    (student,) = adapted.models
    count = num_adapter_values(preflight.specs["student"], LoraConfig(rank=4))
    assert student.gradients == pytest.approx(4 * count, rel=0.02)
    assert student.optimizer == pytest.approx(12 * count, rel=0.02)
    assert student.weights == pytest.approx(full.models[1].weights + 2 * count, rel=0.02)
    assert "reference" in adapted.phases
