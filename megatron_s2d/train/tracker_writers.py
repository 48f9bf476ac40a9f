"""Runs of TensorBoard, Weights & Biases, MLflow and Trackio. Their packages are imported when a run is opened."""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_s2d.config.tracking import MlflowTracker, TensorBoardTracker, Tracker, TrackioTracker, WandbTracker

_NOT_IN_MLFLOW = re.compile(r"[^\w\-. :/]", re.ASCII)  # of names of metrics


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What a tracker needs to open its run of a stage, or to resume it."""

    name: str  # workflow/stage
    group: str  # workflow
    config: Mapping[str, Any]  # resolved settings of the stage
    folder: Path  # for the tracker's files
    step: int  # of the checkpoint that training resumes from
    id: str | None  # of the run, as its writer's ``id`` was before a restart; None at the start


class TrackerWriter(Protocol):
    """An open run of a tracker."""

    id: str | None

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Send the finite metrics of ``step``, which is greater than the last; ``seconds`` since 1970."""
        ...

    def close(self) -> None:
        """Send the rest, and end the run or leave it to be resumed."""
        ...


def open_writer(tracker: Tracker, run: TrackedRun) -> TrackerWriter:
    """Open the run of ``tracker``, or resume that of ``run.id``."""
    match tracker:
        case TensorBoardTracker():
            return TensorBoardWriter(run)
        case WandbTracker():
            return WandbWriter(tracker, run)
        case MlflowTracker():
            return MlflowWriter(tracker, run)
        case TrackioTracker():
            return TrackioWriter(tracker, run)


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield dotted key and value (500 characters at most) of nested settings."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield _NOT_IN_MLFLOW.sub("_", f"{prefix}{key}"), str(value)[:500]


class TensorBoardWriter:
    """Event files beside the metrics; those of steps after the resumed one are purged."""

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        self.id = None
        self._writer = SummaryWriter(str(run.folder.parent / "tensorboard"), purge_step=run.step + 1)

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=seconds)
        self._writer.flush()  # a process that is killed loses nothing

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases; a restart opens the run with the same id again (``resume="allow"``)."""

    def __init__(self, tracker: WandbTracker, run: TrackedRun):
        import wandb

        self.id = run.id or uuid.uuid4().hex
        # console: wandb would take over stdout and stderr; silent: it would print to them.
        self._run = wandb.init(
            project=tracker.project,
            entity=tracker.entity,
            mode=tracker.mode,
            id=self.id,
            resume="allow",
            name=run.name,
            group=run.group,
            dir=str(run.folder),
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        self._run.log({**values, "time": seconds}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowWriter:
    """A run of MLflow, through its client, which keeps no state in the process."""

    def __init__(self, tracker: MlflowTracker, run: TrackedRun):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=tracker.tracking_uri)
        if run.id is not None:
            self._client.update_run(run.id, status="RUNNING")
            self.id = run.id
            return
        experiment = self._client.get_experiment_by_name(tracker.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(tracker.experiment)
        self.id = self._client.create_run(number, run_name=run.name, tags={"workflow": run.group}).info.run_id
        params = [Param(key, value) for key, value in _flat(run.config, "")]
        for first in range(0, len(params), 100):  # the most that a server takes at once
            self._client.log_batch(self.id, params=params[first : first + 100])

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        milliseconds = round(1000 * seconds)
        metrics = [
            self._metric(_NOT_IN_MLFLOW.sub("_", name), float(value), milliseconds, step)
            for name, value in values.items()
        ]
        for first in range(0, len(metrics), 1000):  # likewise
            self._client.log_batch(self.id, metrics=metrics[first : first + 1000])

    def close(self) -> None:
        self._client.set_terminated(self.id)


class TrackioWriter:
    """A run of Trackio, which knows a run by its name."""

    def __init__(self, tracker: TrackioTracker, run: TrackedRun):
        import trackio

        self.id = run.id or f"{run.name}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(
            project=tracker.project,
            name=self.id,
            group=run.group,
            space_id=tracker.space_id,
            config=dict(run.config),
            resume="allow",
            embed=False,
        )

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
