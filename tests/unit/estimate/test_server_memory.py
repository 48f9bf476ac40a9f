"""Servers beside the trainer take what its estimate leaves of the GPU."""

import types

import pytest

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.memory import ResidentMemory, StageMemory
from megatron_s2d.estimate.server_memory import server_memory, sets_fraction
from megatron_s2d.estimate.stage_memory import StageShape
from megatron_s2d.rollout.sglang import server

GIB = 1 << 30
SHAPE = StageShape(64, 1, 64, 8, 1024, 1024)
TRAINER = StageMemory(0, (ResidentMemory("student", "small", 30 * GIB),), {"train": {"activations": 25 * GIB}})


@pytest.fixture
def config():
    def load(**sglang):
        settings = [f"rollout.sglang.{name}={value}" for name, value in sglang.items()]
        return load_workflow("configs/smoke.yaml", ["rollout.engine=sglang", "precision=bfloat16", *settings])

    return load


def planned(config, *, device=80 * GIB, trainer=TRAINER):
    specs = {name: ModelConfig(preset="llama-3.1-8b").resolve() for name in config.models}
    sizes = {"device_memory": device, "reserved": 8 * GIB, "gpus_per_node": 8}
    return server_memory(config, "student_grpo", specs, SHAPE, trainer, **sizes)


def test_a_server_that_sleeps_in_training_leaves_what_the_trainer_holds(config):
    (found,) = planned(config(enable_memory_saver=True))
    assert found.beside == 38 * GIB and found.static == (80 - 38 - 10) * GIB
    # SGLang takes its fraction of what is free when it starts: here before the optimizer's state exists.
    assert found.fraction(64 * GIB) == 0.5


def test_a_server_that_keeps_its_memory_leaves_room_for_the_peak(config):
    with pytest.raises(
        UserError, match=r"student_grpo: servers of .* need 15.2 GiB .* 7.0 GiB are left .*memory_saver"
    ):
        planned(config())
    (found,) = planned(config(), device=100 * GIB)
    assert found.beside == 63 * GIB and found.static == 27 * GIB


def test_servers_on_their_own_gpus_take_all_but_activations_and_graphs(config):
    (found,) = planned(config(base_gpu_id=1))
    assert found.beside == 0 and found.static == 70 * GIB and found.fraction(80 * GIB) == 0.875
    with pytest.raises(UserError, match="raise rollout.sglang.tensor_parallel_size"):
        planned(config(base_gpu_id=1), device=16 * GIB)
    assert planned(config(base_gpu_id=1, tensor_parallel_size=2), device=16 * GIB)


def test_the_users_own_fraction_is_taken(config):
    own = config(extra_args="[--mem-fraction-static=0.3]")
    assert sets_fraction(own) and not sets_fraction(config())
    planned(own)  # is not refused


def test_a_server_is_started_with_its_fraction(config, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(server._Process, "__init__", lambda self, command, *_: started.append(command))
    monkeypatch.setattr(server, "read_api_key", lambda path: "key")
    capabilities = types.SimpleNamespace(cuda=True)
    monkeypatch.setattr(server.device, "capabilities", lambda: capabilities)
    monkeypatch.setattr(server.device, "free_memory", lambda: 64 * GIB)
    settings = config(enable_memory_saver=True)
    (memory,) = planned(settings)
    inputs = (settings.rollout.sglang, tmp_path, tmp_path / "log", tmp_path / "key")
    options = {"number": 0, "weight_version": "v", "max_positions": 512, "dtype": "bfloat16", "max_tokens": 1}
    server.SglangServer(*inputs, **options, memory=memory)
    server.SglangServer(*inputs, **options)
    assert started[0][started[0].index("--mem-fraction-static") + 1] == "0.5"
    assert "--mem-fraction-static" not in started[1]
