"""Sets of prompts that are larger than memory: what is held of each row, and how fast a run starts with them."""

import datetime
import json
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

from megatron_s2d.config.data import FileSource
from megatron_s2d.data import prompt_cache, prompt_table
from megatron_s2d.data.prompts import load_prompts, split_halves
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.rollout.sampler import PromptDataLoader

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def test_memory_of_a_row_is_that_of_its_numbers(tmp_path, monkeypatch):
    """Filter, halves, digests and batches of a table on disk take less than 80 bytes a row; a ``Prompt`` takes 600."""
    monkeypatch.setattr(prompt_cache, "IN_MEMORY_BYTES", 0)
    count, path = 20_000, tmp_path / "rows.jsonl"
    lines = (json.dumps({"question": " ".join(["3"] * (2 + n % 9)), "answer": str(n % 17)}) for n in range(count))
    path.write_text("\n".join(lines))
    tokenizer = load_tokenizer("task:modular_arithmetic", tmp_path / "tokenizer")
    source = FileSource.model_validate({"path": path, "template": "plain"})
    settings = {"max_prompt_length": 9, "date": datetime.date(2026, 1, 1), "cache_dir": tmp_path / "cache"}
    expected = load_prompts(source, tokenizer, **settings).prompts
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0] + pyarrow.total_allocated_bytes()
        first, second = split_halves(load_prompts(source, tokenizer, **settings).prompts, seed=0)
        keys = np.unique(first.keys)
        loader = PromptDataLoader(first, 4, seed=0)
        batch = [*loader.batch_for_step(1), *loader.resample(1, 0, set(), 4)]
        kept = tracemalloc.get_traced_memory()[0] + pyarrow.total_allocated_bytes() - before
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert len(first) + len(second) == len(expected) > 0.8 * count and len(keys) == 8 and len(batch) == 8
    assert kept < 60 * count and peak < 80 * count, (kept / count, peak / count)


def test_a_later_start_reads_numbers_from_files_of_their_own(tmp_path, monkeypatch):
    """Between the text of the rows they would bring the table into memory page by page."""
    monkeypatch.setattr(prompt_cache, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(prompt_table, "_ROWS_PER_PART", 10)  # so that a process of its own computes them
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"question": "3 " * (1 + n % 5), "answer": str(n % 17)}) + "\n" for n in range(99))
    )
    tokenizer = load_tokenizer("task:modular_arithmetic", tmp_path / "tokenizer")
    source = FileSource.model_validate({"path": path, "template": "plain"})

    def load():
        settings = {"max_prompt_length": 4, "date": datetime.date(2026, 1, 1), "cache_dir": tmp_path / "cache"}
        return split_halves(load_prompts(source, tokenizer, **settings).prompts, seed=0)

    def numbers(table):
        return [table.lengths, table.solution_lengths, table.keys, *(table.distinct(n) for n in ("domain", "verifier"))]

    expected = numbers(load()[0])
    touched = []
    monkeypatch.setattr(prompt_table, "_list_lengths", touched.append)
    monkeypatch.setattr(prompt_table, "_values", touched.append)
    first, _ = load()
    monkeypatch.setattr(first, "_table", types.SimpleNamespace(num_rows=99))
    for value, other in zip(numbers(first), expected, strict=True):
        assert np.array_equal(value, other)
    assert not touched and first.distinct("domain") == {"math"}


@pytest.mark.slow
def test_a_run_starts_with_two_million_rows(tmp_path, capsys):
    """The first start prepares the table with less than 5 microseconds of a processor a row; later ones take seconds.
    Both hold less than a gigabyte.
    """
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import large_prompts
    finally:
        sys.path.remove(str(BENCHMARKS))
    path = large_prompts.write_workflow(tmp_path, 2_000_000)
    first, second = (large_prompts.start_in_process(path) for _ in range(2))
    with capsys.disabled():
        print(f"\n{first}\n{second}")
    assert first["prompts"] == second["prompts"] and 1_700_000 < first["prompts"] < 1_900_000
    assert first["first"] == second["first"]
    for row in (first, second):
        large_prompts.check(row)
    large_prompts.check_first(first, 2_000_000)
    large_prompts.check_later(second)
