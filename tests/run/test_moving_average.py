"""A student taught by a moving average (EMA) of itself, killed and resumed: the same weights, bit for bit."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from s2d import ROOT, metrics, processes_of, s2d, start, wait_for

from megatron_s2d.conversion.megatron_format import MegatronReader

CONFIG = ROOT / "configs" / "teacher_service.yaml"
DECAY, STEPS = 0.9, 16
STAGE = "stages.opd_in_trainer"
SETTINGS = (
    "data.problems.num_prompts=16", "arms={average: opd_in_trainer}", f"{STAGE}.steps={STEPS}",
    f"{STAGE}.teacher=self", f"{STAGE}.teacher_view={{context: '{{solution}} {{prompt}}'}}",
    f"{STAGE}.teacher_ema_decay={DECAY}", f"{STAGE}.checkpoint={{interval_steps: 1, keep_last_n: 20}}",
)  # fmt: skip


def run_arguments(run_dir: Path, parallel: str) -> list:
    settings = [*SETTINGS, f"parallel={parallel}"]
    return ["run", CONFIG, "--out", run_dir, *(part for setting in settings for part in ("--set", setting))]


def weights(directory: Path) -> list[torch.Tensor]:
    reader = MegatronReader(directory)
    return [reader.read(piece) for piece in reader.pieces]


@pytest.fixture(scope="module")
def start_of_student(tmp_path_factory) -> Path:
    """The start, which layouts share."""
    run_dir = tmp_path_factory.mktemp("average") / "start"
    finished = s2d(*run_arguments(run_dir, "{}"), "--stage", "student")
    assert finished.returncode == 0, finished.stderr
    return run_dir / "stages/student"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["{}", "{tensor_model_parallel_size: 2}", "{data_parallel_size: 2}"])
def test_a_run_taught_by_its_moving_average_resumes_to_the_same_weights(start_of_student, tmp_path, parallel):
    directories = [tmp_path / name for name in ("unbroken", "killed")]
    for run_dir in directories:
        shutil.copytree(start_of_student, run_dir / "stages/student")
    unbroken, killed = (run_dir / "stages/opd_in_trainer" for run_dir in directories)
    finished = s2d(*run_arguments(directories[0], parallel))
    assert finished.returncode == 0, finished.stderr
    assert not (unbroken / "lagged_teacher").exists()  # which only a run that continues needs

    run = start(*run_arguments(directories[1], parallel))
    wait_for(lambda: (killed / "lagged_teacher/5").exists() and (killed / "checkpoints/step_00000005").exists(), run)
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_for(lambda: not processes_of(directories[1]))
    assert not (killed / "finished.json").exists(), "the stage ended before the kill: use more steps"
    for step in (2, 3, 4):  # with each checkpoint the average that it trained with
        average, student, following = (
            weights(killed / name)
            for name in (f"lagged_teacher/{step}", f"checkpoints/step_{step:08d}", f"lagged_teacher/{step + 1}")
        )
        for a, s, f in zip(average, student, following, strict=True):
            torch.testing.assert_close(f.double(), DECAY * a.double() + (1 - DECAY) * s.double(), rtol=0, atol=1e-7)
        assert not all(map(torch.equal, average, student))
    finished = s2d(*run_arguments(directories[1], parallel))
    assert finished.returncode == 0, finished.stderr
    assert metrics(directories[1], "stages/opd_in_trainer") == metrics(directories[0], "stages/opd_in_trainer")
    assert all(map(torch.equal, weights(killed / "model"), weights(unbroken / "model")))
    assert not all(map(torch.equal, weights(killed / "model"), weights(start_of_student / "model")))
