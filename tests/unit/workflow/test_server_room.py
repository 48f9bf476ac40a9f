"""Servers that have no room beside the trainer are refused before a run starts, where there is a GPU to ask."""

import pytest
from rich.console import Console

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.cuda_variables import InstalledGpus
from megatron_s2d.workflow import preflight, runner, server_room

GIB = 1 << 30


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "_check_engine", lambda config: None)  # SGLang is not installed everywhere

    def run(memory, *overrides):
        gpus = None if memory is None else InstalledGpus(8, memory, 9)
        monkeypatch.setattr(server_room, "installed_gpus", lambda: gpus)
        config = load_workflow("configs/smoke.yaml", ["precision=bfloat16", "rollout.engine=sglang", *overrides])
        with runner.prepare_run(config, tmp_path / "run", Console(quiet=True), None) as (jobs, _):
            return len(jobs)

    return run


def test_a_gpu_without_room_for_the_servers_is_refused_before_the_run(prepare):
    with pytest.raises(UserError, match=r"servers of .* need .* and beside the trainer .* are left on their GPUs"):
        prepare(8 * GIB)
    assert prepare(80 * GIB) and prepare(None)
    assert prepare(8 * GIB, "rollout.sglang.extra_args=[--mem-fraction-static=0.3]")
    assert prepare(8 * GIB, "rollout.engine=megatron")
