"""Measures ranks of stages, each in a process of its own, on the CUDA stub. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from megatron_s2d.config.base import dump
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.stage_memory import StageShape
from megatron_s2d.measure.build_stub import stub_library
from megatron_s2d.measure.limits import Limits
from megatron_s2d.measure.measurement import Measurement

_LAST_LINES = 30


class MeasurementCrashed(Exception):
    """The measured rank ended with an internal error; the message has its last lines."""


class RankLauncher:
    """A process on the stub that has imported everything and forks one for each rank (``rank_process.py``).

    Started with the first job; ends with the block or with this process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._errors: IO[str] | None = None  # what the process prints, apart from its ranks

    def run(self, job: Path) -> str:
        """Run the job, which writes ``result.json`` beside it; return what the rank printed."""
        output = job.with_name("output.txt")
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        try:
            self._process.stdin.write(f"{job}\n")
            self._process.stdin.flush()
            is_done = self._process.stdout.readline() == "done\n"
        except BrokenPipeError:
            is_done = False
        printed = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
        if not is_done:
            self._process.wait()
            self._errors.seek(0)
            printed += self._errors.read()
            self.close()
        return printed

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._errors.close()
            self._process = None

    def __enter__(self) -> RankLauncher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen:
        library = stub_library()
        variables = {
            "LD_PRELOAD": str(library),
            "TRITON_LIBCUDA_PATH": str(library.parent),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
            # On a busy machine minutes pass; NCCL's monitor asks the store, which answers everything, whether another
            # rank has failed, and ends the process.
            "TORCH_NCCL_ENABLE_MONITORING": "0",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
            "UB_SKIPMC": "1",  # tp_comm_overlap: shares buffers by handles, because the other ranks do not exist
        }
        command = [sys.executable, "-W", "ignore", "-m", "megatron_s2d.measure.rank_process"]
        unset = [item for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") for item in ("-u", name)]
        environment = [f"{name}={value}" for name, value in variables.items()]
        pipe = subprocess.PIPE
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  see close
        command = ["env", *unset, *environment, *command]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)


def measure_stage(
    config: WorkflowConfig,
    stage: str,
    shape: StageShape,
    rank: int,
    *,
    limits: Limits,
    device_gib: float = 79.1,
    launcher: RankLauncher | None = None,
) -> Measurement:
    """Return what ``rank`` of stage ``stage`` needs and does; see ``measure/stage.py`` for what is run.

    shape: from ``Preflight.shapes``. device_gib: memory of a device that PyTorch sees. launcher: for several
    measurements; None starts one. Raises ``UserError`` for a rank that does not exist, a stage that cannot be measured,
    or a machine that cannot compile the stub, and ``MeasurementCrashed``.
    """
    world_size = config.parallel.world_size
    if not 0 <= rank < world_size:
        raise UserError(f"--rank {rank}: the layout has {world_size} ranks, 0 to {world_size - 1}")
    if stage not in config.stages:
        raise UserError(f"--stage {stage}: no such stage (stages: {', '.join(config.stages)})")
    stub_library()
    with tempfile.TemporaryDirectory(prefix="megatron_s2d_measure_") as scratch:
        job = {
            "config": dump(config),
            "stage": stage,
            "shape": dataclasses.asdict(dataclasses.replace(shape, validation=None)),  # see ``shortened``
            "rank": rank,
            "limits": dataclasses.asdict(limits),
            "device_gib": device_gib,
        }
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        with contextlib.nullcontext(launcher) if launcher is not None else RankLauncher() as running:
            output = running.run(path)
        answer = path.with_name("result.json")
        result = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {}
    if "error" in result:
        raise UserError(result["error"])
    if "measurement" not in result:
        tail = "\n".join(output.splitlines()[-_LAST_LINES:])
        raise MeasurementCrashed(f"rank {rank} of stage {stage}: {result.get('crash', 'the process died')}\n{tail}")
    return Measurement.from_json(result["measurement"])
