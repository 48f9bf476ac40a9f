"""Seconds and memory of a large set of prompts: preparing its table, and starting with it.

    python benchmarks/large_prompts.py --rows 10000000

Rows of arithmetic with the embedded task's tokenizer, or, with ``--tokenizer DIR``, word problems of about 200 bytes in
that tokenizer's chat template, one of a thousand longer than the limit. The workflow has a supervised and a GRPO stage
on its halves; a start is the check of the workflow, as ``s2d run`` does it first, and the first batch of a stage, in a
process of its own. Its memory is read every 20 ms, in two parts: anonymous pages, which are what a process holds, and
pages of mapped files (libraries, the table), which the kernel drops when something needs the room and which all
processes of a machine share. The bar of 1 GiB is for the first part, and of all processes together where they prepare a
table.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import yaml

ROWS_PER_GROUP = 100_000
LIMIT_OF_WORDS = 512  # tokens of a prompt
LARGEST_MEMORY, LARGEST_SECONDS = 1 << 30, 30.0
CPU_SECONDS_OF_ROW = 5e-6  # of a first start: ten million rows take 50 s, which two cores have in 25 s
FIXED_CPU_SECONDS = 2.0  # to load a tokenizer, however many rows there are
MEMORY = ("anonymous", "library_anonymous", "all_anonymous", "files", "library_files")
_SECONDS, _LOOKS = 0.02, 20  # between two looks at a process's memory, and looks between two at that of all

_OPERATORS = list(itertools.product("+-*", repeat=5))
_NAMES = [
    "Ada",
    "Ben",
    "Clara",
    "Daniel",
    "Emil",
    "Fatima",
    "Grace",
    "Hugo",
    "Ines",
    "Jack",
    "Kenji",
    "Leo",
    "Mia",
    "Noor",
    "Omar",
    "Priya",
]
_THINGS = [
    "apples",
    "beads",
    "books",
    "buttons",
    "cards",
    "coins",
    "eggs",
    "marbles",
    "pears",
    "pencils",
    "shells",
    "stamps",
]

WORKFLOW = {
    "name": "large",
    "tokenizer": "task:modular_arithmetic",
    "precision": "float32",
    "lengths": {"max_prompt_length": 12},
    "models": {"student": {"preset": "tiny-student"}},
    "stages": {
        "base": {"type": "sft", "model": "student", "data": "train/1H", "steps": 2, "global_batch_size": 8},
        "grpo": {
            "type": "grpo", "init": "base", "prompts": "train/2H", "steps": 2, "train_batch_size": 8,
            "num_generations": 4, "label_reuse": "refuse", "sampling": {"max_response_length": 8},
        },
    },
    "arms": {"grpo": "grpo"},
    "evaluation": {"prompts": "problems", "samples_per_prompt": 1, "sampling": {"max_response_length": 8}},
}  # fmt: skip


def write_rows(path: Path, count: int, make: Callable[[int, random.Random], tuple[str, str, str]]) -> None:
    """Write a Parquet or JSON-lines file of ``count`` rows."""
    import pyarrow
    from pyarrow import parquet

    rng = random.Random(0)
    rows = (make(number, rng) for number in range(count))
    if path.suffix == ".jsonl":
        line = '{"question": "%s", "answer": "%s", "solution": "%s"}\n'
        with open(path, "w") as file:
            file.writelines(line % row for row in rows)
        return
    schema = pyarrow.schema(dict.fromkeys(("question", "answer", "solution"), pyarrow.string()))
    with parquet.ParquetWriter(path, schema) as writer:
        for group in itertools.batched(rows, ROWS_PER_GROUP):
            writer.write_table(pyarrow.table([list(column) for column in zip(*group, strict=True)], schema=schema))


def _arithmetic(number: int, rng: random.Random) -> tuple[str, str, str]:
    """Return question, answer and solution; no other row has the same six numbers, up to 17^6 = 24 million rows.

    A tenth of the questions is longer than the limit.
    """
    digits = [number // 17**place % 17 for place in range(6)]
    a, b, c, d, e = _OPERATORS[int(rng.random() * len(_OPERATORS))]
    x0, x1, x2, x3, x4, x5 = digits
    end = " + 1 =" if rng.random() < 0.1 else " ="
    return f"{x0} {a} {x1} {b} {x2} {c} {x3} {d} {x4} {e} {x5}{end}", str(x0), f"[ {x0} ]"


def _word_problem(number: int, rng: random.Random) -> tuple[str, str, str]:
    """Return question, answer and solution; no other row has the same numbers."""
    name, other, thing = rng.choice(_NAMES), rng.choice(_NAMES), rng.choice(_THINGS)
    first, second, third = number % 1000 + 2, number // 1000 % 1000 + 2, number // 10**6 + 2
    question = (
        f"{name} has {first} {thing} in a box on the table. On the way home from the market {name} buys {second} more "
        f"bags with {third} {thing} each, and then {other} takes one away. How many {thing} does {name} have now?"
    )
    if rng.random() < 0.001:
        question = " ".join([question] * 16)
    answer = first + second * third - 1
    return question, str(answer), f"{second} * {third} = {second * third}, and with {first} less 1 it is {answer}."


def write_workflow(directory: Path, count: int, suffix: str = "parquet", tokenizer: Path | None = None) -> Path:
    """Write data and workflow, and return the workflow's file. tokenizer: None for that of the embedded task."""
    rows, workflow = directory / f"train.{suffix}", dict(WORKFLOW)
    columns = {"template": "plain", "columns": {"solution": "solution"}}
    data: dict[str, dict] = {"train": {"type": "file", "path": str(rows), **columns}}
    if tokenizer is None:
        write_rows(rows, count, _arithmetic)
        data["problems"] = {"type": "task", "split": "eval", "num_operations": 2, "num_prompts": 64}
    else:
        write_rows(rows, count, _word_problem)
        write_rows(directory / "problems.jsonl", 64, lambda number, rng: _word_problem(10**9 + number, rng))
        data["problems"] = {"type": "file", "path": str(directory / "problems.jsonl"), **columns}
        workflow |= {"tokenizer": str(tokenizer.resolve()), "lengths": {"max_prompt_length": LIMIT_OF_WORDS}}
    path = directory / "workflow.yaml"
    path.write_text(yaml.safe_dump({**workflow, "data": data, "data_cache_dir": str(directory / "cache")}))
    return path


