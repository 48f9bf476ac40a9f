"""Trackers: one curve over restarts, failures that do not reach training, and the calls of each package."""

import importlib.util
import inspect
import json
import sys
import threading
import time
import tomllib
import types
from pathlib import Path

import pytest

from megatron_s2d.artifacts.files import append_line
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.artifacts.versions import timestamp
from megatron_s2d.config.base import Config, parse
from megatron_s2d.config.tracking import MlflowTracker, TensorBoardTracker, Tracking, TrackioTracker, WandbTracker
from megatron_s2d.errors import UserError
from megatron_s2d.stages.validation import set_metrics
from megatron_s2d.train.metrics import MetricsLog
from megatron_s2d.workflow.tracking_checks import REQUIREMENTS, check_trackers

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def stage(tmp_path):
    return StageDirectory(tmp_path / "stages/opd")


class FakeRun:
    """A run of Weights & Biases or Trackio; the parameters are those of wandb 0.31 and trackio 0.43."""

    def __init__(self, calls):
        self._calls = calls

    def log(self, data, step=None):
        self._calls.append(("log", step, data))

    def finish(self):
        self._calls.append("finish")


def fake_wandb(calls):
    def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
             config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None,
             mode=None, force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None,
             tensorboard=None, sync_tensorboard=None, monitor_gym=None, settings=None):  # fmt: skip
        calls.append(("init", {"id": id, "name": name, "group": group, "project": project, "mode": mode, "dir": dir}))
        assert resume == "allow" and settings == {"console": "off", "silent": True}
        return FakeRun(calls)

    return types.SimpleNamespace(init=init, Settings=lambda **settings: settings)


def fake_trackio(calls):
    def init(project, *, name=None, group=None, space_id=None, config=None, resume="never", embed=True):
        calls.append(("init", {"id": name, "group": group, "project": project}))
        assert resume == "allow" and embed is False
        return FakeRun(calls)

    return types.SimpleNamespace(init=init)


def fake_mlflow(calls):
    class MlflowClient:
        def __init__(self, tracking_uri=None, registry_uri=None):
            calls.append(("client", tracking_uri))

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name, artifact_location=None, tags=None):
            calls.append(("experiment", name))
            return "7"

        def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
            calls.append(("run", experiment_id, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

        def update_run(self, run_id, status=None, name=None):
            calls.append(("update", run_id, status))

        def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
            assert run_id == "abc"
            if params:
                calls.append(("params", dict(params)))
                return
            calls.append(("log", metrics[0][3], {name: value for name, value, _, _ in metrics}))

        def set_terminated(self, run_id, status=None, end_time=None):
            calls.append("finish")

    def metric(key, value, timestamp, step):
        assert isinstance(timestamp, int) and timestamp > 1e12  # milliseconds
        return key, value, timestamp, step

    return types.SimpleNamespace(
        MlflowClient=MlflowClient,
        entities=types.SimpleNamespace(Metric=metric, Param=lambda key, value: (key, value)),
        __path__=[],
    )


FAKES = {"wandb": fake_wandb, "mlflow": fake_mlflow, "trackio": fake_trackio}


@pytest.fixture
def calls(monkeypatch):
    """What the packages are asked to do, all three replaced by fakes."""
    calls = []
    for name, fake in FAKES.items():
        monkeypatch.setitem(sys.modules, name, fake(calls))
    monkeypatch.setitem(sys.modules, "mlflow.entities", sys.modules["mlflow"].entities)
    return calls


TRACKERS = [WandbTracker(mode="offline"), MlflowTracker(tracking_uri="sqlite:///x.db"), TrackioTracker()]


@pytest.mark.parametrize("tracker", TRACKERS, ids=lambda tracker: tracker.type)
def test_steps_that_are_computed_again_are_sent_once_and_lost_rows_are_sent_later(stage, calls, tracker):
    stage.begin({"type": "opd", "optimizer": {"lr": 0.1}}, {}, {})
    log = MetricsLog(stage)  # a run without the tracker
    log.write(1, {"loss": 1.0})
    log = MetricsLog(stage, 1, trackers=[tracker], workflow="mine")
    for step in (2, 3, 4):
        log.write(step, {"loss": 1.0 / step, "kl": float("nan"), "domain/a b@c/kl": 0.5})
    log.close()
    again = MetricsLog(stage, 2, trackers=[tracker], workflow="mine")  # killed after 4, resumed from 2
    for step in (3, 4, 5):
        again.write(step, {"loss": 1.0 / step})
    again.close()
    logged = [call for call in calls if call[0] == "log"]
    assert [step for _, step, _ in logged] == [1, 2, 3, 4, 5]
    assert logged[0][2]["loss"] == 1.0 and "kl" not in logged[1][2] and "step" not in logged[1][2]
    odd = "domain/a b_c/kl" if tracker.type == "mlflow" else "domain/a b@c/kl"  # MLflow refuses other characters
    assert logged[1][2][odd] == 0.5
    assert calls.count("finish") == 2
    if tracker.type == "mlflow":
        assert calls[:3] == [("client", "sqlite:///x.db"), ("experiment", "megatron-s2d"), ("run", "7", "mine/opd")]
        assert ("update", "abc", "RUNNING") in calls
        assert ("params", {"type": "opd", "optimizer.lr": "0.1"}) in calls
    else:
        first, second = (call[1] for call in calls if call[0] == "init")
        assert first == second and first["group"] == "mine" and first["id"]  # the same run


def validated(stage, step, rate):
    responses = [{"verifier_label": "correct", "reward": 1.0, "response_length": 4, "finish_reason": "stop"}] * 2
    data = {"held out": set_metrics(responses, 1) | {"pass_rate": rate}}
    row = {"step": step, "data": data, "kl": None, "seconds": 2.0, "at": timestamp(), "best": False, "ended": None}
    append_line(stage.validation_path, json.dumps(row))


@pytest.mark.parametrize("tracker", TRACKERS, ids=lambda tracker: tracker.type)
def test_validations_are_sent_once_after_their_step(stage, calls, tracker):
    stage.begin({"type": "opd"}, {}, {})
    log = MetricsLog(stage, trackers=[tracker], workflow="mine")
    validated(stage, 0, 0.25)
    log.write_validations()
    for step in (1, 2):
        log.write(step, {"loss": 1.0})
        validated(stage, step, 0.25 + step / 4)
        log.write_validations()
    log.close()
    again = MetricsLog(stage, 2, trackers=[tracker], workflow="mine")  # killed and resumed
    again.write_validations()
    again.write(3, {"loss": 1.0})
    again.close()
    sent = [(step, "loss" if "loss" in data else data["validation/held out/pass_rate"])
            for name, step, data in (call for call in calls if call[0] == "log")]  # fmt: skip
    assert sent == [(0, 0.25), (1, "loss"), (1, 0.5), (2, "loss"), (2, 0.75), (3, "loss")]


def test_results_of_an_evaluation_have_a_run_of_their_own(tmp_path, calls):
    directory = StageDirectory(tmp_path / "evaluations/opd")
    directory.path.mkdir(parents=True)
    log = MetricsLog(directory, trackers=[WandbTracker()], workflow="mine")
    log.write(1, {"reward": 0.5})
    log.write_result(1, {"evaluation/avg_at_k": 0.5})
    log.close()
    assert next(call[1] for call in calls if call[0] == "init")["name"] == "mine/evaluations/opd"
    assert [set(call[2]) - {"time"} for call in calls if call[0] == "log"] == [{"reward"}, {"evaluation/avg_at_k"}]


def test_tensorboard_has_one_curve_over_a_resume(stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = MetricsLog(stage, resumed, trackers=[TensorBoardTracker()])
        for step in steps:
            log.write(step, {"reward": step + resumed / 10})
            time.sleep(0.01)
        log.close()
    events = EventAccumulator(str(stage.path / "tensorboard")).Reload().Scalars("reward")
    rows = {row["step"]: row for row in stage.metrics()}
    assert [(event.step, event.value) for event in events] == [
        (step, pytest.approx(value)) for step, value in ((1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2))
    ]
    assert events[-1].wall_time == pytest.approx(rows[4]["time"])


def test_a_tracker_that_fails_or_hangs_says_so_once_and_training_goes_on(stage, monkeypatch, capsys):
    wake = threading.Event()

    def fail(**_):
        raise RuntimeError("no key\nfound \x1b[31m")

    class Hanging(FakeRun):
        def log(self, data, step=None):
            wake.wait()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=fail, Settings=dict))
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=lambda **_: Hanging([])))
    log = MetricsLog(stage, trackers=[WandbTracker(), TrackioTracker()])
    for step in range(1, 30):
        log.write(step, {"loss": 1.0})  # returns although nobody takes the rows
    log._trackers[0].close()
    log._trackers[1].close(timeout=0.2)
    wake.set()
    log._trackers[1].close()
    assert len(stage.metrics()) == 29
    lines = stage.warnings_path.read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("tracking: wandb: RuntimeError: no key found")
    assert lines[1].startswith("tracking: trackio: did not finish within 0.2 s")
    assert [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines()] == lines


