"""What a stage's context opens and closes: layouts of frozen models, served engines, seeds, stop tokens."""

import dataclasses
import json
import types
from pathlib import Path

import pytest
import yaml

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.data.tokenizer import stop_token_ids
from megatron_s2d.errors import UserError
from megatron_s2d.rollout.sampler import PromptDataLoader
from megatron_s2d.stages import model_factory, rollout_factory
from megatron_s2d.stages.context import StageContext, derive_seed
from megatron_s2d.stages.model_factory import ModelFactory
from megatron_s2d.stages.rollout_factory import RolloutFactory, ServerRegistry

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"
OWN, OTHER = ParallelConfig(data_parallel_size=2), ParallelConfig(tensor_model_parallel_size=2)


class Recorder:
    """Appends its name to ``calls`` when it is closed or destroyed."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def close(self):
        self.calls.append(self.name)

    destroy = close


def context(calls) -> StageContext:
    fields = dict.fromkeys(field.name for field in dataclasses.fields(StageContext))
    return StageContext(**fields | {"rollouts": Recorder("rollouts", calls), "models": Recorder("models", calls)})


def test_leaving_the_context_closes_servers_before_layouts():
    calls = []
    with context(calls):
        pass
    assert calls == ["rollouts", "models"]


def test_after_an_error_only_servers_are_closed():
    """Destroying a layout is collective, and other ranks may not get there."""
    calls = []
    with pytest.raises(UserError), context(calls):
        raise UserError("stop")
    assert calls == ["rollouts"]


def test_engines_are_closed_in_reverse_order(tmp_path):
    calls = []
    registry = ServerRegistry(tmp_path)
    for name in ("first", "second"):
        assert not registry.has_model(name)
        registry.add(name, Recorder(name, calls))
    assert registry.has_model("first") and registry.next_directory("third") == tmp_path / "2-third"
    registry.close()
    registry.close()
    assert calls == ["second", "first"]


def test_layouts_of_frozen_models_are_built_once_and_destroyed(monkeypatch):
    built, destroyed = [], []
    monkeypatch.setattr(
        model_factory, "build_layout", lambda config: built.append(config) or Recorder(config, destroyed)
    )
    config = types.SimpleNamespace(stages={"opd": None})
    layout = types.SimpleNamespace(config=OWN)
    factory = ModelFactory(config, "opd", 0, layout, None)
    assert factory._layout_for(OWN) is layout
    assert factory._layout_for(OTHER) is factory._layout_for(OTHER)
    factory.close()
    factory.close()
    assert built == destroyed == [OTHER]


def rollouts(tmp_path, urls=()) -> RolloutFactory:
    rollout = types.SimpleNamespace(engine="sglang", sglang=types.SimpleNamespace(urls={"student": list(urls)}))
    lengths = types.SimpleNamespace(max_prompt_length=10)
    models = {"student": types.SimpleNamespace(path=None)}
    config = types.SimpleNamespace(rollout=rollout, lengths=lengths, models=models)
    inputs = types.SimpleNamespace(tokenizer_of=lambda model_name: types.SimpleNamespace(eos_token_id=3))
    return RolloutFactory(config, "opd", tmp_path, inputs)


def test_configured_servers_hold_one_set_of_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_factory, "sglang_server_group", lambda *_, **options: options)
    monkeypatch.setattr(rollout_factory, "ServedEngine", lambda group: Recorder(group, []))
    spec = types.SimpleNamespace(max_position_embeddings=15)
    model = types.SimpleNamespace(
        chunks=[], spec=spec, layout=None, score_replicated=None, on_device=print, routing_replay=None, adapter=None
    )
    factory = rollouts(tmp_path, ["http://127.0.0.1:30000"])
    params = factory.sampling_params(SamplingConfig(max_response_length=8), "student")
    engine = factory.engine(model, "student", params)
    assert engine.name["requirements"].params is params and engine.name["on_device"].keywords == {"release": False}
    with pytest.raises(UserError, match="servers for two sets of weights of the model 'student'"):
        factory.served_teacher(model, "student", params, 4)
    # Servers that the run starts have weights of their own each.
    factory = rollouts(tmp_path)
    factory.engine(model, "student", params)
    teacher = factory.served_teacher(model, "student", params, 4)
    assert teacher.name["requirements"].top_k == 4 and teacher.name["on_device"].keywords == {"release": True}


def test_stop_tokens_are_those_of_tokenizer_and_published_model(tmp_path):
    tokenizer = types.SimpleNamespace(eos_token_id=7)
    assert stop_token_ids(tokenizer, None) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7, 2]}))
    assert stop_token_ids(tokenizer, tmp_path) == (2, 7, 9)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        stop_token_ids(types.SimpleNamespace(eos_token_id=None), None)


@pytest.mark.parametrize("type_", ["grpo", "opd"])
def test_a_stage_goes_on_with_the_prompts_that_come_after_those_of_its_start(tmp_path, type_):
    kind = {"grpo": {"kl_loss_coef": 0.0}, "opd": {"teacher": "first"}}[type_]
    shared = {"type": type_, "prompts": "pool", "seed": 4, **kind}
    document = {
        "defaults": str(SMOKE),
        "data": {"pool": {"type": "task", "split": "pool", "num_prompts": 50}},
        "stages": {
            "first": {
                "type": "grpo",
                "prompts": "pool",
                "seed": 4,
                "model": "student",
                "steps": 3,
                "train_batch_size": 8,
            },
            "second": shared | {"init": "first", "steps": 2, "train_batch_size": 16, "prompt_order": "continue"},
            "third": shared | {"init": "second", "steps": 2, "train_batch_size": 5, "prompt_order": "continue"},
            "again": shared | {"init": "second", "steps": 2, "train_batch_size": 5},
        },
        "arms": {"a": "third", "b": "again"},
        "contrasts": [],
    }
    (tmp_path / "continued.yaml").write_text(yaml.safe_dump(document))
    config = load_workflow(tmp_path / "continued.yaml")
    prompts = [types.SimpleNamespace(id=str(number)) for number in range(50)]

    def drawn(name):
        parts = dict.fromkeys(field.name for field in dataclasses.fields(StageContext))
        inputs = types.SimpleNamespace(stage_prompts=lambda stage: {name: prompts}[stage])
        parts |= {"name": name, "stage": config.stages[name], "seed": 4, "_config": config, "inputs": inputs}
        loader = StageContext(**parts).prompt_loader()
        return [prompt.id for step in range(config.stages[name].steps) for prompt in loader.batch_for_step(step + 1)]

    order = PromptDataLoader(prompts, 1, 4)
    ids = [order.batch_for_step(step + 1)[0].id for step in range(66)]
    assert (drawn("first"), drawn("second"), drawn("third")) == (ids[:24], ids[24:56], ids[56:])
    assert drawn("again") == ids[:10]


def test_seeds_of_equal_offsets_are_equal():
    config = types.SimpleNamespace(seed=2)
    assert derive_seed(config, 1) == derive_seed(config, 1) != derive_seed(config, 0)
    assert derive_seed(config, 1) != derive_seed(types.SimpleNamespace(seed=3), 1)
