"""Processes of measured ranks: ``python -m megatron_s2d.measure.rank_process``, with the stub preloaded.

Reads the path of a job from each line of the standard input and forks a process for it, which has its own CUDA and
process groups: importing PyTorch and Megatron-Core takes longer than measuring a small model. A job is a JSON file that
``measure_stage`` writes: the workflow, the stage, its shape, the rank and the limits. Beside it are written
``result.json`` and ``output.txt``, what the rank printed. A line ``done`` on the standard output says that it has
ended. Where an import has started CUDA, the process of a job starts anew: ``... rank_process JOB``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import torch

from megatron_s2d.config.base import parse
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.stage_memory import StageShape
from megatron_s2d.measure.limits import Limits
from megatron_s2d.parallel.cuda_variables import set_device_variables

_COMMAND = [sys.executable, "-W", "ignore", "-m", "megatron_s2d.measure.rank_process"]


def measure(path: Path) -> None:
    """Measure the rank that the file describes."""
    from megatron_s2d.measure.stub import Stub

    job = json.loads(path.read_text(encoding="utf-8"))
    config = parse(WorkflowConfig, job["config"], "the workflow")
    # Both before anything uses CUDA, which some of the following imports do where they are the first ones.
    stub = Stub(device_gib=job["device_gib"])
    set_device_variables(config)
    from megatron_s2d.measure.host_values import HostValues
    from megatron_s2d.measure.recorder import Recorder
    from megatron_s2d.measure.single_rank import become_rank
    from megatron_s2d.measure.stage import run_stage

    torch.set_num_threads(1)
    result: dict = {}
    with HostValues(stub):
        become_rank(job["rank"], config.parallel.world_size)
        recorder = Recorder(stub)
        try:
            shape, limits = StageShape(**job["shape"]), Limits(**job["limits"])
            measurement = run_stage(config, job["stage"], shape, recorder, limits, path.parent)
            result["measurement"] = measurement.to_json()
        except UserError as error:
            result["error"] = str(error)
        except Exception as error:
            result["crash"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    path.with_name("result.json").write_text(json.dumps(result), encoding="utf-8")


def _run_in_child(path: Path) -> NoReturn:
    """Measure with the output in a file, and end."""
    output = os.open(path.with_name("output.txt"), os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if torch._C._cuda_isInBadFork():
        os.execv(sys.executable, [*_COMMAND, str(path)])
    _measure_and_exit(path)


def _measure_and_exit(path: Path) -> NoReturn:
    """Measure, and end at once: threads of process groups wait for ranks that do not exist."""
    try:
        measure(path)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def import_everything() -> None:
    """Import what ``measure`` needs without starting CUDA, which PyTorch refuses to use in a fork of this process.

    Modules of PyTorch and Megatron-Core ask for a GPU when they are imported. So do packages of SGLang that
    Megatron-Core imports where they are installed, for an engine and kernels that are not used here; Transformer Engine
    may use them.
    """
    is_available = torch.cuda.is_available
    hidden = () if importlib.util.find_spec("transformer_engine") else ("flashinfer", "quack")
    torch.cuda.is_available = lambda: True
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # its import fails
    try:
        for name in ("measure.stage", "workflow.worker"):
            importlib.import_module(f"megatron_s2d.{name}")
    finally:
        torch.cuda.is_available = is_available
        for name in hidden:
            del sys.modules[name]


def main() -> None:
    """Measure the ranks of the jobs that the standard input names, one after the other, or one rank in this process."""
    if len(sys.argv) > 1:
        _measure_and_exit(Path(sys.argv[1]))
    answers = os.dup(1)
    os.dup2(2, 1)  # what an import prints is no answer
    import_everything()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run_in_child(Path(line.rstrip("\n")))
        os.waitpid(child, 0)
        os.write(answers, b"done\n")
    os._exit(0)  # nothing is left to do, and the libraries take seconds to end


if __name__ == "__main__":
    main()
