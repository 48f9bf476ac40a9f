"""What a training step costs a rank beside the model: bytes, host memory and seconds, and how they grow with ranks.

    python benchmarks/control_plane.py        # 2, 4, 8, 16 and 32 forked gloo ranks, stand-in samples

Every rank runs the real training loop, the sources of six kinds of stages, packing, balancing and exchange of samples;
only the model's forward and backward passes and the engine are stand-ins. Every data-parallel rank has as many
responses at every size, so an exponent of 0 (a cost proportional to ranks^0) is a cost that does not depend on the
number of ranks. Seconds are of the process on its CPU, because other load on a machine can only add to the others.

Bars, checked here: nothing is pickled; a rank's bytes of a step are at most those of its own samples and 64 bytes for
every response of the update; host memory grows by at most 10 %; rank 0 alone opens files for writing, as many at every
number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from stand_ins import (
    GROUPS_PER_RANK,
    SOURCES,
    STEPS,
    StandInDistributions,
    StandInModel,
    objective_of,
    stand_in_layout,
)

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.training import CheckpointConfig
from megatron_s2d.data.sample_bytes import encode_samples
from megatron_s2d.parallel import device
from megatron_s2d.records import own_samples
from megatron_s2d.stages.sft import OfflineSource
from megatron_s2d.train.loop import LoopSettings, SampleSource, train

SIZES = (2, 4, 8, 16, 32)
BYTES_PER_RESPONSE, MEMORY_GROWTH = 64, 0.10
OBJECT_COLLECTIVES = (
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
)


# -------------------------------------------------------------------------------- counting


@dataclasses.dataclass
class Traffic:
    """Bytes that a rank sends or receives, whichever are more: of an all-gather those of all ranks."""

    received: int = 0
    sent: int = 0
    refuses_objects: bool = False

    def clear(self) -> None:
        self.received = self.sent = 0


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count the bytes of ``torch.distributed`` calls in the block, and refuse those that pickle."""
    traffic, originals = Traffic(), {name: getattr(dist, name) for name in (*OBJECT_COLLECTIVES, *_COUNTED)}

    def counting(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            received, sent = _COUNTED[name](*arguments, **options)
            traffic.received += received
            traffic.sent += sent
            return originals[name](*arguments, **options)

        return call

    def refusing(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if traffic.refuses_objects:
                raise AssertionError(f"torch.distributed.{name} in a training step")
            return originals[name](*arguments, **options)

        return call

    for name in originals:
        setattr(dist, name, counting(name) if name in _COUNTED else refusing(name))
    try:
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _of_operations(operations: Sequence[Any]) -> tuple[int, int]:
    received = sum(operation.tensor.nbytes for operation in operations if operation.op in (dist.irecv, dist.recv))
    return received, sum(operation.tensor.nbytes for operation in operations) - received


_COUNTED = {
    "all_reduce": lambda tensor, **_: (tensor.nbytes, tensor.nbytes),
    "broadcast": lambda tensor, *_, **__: (tensor.nbytes, 0),
    "all_gather_into_tensor": lambda output, tensor, **_: (output.nbytes, tensor.nbytes),
    "send": lambda tensor, **_: (0, tensor.nbytes),
    "recv": lambda tensor, **_: (tensor.nbytes, 0),
    "batch_isend_irecv": _of_operations,
}


class OpenedFiles:
    """Counts the files in a directory that this process opens for writing."""

    def __init__(self, directory: Path):
        self._directory, self.count = f"{directory}{os.sep}", 0
        sys.addaudithook(self._see)  # there is no way to remove it, but the process ends soon

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.count += str(arguments[0]).startswith(self._directory)


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -------------------------------------------------------------------------------- a run


class MeasuredSource:
    """A source whose steps are measured from one to the next."""

    def __init__(self, source: SampleSource, traffic: Traffic, files: OpenedFiles):
        self._source, self._traffic, self._files, self.rows = source, traffic, files, []
        self._start = time.process_time()

    def resume(self, state: Any) -> None:
        self._source.resume(state)

    def step(self, step: int) -> Any:
        if step > 1:
            self._end()
        self._traffic.refuses_objects = step <= STEPS
        data = self._source.step(step)
        samples = {sample.id: sample for batch in data.mini_batches for sample in batch.samples}.values()
        self._own = len(encode_samples(own_samples(list(samples))))
        self._num_responses = len(samples)
        return data

    def _end(self) -> None:
        now = time.process_time()
        self.rows.append(
            {
                "received": self._traffic.received,
                "sent": self._traffic.sent,
                "own_bytes": self._own,
                "responses": self._num_responses,
                "seconds": now - self._start,
                "rss": peak_rss(),
                "files": self._files.count,
            }
        )
        self._traffic.clear()
        self._files.count = 0
        self._start = now


def measure_rank(rank: int, size: int, directory: Path, response_length: int) -> None:
    """Train for a few steps as ``rank`` of ``size``, and write what each step cost."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    device.prepare()
    layout = stand_in_layout(rank, size)
    rows, files = {}, OpenedFiles(directory)
    for name, make in SOURCES.items():
        source = make(layout, GROUPS_PER_RANK * size, response_length)
        rows[name] = run(source, layout, directory / name, response_length, files)
    (directory / f"{rank}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def run(source: Any, layout: Any, path: Path, response_length: int, files: OpenedFiles) -> list[dict[str, float]]:
    """Run the training loop with ``source``; return a row for each step but the first, which imports and connects."""
    is_offline = isinstance(source, OfflineSource)
    rollouts = None if is_offline else source.buffer
    path.mkdir(exist_ok=True)
    settings = LoopSettings(STEPS + 1, CheckpointConfig(interval_steps=10**6))
    model = StandInModel(layout, 1.0, 4 * response_length)
    with counted() as traffic:
        measured = MeasuredSource(source, traffic, files)
        train(
            model,
            measured,
            objective_of(source),
            StageDirectory(path),
            settings,
            teacher=StandInDistributions(),
            rollouts=rollouts,
        )
    return measured.rows[1:]


def measure(size: int, response_length: int, start_method: str = "fork") -> dict[str, Any]:
    """Return the largest costs of a rank in a step, over ranks, steps and kinds of stages."""
    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ranks = [
            context.Process(target=measure_rank, args=(rank, size, directory, response_length)) for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"a rank of {size} failed; its error is above")
        by_rank = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(size)]
    by_kind = {name: [row for kinds in by_rank for row in kinds[name]] for name in SOURCES}
    rows = [row for of_kind in by_kind.values() for row in of_kind]
    worst = max(rows, key=lambda row: max(row["received"], row["sent"]) - bound(row))
    return {
        "ranks": size,
        "bytes": max(max(row["received"], row["sent"]) for row in rows),
        "of_bound": max(map(of_bound, rows)),
        "of_bound_by_kind": {name: max(map(of_bound, of_kind)) for name, of_kind in by_kind.items()},
        "own_bytes": worst["own_bytes"],
        "responses": worst["responses"],
        "seconds": float(np.median([row["seconds"] for row in rows])),
        "rss": max(row["rss"] for row in rows),
        "files": max(row["files"] for row in rows),  # of a rank in a step
        "writers": [
            rank for rank, kinds in enumerate(by_rank) if any(row["files"] for rows in kinds.values() for row in rows)
        ],
    }


def of_bound(row: dict[str, float]) -> float:
    """Bytes of a step, as a fraction of the most that are allowed."""
    return max(row["received"], row["sent"]) / bound(row)


def bound(row: dict[str, float]) -> float:
    """Largest bytes of a step: own samples, and 64 bytes for every response of the update."""
    return row["own_bytes"] + BYTES_PER_RESPONSE * row["responses"]


def exponent(rows: Sequence[dict[str, float]], field: str) -> float:
    """Slope of ``field`` over ranks in logarithms."""
    slope, _ = np.polyfit(np.log([row["ranks"] for row in rows]), np.log([row[field] for row in rows]), 1)
    return float(slope)


def check(rows: Sequence[dict[str, float]]) -> None:
    """Exit with the bar that was missed, if one was."""
    for row in rows:
        if row["of_bound"] > 1:
            raise SystemExit(f"{row['ranks']} ranks: {row['of_bound']:.2f} times the bytes that the bar allows")
        if row["writers"] != [0] or row["files"] > rows[0]["files"]:
            raise SystemExit(f"{row['ranks']} ranks: ranks {row['writers']} open up to {row['files']} files a step")
    growth = rows[-1]["rss"] / rows[0]["rss"] - 1
    if growth > MEMORY_GROWTH:
        raise SystemExit(
            f"host memory grows by {100 * growth:.0f} % from {rows[0]['ranks']} to {rows[-1]['ranks']} ranks"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and check the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=SIZES, help="numbers of data-parallel ranks")
    parser.add_argument("--response-length", type=int, default=4096, help="longest response, in tokens")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    rows = []
    print("| ranks | responses | KB a step and rank | own samples, KB | of the bar | peak RSS, MB | CPU s a step |")
    print("|---|---|---|---|---|---|---|")
    for size in options.ranks:
        row = measure(size, options.response_length)
        rows.append(row)
        print(
            f"| {size} | {row['responses']:,} | {row['bytes'] / 1e3:,.0f} | {row['own_bytes'] / 1e3:,.0f} "
            f"| {row['of_bound']:.2f} | {row['rss'] / 1e6:,.0f} | {row['seconds']:.3f} |",
            flush=True,
        )
    if len(rows) > 1:
        exponents = {field: exponent(rows, field) for field in ("bytes", "rss", "seconds")}
        print("exponents: " + ", ".join(f"{field} {value:.2f}" for field, value in exponents.items()))
    if options.json:
        options.json.write_text(json.dumps(rows))
    check(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
