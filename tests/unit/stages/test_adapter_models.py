"""A stage with a LoRA adapter builds one model: references and teachers that are its start are the model without it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.records import Sample
from megatron_s2d.stages import validation
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.model_factory import ModelFactory
from megatron_s2d.stages.opd import run_opd
from megatron_s2d.teachers.frozen import TeacherRouter

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"
LORA = "{rank: 2, targets: [q_proj, down_proj]}"


@pytest.fixture(scope="module")
def layout():
    torch.set_num_threads(1)
    initialize_distributed()
    return build_layout(ParallelConfig())


@pytest.fixture
def built(monkeypatch):
    """Models that were built, in order."""
    models, build = [], ModelFactory._build
    monkeypatch.setattr(
        ModelFactory,
        "_build",
        lambda self, *args, **options: models.append(build(self, *args, **options)) or models[-1],
    )
    return models


def context_of(stage, tmp_path, layout, *overrides) -> StageContext:
    """The context of a stage of the smoke workflow, whose inputs are models with random weights."""
    config = load_workflow(SMOKE, list(overrides))
    inputs = {name: StageDirectory(tmp_path / name) for name in config.stages}
    directory = StageDirectory(tmp_path / "own")
    directory.path.mkdir()
    context = StageContext.create(
        config, stage, directory=directory, inputs=inputs, layout=layout, tokenizer_cache=tmp_path / "tokenizer"
    )
    for seed, name in enumerate(dict.fromkeys(config.stages[stage].inputs().values())):
        factory = ModelFactory(config, "teacher_base", seed, layout, context.inputs)
        factory.fresh(config.model_of(name)).save(inputs[name].model_path, {}, with_optimizer=False)
    return context


def sample():
    return Sample("0", "0", "0", "test", 0, np.arange(3, 11), np.arange(8) >= 3, 1.0, "data")


def shake(model):
    """Make the adapter an effective one."""
    with torch.no_grad():
        for parameter in model.chunks[0].adapter.parameters():
            parameter += 0.3


def test_the_reference_of_grpo_is_the_model_without_its_adapter(tmp_path, layout, built):
    stage = "stages.student_grpo"
    context = context_of("student_grpo", tmp_path, layout, f"{stage}.lora={LORA}", f"{stage}.kl_loss_coef=0.1")
    built.clear()
    actor = context.models.start()
    before = actor.score([sample()])[0]
    reference, named = context.models.start(trained=False), context.models.frozen("student_base")
    reference.freeze()
    actor.prepare_training(OptimizerConfig(), 1)
    assert len(built) == 1
    shake(actor)
    for frozen in (reference, named):
        frozen.offload(), frozen.onload()  # a model that takes turns with others
        assert (frozen.score([sample()])[0] == before).all()
    assert not (actor.score([sample()])[0] == before).all()
    assert all(p.requires_grad for p in actor.chunks[0].adapter.parameters())

    context.save_model(actor)
    assert {path.name for path in context.directory.adapter_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    plain = ModelFactory(context.models._config, "teacher_base", 7, layout, context.inputs).fresh("student")
    plain.load(context.directory.model_path)
    assert plain.score([sample()])[0] == pytest.approx(actor.score([sample()])[0], abs=1e-5)


def test_teachers_and_references_that_are_the_start_need_no_model(tmp_path, layout, built):
    overrides = ["reward_scale=1.25", "reference=forward_kl", "kl_estimator=sampled_token", f"lora={LORA}"]
    context = context_of("opd", tmp_path, layout, *(f"stages.opd.{item}" for item in overrides))
    built.clear()
    student = context.models.start()
    references = TeacherRouter.load(context.stage.reference, context.models.frozen)
    assert len(built) == 1 and references.models[None].chunks[0] is student.chunks[0]
    context.models.frozen("rl_teacher")
    assert len(built) == 2


def test_a_layout_of_its_own_is_another_model(tmp_path, layout, built):
    config = load_workflow(SMOKE, [f"stages.opd.lora={LORA}"])
    assert config.shares_weights("opd", "forward_kl") and not config.shares_weights("opd", "rl_teacher")
    assert not config.shares_weights("stage3", "opd")  # all weights are trained
    other = "{tensor_model_parallel_size: 2}"
    config = load_workflow(
        SMOKE, [f"stages.opd.lora={LORA}", "parallel.data_parallel_size=2", f"teacher_parallel={other}"]
    )
    assert not config.shares_weights("opd", "forward_kl")


def adapter_after(folder, layout, *overrides) -> dict[str, torch.Tensor]:
    """The adapter that a short distillation leaves in ``folder``."""
    folder.mkdir()
    small = ["train_batch_size=2", f"lora={LORA}", "optimizer.lr=0.01", *overrides]
    context = context_of("opd", folder, layout, *(f"stages.opd.{item}" for item in small))
    context.directory.begin({}, {}, {})
    run_opd(context)
    return load_file(context.directory.adapter_path / "adapter_model.safetensors")


def test_the_adapter_of_the_best_validation_is_left(tmp_path, layout, monkeypatch):
    rates, measured = {1: 0.2, 2: 0.9, 3: 0.1}, validation.set_metrics
    monkeypatch.setattr(
        validation, "set_metrics", lambda rows, k: measured(rows, k) | {"pass_rate": rates[rows[0]["step"]]}
    )
    validated = "validation={interval_steps: 1, data: {v: held_out}, num_prompts: 2, best: {metric: v/pass_rate}}"
    best = adapter_after(tmp_path / "best", layout, "steps=3", validated, "checkpoint.keep_last_n=1")
    two, three = (adapter_after(tmp_path / str(steps), layout, f"steps={steps}", "validation=null") for steps in (2, 3))
    assert all(torch.equal(best[name], two[name]) for name in two) and best.keys() == two.keys()
    assert not all(torch.equal(best[name], three[name]) for name in three)
