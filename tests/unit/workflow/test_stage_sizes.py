"""A rank knows its stage's sizes: for the line when its GPU ran out of memory, and for the servers beside it."""

import types

import pytest
import torch

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.device import Capabilities
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.workflow import stage_sizes

LAYOUT = types.SimpleNamespace(tp_rank=0, pp_rank=0, cp_rank=0, dp_rank=5)


@pytest.fixture
def gpu(monkeypatch):
    def of(memory: int) -> None:
        monkeypatch.setattr(stage_sizes.device, "capabilities", lambda: Capabilities(True, "H100", False, False))
        monkeypatch.setattr(stage_sizes.device, "total_memory", lambda: memory)
        monkeypatch.setattr(stage_sizes.device, "count", lambda: 8)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)

    return of


def inputs_of(config, name, tmp_path):
    return StageInputs(config, {}, tmp_path, name)


def test_out_of_memory_names_rank_and_settings(gpu, tmp_path):
    config = load_workflow("configs/smoke.yaml", ["precision=bfloat16"])
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    inputs = inputs_of(config, "student_grpo", tmp_path)
    gpu(80 << 30)
    line = stage_sizes.out_of_gpu_memory(error, config, "student_grpo", inputs, LAYOUT)
    assert line.startswith("stage student_grpo, rank 5 (tp 0, pp 0, cp 0, dp 5): out of GPU memory")
    assert "Tried to allocate 2.00 GiB" in line and "estimated to fit: --set stages.student_grpo.micro_batch" in line
    gpu(1000)
    assert "more tensor or pipeline ranks" in stage_sizes.out_of_gpu_memory(
        error, config, "student_grpo", inputs, LAYOUT
    )


@pytest.mark.parametrize("name", ["forward_kl", "student_base", "opd", "cache"])
def test_every_type_of_stage_says_what_would_fit(gpu, tmp_path, name):
    config = load_workflow("configs/smoke.yaml", ["precision=bfloat16"])
    gpu(80 << 30)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    line = stage_sizes.out_of_gpu_memory(error, config, name, inputs_of(config, name, tmp_path), LAYOUT)
    assert line.startswith(f"stage {name}, rank 5")


def test_servers_get_what_the_trainer_leaves(gpu, tmp_path):
    config = load_workflow("configs/smoke.yaml", ["precision=bfloat16", "rollout.engine=sglang"])
    inputs = inputs_of(config, "student_grpo", tmp_path)
    gpu(80 << 30)
    (memory,) = stage_sizes.room_for_servers(config, "student_grpo", inputs)
    assert (8 << 30) < memory.beside < (9 << 30) and memory.static + memory.beside + (10 << 30) == 80 << 30
    gpu(8 << 30)
    with pytest.raises(UserError, match="student_grpo: servers of"):
        stage_sizes.room_for_servers(config, "student_grpo", inputs)
    assert stage_sizes.room_for_servers(load_workflow("configs/smoke.yaml"), "student_grpo", inputs) == []