def repeat_table(path: Path, times: int) -> None:
    """Repeat the rows of a table on disk under other ids and keys; what was computed of a row alone stays true."""
    import pyarrow
    import pyarrow.compute

    rng, partial = np.random.default_rng(0), path.with_suffix(".partial")
    table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
    with pyarrow.OSFile(str(partial), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        for copy in range(times):
            for batch in table.to_batches():
                ids = pyarrow.compute.binary_join_element_wise(batch.column("id"), str(copy), "/")
                keys = pyarrow.array(rng.integers(0, 2**64, len(batch), dtype=np.uint64))
                columns = {**dict(zip(batch.schema.names, batch.columns, strict=True)), "id": ids, "key": keys}
                stream.write_batch(pyarrow.RecordBatch.from_arrays(list(columns.values()), schema=batch.schema))
    partial.rename(path)
    for array in path.parent.glob("*.npy"):
        if array.name in ("order.npy", "keys.npy"):
            array.unlink()
        else:
            np.save(array, np.tile(np.load(array), times))


def start(path: Path) -> dict[str, float]:
    """Check the workflow and read the first batches, in this process; return seconds, bytes and numbers of prompts."""
    from transformers import PreTrainedTokenizerFast  # noqa: F401, with torch

    from megatron_s2d.config.workflow import load_workflow
    from megatron_s2d.rollout.sampler import PromptDataLoader
    from megatron_s2d.stages.inputs import StageInputs
    from megatron_s2d.workflow.preflight import check_workflow

    started, libraries, used = time.perf_counter(), resident("self"), time.process_time()
    config = load_workflow(path)
    preflight = check_workflow(config, path.parent / "tokenizer")
    checked = time.perf_counter()
    prompts = StageInputs(config, {}, path.parent / "tokenizer", "grpo").stage_prompts("grpo")
    loader = PromptDataLoader(prompts, 8, seed=1)
    batch = loader.batch_for_step(1)
    return {
        "check_seconds": checked - started,
        "first_batch_seconds": time.perf_counter() - checked,
        "cpu_seconds": time.process_time() + _cpu_seconds(resource.getrusage(resource.RUSAGE_CHILDREN)),
        "library_cpu_seconds": used,
        "library_anonymous": libraries["anon"],
        "library_files": libraries["file"],
        "prompts": len(preflight.prompts["train/1H"]) + len(preflight.prompts["train/2H"]),
        "first": sum(int(prompt.token_ids.sum()) for prompt in batch),
    }


def resident(process: int | str) -> dict[str, int]:
    """Resident memory of a process in bytes: ``anon``, with shared memory, and ``file``; zeros after its end."""
    sizes = dict.fromkeys(("anon", "file", "shmem"), 0)
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.startswith("Rss"):
                sizes[name.removeprefix("Rss").lower()] = 1024 * int(value.split()[0])
    return {"anon": sizes["anon"] + sizes["shmem"], "file": sizes["file"]}


def anonymous_of_all(process: int) -> int:
    """Anonymous bytes of a process and its children together; pages that they share count once."""
    total = 0
    with contextlib.suppress(OSError):
        for one in (process, *_children(process)):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
    return total


def _children(process: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == process:
                yield int(path.parent.name)


def _cpu_seconds(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def start_in_process(path: Path) -> dict[str, float]:
    """Call ``start`` in a process of its own; add its largest memory: ``anonymous``, ``files``, ``all_anonymous``."""
    command = [sys.executable, __file__, "--start", path]
    peaks, looks = {"anonymous": 0, "files": 0, "all_anonymous": 0}, itertools.count()
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(command, stdout=output) as process:
        while process.poll() is None:
            now = resident(process.pid)
            peaks["anonymous"], peaks["files"] = max(peaks["anonymous"], now["anon"]), max(peaks["files"], now["file"])
            if next(looks) % _LOOKS == 0:
                peaks["all_anonymous"] = max(peaks["all_anonymous"], anonymous_of_all(process.pid))
            time.sleep(_SECONDS)
        if process.returncode:
            raise SystemExit("a start failed; its error is above")
        output.seek(0)
        values: dict[str, float] = json.loads(output.read().splitlines()[-1])
    return values | peaks | {"all_anonymous": max(peaks["anonymous"], peaks["all_anonymous"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument(
        "--repeat-table", type=int, metavar="N",
        help="then repeat the table's rows N times: later starts with N times as many rows, without preparing those",
    )  # fmt: skip
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument(
        "--directory",
        type=Path,
        help="where data and table are written (default: removed at the end); pages of tmpfs count as anonymous",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="word problems with the tokenizer of a checkpoint"
    )
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start is not None:
        print(json.dumps(start(options.start)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.directory or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        path = write_workflow(directory, options.rows, options.format, options.tokenizer)
        print(
            "| rows | start | check | first batch | processor time | of it libraries | anonymous, MiB | of it libraries"
            " | of all processes | pages of files, MiB | of it libraries | prompts |"
        )
        print("|---" * 12 + "|")
        starts = ["first, prepares the table", "second"]
        if options.repeat_table is not None:
            starts += ["first with the repeated table", "second with it"]
        rows, row = options.rows, {}
        for name in starts:
            if name == "first with the repeated table":
                (table,) = directory.glob("cache/*/prompts.arrow")
                repeat_table(table, options.repeat_table)
                rows *= options.repeat_table
            row = start_in_process(path)
            sizes = " | ".join(f"{row[key] / 2**20:.0f}" for key in MEMORY)
            print(
                f"| {rows:,} | {name} | {row['check_seconds']:.1f} s | {row['first_batch_seconds']:.1f} s | "
                f"{row['cpu_seconds']:.0f} s | {row['library_cpu_seconds']:.0f} s | {sizes} | {row['prompts']:,} |",
                flush=True,
            )
            check(row)
            if name == starts[0] and options.tokenizer is None:  # the bar is of rows of arithmetic
                check_first(row, options.rows)
        check_later(row)


def check(row: dict[str, float]) -> None:
    """Exit if a start takes more memory than the bar."""
    if row["all_anonymous"] >= LARGEST_MEMORY:
        raise SystemExit(f"a start takes {row['all_anonymous'] / 2**20:.0f} MiB, and the bar is 1 GiB")


def check_first(row: dict[str, float], rows: int) -> None:
    """Exit if a start that prepares the table takes more time of processors, without libraries, than the bar."""
    seconds = (row["cpu_seconds"] - row["library_cpu_seconds"] - FIXED_CPU_SECONDS) / rows
    if seconds >= CPU_SECONDS_OF_ROW:
        raise SystemExit(f"a first start takes {1e6 * seconds:.1f} us a row, and the bar is {CPU_SECONDS_OF_ROW * 1e6}")


def check_later(row: dict[str, float]) -> None:
    """Exit if a start with a table that exists already takes longer than the bar."""
    seconds = row["check_seconds"] + row["first_batch_seconds"]
    if seconds >= LARGEST_SECONDS:
        raise SystemExit(f"a later start takes {seconds:.0f} s, and the bar is {LARGEST_SECONDS:.0f} s")


if __name__ == "__main__":
    main()
