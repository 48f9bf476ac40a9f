"""Servers that cannot start on this machine are refused before a run starts; a plan for another one needs none."""

import importlib.util

import pytest
from rich.console import Console

from megatron_s2d.cli import main
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.cuda_variables import InstalledGpus
from megatron_s2d.workflow import runner, server_room

GIB = 1 << 30


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    monkeypatch.setattr(server_room, "_check_installed", lambda config: None)  # SGLang is not installed everywhere

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


@pytest.fixture
def without_sglang(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *arguments: None if name == "sglang" else real(name, *arguments)
    )


DIRECT = ("arms={direct: student_grpo}", "contrasts=[]", "max_parallel_stages=1")
URL = '["http://127.0.0.1:1"]'


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rollout.engine=sglang",), "sglang is not installed"),
        (("stages.opd.teacher_engine=sglang", "stages.opd.kl_estimator=sampled_token"), "sglang is not installed"),
        (("rollout.engine=sglang", "rollout.sglang.python=/no/python"), "/no/python: no such program"),
        (("rollout.engine=sglang", f"rollout.sglang.urls={{teacher: {URL}}}", *DIRECT), "sglang is not installed"),
        (("rollout.engine=sglang", f"rollout.sglang.urls={{student: {URL}}}", *DIRECT), None),
        (("rollout.engine=megatron",), None),
    ],
)
def test_servers_that_a_run_starts_have_to_be_installed(without_sglang, tmp_path, capsys, overrides, message):
    settings = [part for override in overrides for part in ("--set", override)]
    command = ["configs/smoke.yaml", "--out", str(tmp_path / "run"), *settings]
    assert main(["plan", *command]) == 0, "a plan may be for another machine"
    capsys.readouterr()
    assert main(["run", *command, "--dry-run"]) == (0 if message is None else 1)
    assert message is None or message in capsys.readouterr().err
    config = load_workflow("configs/smoke.yaml", list(overrides))
    if message is not None:
        with (
            pytest.raises(UserError, match=message),
            runner.prepare_run(config, tmp_path / "run", Console(quiet=True), None),
        ):
            pass