def test_a_damaged_note_of_a_tracker_does_not_stop_training(stage, calls):
    (stage.path / "tracking").mkdir(parents=True)
    (stage.path / "tracking/wandb.json").write_text("{")
    log = MetricsLog(stage, trackers=[WandbTracker()])
    log.write(1, {"loss": 1.0})
    log.close()
    assert "wandb.json" in stage.warnings_path.read_text() and calls == []


def test_other_ranks_start_no_tracker(tmp_path):
    log = MetricsLog(None, trackers=[TensorBoardTracker()])
    log.write(1, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == [] and not any("tracking" in thread.name for thread in threading.enumerate())


def test_names_and_settings_of_trackers():
    class Holder(Config):
        tracking: Tracking

    document = {"tracking": ["tensorboard", {"type": "wandb", "project": "p"}]}
    assert parse(Holder, document, "x").tracking == [TensorBoardTracker(), WandbTracker(project="p")]
    with pytest.raises(UserError, match="x: tracking: wandb is listed twice: remove one"):
        parse(Holder, {"tracking": ["wandb", {"type": "wandb"}]}, "x")
    with pytest.raises(UserError, match="x: tracking.0: unknown type 'wandbb' .did you mean 'wandb'"):
        parse(Holder, {"tracking": ["wandbb"]}, "x")
    with pytest.raises(UserError, match="x: tracking.0.projekt: unknown key"):
        parse(Holder, {"tracking": [{"type": "wandb", "projekt": "p"}]}, "x")


def test_the_command_names_the_requirements_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: REQUIREMENTS[name] for name in FAKES} == {name: extras[name] for name in FAKES}


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^tracking: wandb is not installed: pip install 'wandb[^\n']*', or remove it"):
        check_trackers([WandbTracker()])


@pytest.mark.parametrize("name", FAKES)
def test_fakes_have_the_parameters_of_the_installed_package(name):
    package = pytest.importorskip(name)
    fake = FAKES[name]([])
    pairs = [(package.init, fake.init)] if name != "mlflow" else [
        (getattr(package.MlflowClient, method), getattr(fake.MlflowClient, method))
        for method in vars(fake.MlflowClient) if not method.startswith("__")
    ]  # fmt: skip
    for real, ours in pairs:
        assert set(inspect.signature(ours).parameters) <= set(inspect.signature(real).parameters), real
