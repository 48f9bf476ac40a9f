"""Sends the rows of ``metrics.jsonl`` to experiment trackers, in a thread for each, so that none can stop training.

Beside them go results: the validations inside a stage, and what an evaluation measured.

A tracker shows one curve of a stage over all its restarts. Its file in the stage's folder ``tracking`` holds the
identity of its run and the last steps that were sent: steps that are computed again after a resume are not sent again,
and rows that a kill left unsent are sent from the stage's files. A tracker that fails prints one warning line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_s2d.artifacts.files import atomic_write_json, read_json_object
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.tracking import Tracker
from megatron_s2d.train.tracker_writers import TrackedRun, TrackerWriter, open_writer

_MAX_WAITING = 10_000  # rows; beyond them rows of a tracker that hangs are dropped
_CLOSE_SECONDS = 30.0


def validation_results(stage: StageDirectory) -> list[dict[str, Any]]:
    """Return the validations of a stage as flat rows: ``step``, ``time``, ``validation/<data set>/<metric>``."""
    rows = []
    for row in stage.validations():
        values = {
            f"validation/{name}/{key}": value for name, part in row["data"].items() for key, value in part.items()
        }
        seconds = datetime.datetime.fromisoformat(row["at"]).timestamp()
        rows.append({"step": row["step"], "time": seconds, "validation/seconds": row["seconds"], **values})
    return rows


class BackgroundTracker:
    """Gives rows to a tracker in a thread of its own: ``write`` never waits and never raises."""

    def __init__(self, tracker: Tracker, run: TrackedRun, stage: StageDirectory):
        self._tracker, self._run, self._stage = tracker, run, stage
        self._state_path = run.folder / f"{tracker.type}.json"
        self._rows: queue.Queue[tuple[str, Mapping[str, Any]] | None] = queue.Queue(_MAX_WAITING)
        self._warned = False
        self._thread = threading.Thread(target=self._send_all, name=f"tracking-{tracker.type}", daemon=True)
        self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Queue a row of ``metrics.jsonl``."""
        self._put("sent", row)

    def write_result(self, row: Mapping[str, Any]) -> None:
        """Queue a result, after the metrics of its ``step``; one of a step that has been sent is left out."""
        self._put("results", row)

    def _put(self, kind: str, row: Mapping[str, Any]) -> None:
        if self._thread.is_alive():
            try:
                self._rows.put_nowait((kind, row))
            except queue.Full:
                self._warn(f"does not take rows: those after step {row['step']} are in metrics.jsonl only")

    def close(self, timeout: float = _CLOSE_SECONDS) -> None:
        """Wait until all rows are sent, ``timeout`` seconds at most."""
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn(f"did not finish within {timeout:g} s: what it has not sent is in metrics.jsonl")

    def _send_all(self) -> None:
        try:
            state = read_json_object(self._state_path) if self._state_path.exists() else {"id": None, "sent": 0}
            marks = {"sent": state["sent"], "results": state.get("results", -1)}  # the last step of each kind
            if self._tracker.type == "tensorboard":  # it forgets the steps after the resumed one, the others keep them
                marks = {kind: min(step, self._run.step) for kind, step in marks.items()}
            writer = open_writer(self._tracker, dataclasses.replace(self._run, id=state["id"]))
            earlier = [("sent", row) for row in self._stage.metrics()]
            earlier += [("results", row) for row in validation_results(self._stage)]
            for kind, row in sorted(earlier, key=lambda item: (item[1]["step"], item[0] == "results")):
                self._send(writer, kind, row, marks)
            while (item := self._rows.get()) is not None:
                self._send(writer, *item, marks)
            writer.close()
        except (Exception, SystemExit) as error:  # foreign code: whatever it raises, training continues
            self._warn(f"{type(error).__name__}: {error}; training continues, the metrics are in metrics.jsonl")

    def _send(self, writer: TrackerWriter, kind: str, row: Mapping[str, Any], marks: dict[str, int]) -> None:
        """Send ``row`` unless that has been done, and move the mark of its kind."""
        step = int(row["step"])
        if step <= marks[kind]:
            return
        marks[kind] = step
        # First the note: a kill in between loses a point, which is better than a second curve through it.
        atomic_write_json(self._state_path, {"id": writer.id, **marks})
        values = {key: value for key, value in row.items() if key not in ("step", "time") and value is not None}
        writer.write(step, float(row["time"]), values)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            line = " ".join(f"tracking: {self._tracker.type}: {text}".split())
            print(f"warning: {line}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                self._stage.warn(line)


def open_trackers(
    trackers: Sequence[Tracker], stage: StageDirectory, workflow: str, step: int
) -> list[BackgroundTracker]:
    """Start the trackers of a stage that continues after ``step``; returns before they have opened their runs."""
    if not trackers:
        return []
    folder = stage.path / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    config = stage.config() if stage.config_path.exists() else {}
    path = stage.path  # evaluations have the names of stages
    name = path.name if path.parent.name == "stages" else f"{path.parent.name}/{path.name}"
    run = TrackedRun(f"{workflow}/{name}", workflow, config, folder, step, None)
    return [BackgroundTracker(tracker, run, stage) for tracker in trackers]
