"""Files in ranges of rows, read by several processes: the same rows, numbers, limits and errors as from one."""

import itertools
import json
import os
import signal

import numpy as np
import pytest

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet

from megatron_s2d.config.base import parse
from megatron_s2d.config.data import FileSource
from megatron_s2d.data import problems, row_ranges
from megatron_s2d.data.forked_map import forked_map
from megatron_s2d.data.problems import convert_problems
from megatron_s2d.data.row_ranges import content_size, rows_in
from megatron_s2d.errors import UserError

ROWS = [{"id": f"r{(7 * n) % 101}", "question": f"q{n}", "answer": str(n), "level": n % 4} for n in range(101)]


def write_lines(path, rows):
    """Lines with a byte-order mark, carriage returns and blank lines."""
    lines = [json.dumps(row) + ("\r\n\n \n" if number % 9 == 4 else "\n") for number, row in enumerate(rows)]
    path.write_bytes(b"\xef\xbb\xbf" + "".join(lines).encode())
    return path


@pytest.fixture(params=["jsonl", "json", 1, 3, 10, 200])
def file(request, tmp_path):
    """``ROWS`` as JSON lines, as a list, and as Parquet with row groups of some rows."""
    if request.param == "jsonl":
        return write_lines(tmp_path / "a.jsonl", ROWS)
    if request.param == "json":
        (tmp_path / "a.json").write_text(json.dumps(ROWS))
        return tmp_path / "a.json"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=request.param)
    return tmp_path / "a.parquet"


@pytest.fixture(autouse=True)
def short_ranges(monkeypatch):
    monkeypatch.setattr(row_ranges, "ROWS_PER_RANGE", 10)
    monkeypatch.setattr(problems, "_PROBLEMS_AT_ONCE", 4)


def read(path, processes, convert=list, **settings):
    """Ids and questions that are kept, and the number of repeated ids."""
    settings = {"type": "file", "path": path, "columns": {"id": "id"}} | settings
    counts = {}
    kept = []
    for batch in convert_problems(parse(FileSource, settings, "test"), counts, convert, processes):
        assert len(batch.content) == len(batch.kept) and 0 < batch.share <= 1
        kept += [(item.id, item.question) for item in itertools.compress(batch.content, batch.kept)]
    return kept, counts["duplicates"]


def test_ranges_are_the_rows_in_order(file, monkeypatch):
    ranges = list(row_ranges.row_ranges(file))
    rows = [(part.first_row + index, row) for part in ranges for index, row in enumerate(rows_in(part))]
    assert rows == list(enumerate(ROWS))
    assert len(ranges) == 1 if file.suffix == ".json" else 10 <= len(ranges) <= 12
    ends = [part.end for part in ranges]
    assert ends == sorted(ends) and ends[-1] == 1
    monkeypatch.setattr(row_ranges, "BYTES_PER_RANGE", 1)
    monkeypatch.setattr(row_ranges, "_MAX_SLICES", 5)
    rows = [row for part in row_ranges.row_ranges(file) for row in rows_in(part)]
    assert rows == ROWS


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"limit": 37},
        {"min_values": {"level": 2}, "limit": 20},
        {"limit": 30, "limit_seed": 5},
        {"columns": {}},
        {"columns": {"id": "level"}, "on_duplicate_id": "drop"},
        {"columns": {"id": "level"}, "on_duplicate_id": "drop", "limit": 3},
    ],
)
@pytest.mark.parametrize("file", ["jsonl", 3], indirect=True)
def test_processes_do_not_change_the_rows(file, settings):
    kept, duplicates = read(file, 3, **settings)
    assert (kept, duplicates) == read(file, 1, **settings)
    if not settings:
        assert kept == [(f"a/{row['id']}", row["question"]) for row in ROWS] and duplicates == 0
    if settings.get("limit_seed"):
        ids = sorted(f"a/{row['id']}" for row in ROWS)
        chosen = {ids[index] for index in np.random.default_rng(5).permutation(101)[:30]}
        assert [name for name, _ in kept] == [f"a/{row['id']}" for row in ROWS if f"a/{row['id']}" in chosen]
    if settings.get("limit") == 3:
        assert [question for _, question in kept] == ["q0", "q1", "q2"] and duplicates == 0


@pytest.mark.parametrize("processes", [1, 3])
def test_first_mistake_in_the_order_of_rows_is_reported(tmp_path, processes):
    rows = [dict(row) for row in ROWS]
    rows[60]["question"] = ""
    rows[75]["id"] = rows[2]["id"]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a.jsonl: row 61: 'question' is empty"):
        read(path, processes)
    assert len(read(path, processes, limit=60)[0]) == 60
    rows[60]["question"] = "q60"
    with pytest.raises(UserError, match=r"a.jsonl: row 76: duplicate id 'a/r14'"):
        read(write_lines(path, rows), processes)
    path.write_bytes(path.read_bytes().replace(b'"q50"', b'"q50'))
    with pytest.raises(UserError, match=r"a.jsonl: line 63: not valid JSON"):  # with twelve blank lines before it
        read(path, processes)

    def refuse(batch):
        if any(problem.question == "q33" for problem in batch):
            raise UserError("not this one")
        return batch

    with pytest.raises(UserError, match="not this one"):
        read(write_lines(path, ROWS), processes, refuse)
    assert len(read(path, processes, refuse, limit=33)[0]) == 33


@pytest.mark.parametrize("file", ["jsonl", "json"], indirect=True)
def test_rows_are_converted_in_other_processes(file):
    def convert(batch):
        return [type(problem)(**vars(problem) | {"question": str(os.getpid())}) for problem in batch]

    processes = {question for _, question in read(file, 3, convert)[0]}
    assert str(os.getpid()) not in processes or file.suffix == ".json"


def test_killed_process_is_reported():
    with pytest.raises(UserError, match="a process that prepares prompts was killed"):
        list(forked_map(lambda item: os.kill(os.getpid(), signal.SIGKILL), range(9), 2))


def test_size_of_parquet_is_that_of_its_content(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"question": [f"{n} " * 200 for n in range(5000)]}), path, use_dictionary=False)
    assert content_size(path) > 4_000_000 > 10 * path.stat().st_size
    assert content_size(write_lines(tmp_path / "a.jsonl", ROWS)) == (tmp_path / "a.jsonl").stat().st_size
