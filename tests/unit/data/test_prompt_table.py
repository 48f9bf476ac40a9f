"""Prompts by index: the same prompts, halves and errors as from lists, in memory and from a table on disk."""

import dataclasses
import datetime
import json
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow
import pytest

pytest.importorskip("transformers")

from megatron_s2d.config.data import FileSource
from megatron_s2d.data import problems, prompt_cache
from megatron_s2d.data.problems import SeenIds, id_keys
from megatron_s2d.data.prompt_cache import content_digest
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.prompts import load_prompts, split_halves
from megatron_s2d.data.table_rows import take_rows
from megatron_s2d.data.text_tokens import token_keys
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify import check_labels, labels_as_text

DATE = datetime.date(2026, 1, 1)
COLUMNS = {"id": "name", "question": "question", "answer": "answer", "solution": "solution"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("task:modular_arithmetic", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(params=["memory", "disk"])
def load(request, tokenizer, tmp_path, monkeypatch):
    """load(path, max_prompt_length, settings): prompts of a file, in memory or through a table on disk."""
    if request.param == "disk":
        monkeypatch.setattr(prompt_cache, "IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(problems, "_PROBLEMS_AT_ONCE", 7)  # so that there are many batches

    def make(path, max_prompt_length=None, **settings):
        source = FileSource.model_validate({"path": path, "template": "plain", "columns": COLUMNS, **settings})
        return load_prompts(
            source, tokenizer, max_prompt_length=max_prompt_length, date=DATE, cache_dir=tmp_path / "cache"
        )

    return make


def rows(count: int, **fields: object) -> list[dict]:
    """Rows of 3 to 9 tokens, with names that sort in another order than their numbers, some beyond ASCII."""
    return [
        {
            "name": f"{'ä' if number % 5 == 0 else 'r'}{number}",
            "question": " ".join(["1"] * (3 + number % 7)),
            "answer": str(number % 17),
            "solution": "3 4" if number % 2 else "5",
            **fields,
        }
        for number in range(count)
    ]


def write(path, content: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def expected_halves(prompts: list[Prompt], seed: int) -> list[list[str]]:
    """The halves as they have been formed from lists: results of earlier runs depend on them."""
    ordered = sorted(prompts, key=lambda prompt: prompt.id)
    order = np.random.default_rng(seed).permutation(len(ordered))
    middle = (len(ordered) + 1) // 2
    return [[ordered[index].id for index in part] for part in (order[:middle], order[middle:])]


def test_prompts_of_both_kinds_are_the_rows_in_order(load, tokenizer, tmp_path):
    content = rows(40)
    prompts = load(write(tmp_path / "a.jsonl", content)).prompts
    assert [prompt.id for prompt in prompts] == [f"a/{row['name']}" for row in content]
    assert [prompt.id for prompt in prompts] == [prompts[index].id for index in range(40)] == prompts.values("id")
    for prompt, row in zip(prompts, content, strict=True):
        assert prompt.token_ids.dtype == np.int64 and prompt.text == row["question"] and prompt.answer == row["answer"]
        assert prompt.token_ids.tolist() == tokenizer(row["question"])["input_ids"]
        solution = [*tokenizer(row["solution"])["input_ids"], tokenizer.eos_token_id]
        assert prompt.solution_token_ids.tolist() == solution
    assert prompts.lengths.tolist() == [3 + number % 7 for number in range(40)]
    assert prompts.solution_lengths.tolist() == [2 + number % 2 for number in range(40)]
    assert prompts.keys.tolist() == [token_keys(p.token_ids, np.array([len(p.token_ids)]))[0] for p in prompts]
    assert prompts.distinct("domain") == {"math"} and prompts[-1].id == "a/r39"
    with pytest.raises(IndexError):
        prompts[40]


def test_halves_of_a_filtered_set_are_those_of_lists(load, tmp_path):
    result = load(write(tmp_path / "a.jsonl", rows(101)), max_prompt_length=7)
    assert result.dropped_too_long == 28 and len(result.prompts) == 73
    for seed in (0, 5):
        halves = split_halves(result.prompts, seed)
        expected = expected_halves(list(result.prompts), seed)
        assert [[prompt.id for prompt in half] for half in halves] == expected
        assert [half.values("id") for half in halves] == expected
    quarter = split_halves(halves[0], 1)[0]
    assert quarter.values("id") == expected_halves(list(halves[0]), 1)[0]


def test_parts_of_a_table(load, tmp_path):
    prompts = load(write(tmp_path / "a.jsonl", rows(30))).prompts
    other = load(write(tmp_path / "b.jsonl", rows(9))).prompts
    part = prompts[4:20:3]
    assert part.values("id") == prompts.values("id")[4:20:3] and part[1].id == prompts[7].id
    both = PromptTable.concatenate([part, other.select(other.lengths > 5)])
    assert both.values("id") == part.values("id") + [p.id for p in other if len(p.token_ids) > 5]
    assert [p.id for p in both] == both.values("id") and both.lengths.tolist() == [len(p.token_ids) for p in both]
    assert list(both.find(["b/r4", "a/r7"])) == ["b/r4", "a/r7"] and both.find(["a/r7"])["a/r7"].id == "a/r7"
    with pytest.raises(KeyError):
        part.find(["a/ä5"])  # of the table, not of the part
    assert part.first_id() == min(part.values("id"))


def test_duplicate_ids_and_limits(load, tmp_path):
    content = rows(20)
    for number in (6, 11, 12):
        content[number]["name"] = content[3]["name"]
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(UserError, match=r"row 7: duplicate id 'a/r3'"):
        load(path)
    result = load(path, on_duplicate_id="drop")
    assert len(result.prompts) == 17 and result.dropped_duplicates == 3
    assert load(path, on_duplicate_id="drop").dropped_duplicates == 3  # also of a table that exists
    assert load(path, on_duplicate_id="drop", limit=8).prompts.values("id") == result.prompts.values("id")[:8]
    ids = sorted(result.prompts.values("id"))
    chosen = {ids[index] for index in np.random.default_rng(4).permutation(len(ids))[:5]}
    sample = load(path, on_duplicate_id="drop", limit=5, limit_seed=4).prompts.values("id")
    assert sample == [name for name in result.prompts.values("id") if name in chosen]


def test_labels_of_a_table_are_read_once(load, tmp_path, monkeypatch):
    content = rows(40)
    content[5]["answer"], content[7]["answer"] = "what? 3?", "x^^2"
    path = write(tmp_path / "a.jsonl", content)
    expected = labels_as_text(list(load(path).prompts))
    assert expected.startswith("2 of 40 labels") and labels_as_text(load(path).prompts) == expected
    on_disk = (tmp_path / "cache").exists()
    monkeypatch.setattr("megatron_s2d.verify.unread_label", lambda label: "bad_label")
    if on_disk:
        check_labels(load(path).prompts)
        assert labels_as_text(load(path).prompts[5:6]).startswith("1 of 1 labels")
    else:
        with pytest.raises(UserError, match="40 of 40 labels are no answers"):
            check_labels(load(path).prompts)


def test_rows_of_a_table_in_chunks():
    """In any order, repeated, of one chunk or many; Arrow's own way takes no column of more than 2 GiB."""
    parts = np.split(np.arange(30), [4, 4, 9, 25])
    texts = pyarrow.chunked_array([pyarrow.array([f"t{n}" for n in part], pyarrow.string()) for part in parts])
    table = pyarrow.table({"a": texts, "b": pyarrow.chunked_array([pyarrow.array(part) for part in parts])})
    rng = np.random.default_rng(0)
    for rows in ([], [7], [29, 0], range(30), range(2, 28, 3), rng.permutation(30), rng.integers(0, 30, 50)):
        taken = take_rows(table, np.array(rows, dtype=np.int32))
        assert taken.to_pydict() == table.take(pyarrow.array(rows, pyarrow.int64())).to_pydict()
    assert take_rows(table.slice(0, 0), np.zeros(0, np.int32)).num_rows == 0


def test_a_column_of_more_than_two_gigabytes():
    """The same text in many chunks, of which a few rows are read."""
    text = pyarrow.array(["x" * (1 << 20)] * 64)
    rows = {"a": pyarrow.chunked_array([text] * 40), "b": pyarrow.chunked_array([pyarrow.array(range(64))] * 40)}
    taken = take_rows(pyarrow.table(rows), np.array([2500, 3, 70]))
    assert taken.column("b").to_pylist() == [2500 % 64, 3, 6] and len(taken.column("a")[0].as_py()) == 1 << 20


def test_labels_of_several_verifiers():
    """Only those of mathematics are read as such, however they stand among the others."""
    verifiers = ["code", "math", None, "math", '{"type": "math", "last_number": true}', "code"]
    answers = ["x^^2", "x^^2", "x^^2", "3", "what? 3?", None]
    one = np.array([1])
    prompts = [
        Prompt(str(number), one, "", "math", verifier, answer)
        for number, (verifier, answer) in enumerate(zip(verifiers, answers, strict=True))
    ]
    text = labels_as_text(prompts * 3)
    assert text.startswith("6 of 18 labels") and "1: 'x^^2', 4: 'what? 3?', 1: 'x^^2', ..." in text
    assert labels_as_text([prompts[0], prompts[3]]) is None and labels_as_text([]) is None


def test_unit_tests_of_a_table_are_read_once(load, tmp_path, monkeypatch):
    content = rows(30)
    for row in content:
        row["answer"] = json.dumps({"inputs": ["1"], "outputs": ["2"]})
    path = write(tmp_path / "a.jsonl", content)
    read = []
    monkeypatch.setattr("megatron_s2d.verify.sandbox_layers", lambda: None)
    monkeypatch.setattr("megatron_s2d.verify.check_unit_tests", lambda prompt: read.append(prompt.id))
    check_labels(load(path, verifier="code").prompts)
    check_labels(load(path, verifier="code").prompts)
    assert len(read) == (30 if (tmp_path / "cache").exists() else 60)
    monkeypatch.undo()
    content[7]["answer"] = content[9]["answer"] = "no tests"
    with pytest.raises(UserError, match="prompt a/r7"):
        check_labels(load(write(path, content), verifier="code").prompts)


def test_table_follows_content_and_settings(load, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", rows(9))
    first = load(path).prompts.values("id")
    cache = tmp_path / "cache"
    if not cache.exists():
        assert prompt_cache.IN_MEMORY_BYTES > 0
        return
    read = []
    monkeypatch.setattr(prompt_cache, "_write", lambda *arguments: read.append(arguments[0]))
    moved = tmp_path / "elsewhere" / "a.jsonl"
    moved.parent.mkdir()
    path.rename(moved)
    assert load(moved).prompts.values("id") == first and not read  # the same content under the same name
    for changed in ({"limit": 3}, {"domain": "sums"}, {"template": "math"}):
        with pytest.raises(UserError, match=r"damaged table of prompts .*remove this directory"):  # nothing was written
            load(moved, **changed)
    assert len(set(read)) == 3
    write(moved, rows(10))
    with pytest.raises(UserError, match="damaged table"):
        load(moved)
    assert len(set(read)) == 4


def test_digest_is_computed_again_when_a_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", rows(3))
    monkeypatch.setattr(prompt_cache, "IN_MEMORY_BYTES", 0)
    digest = content_digest(path, tmp_path / "cache")
    monkeypatch.setattr(prompt_cache, "file_digest", lambda path: "again")
    assert content_digest(path, tmp_path / "cache") == digest
    path.write_text(path.read_text().replace("r1", "r9"))
    assert content_digest(path, tmp_path / "cache") == "again"


def test_datasets_opens_the_file(load, tmp_path):
    datasets = pytest.importorskip("datasets")
    prompts = load(write(tmp_path / "a.jsonl", rows(20))).prompts
    for file in (tmp_path / "cache").glob("*/prompts.arrow"):
        table = datasets.Dataset.from_file(str(file))
        assert table["id"][:] == prompts.values("id") and table[3]["token_ids"] == prompts[3].token_ids.tolist()


def test_several_processes_prepare_one_table_once(tmp_path):
    program = """
        import datetime, sys, time
        from pathlib import Path
        from megatron_s2d.config.data import FileSource
        from megatron_s2d.data import prompt_cache, prompts
        from megatron_s2d.data.tokenizer import load_tokenizer

        prompt_cache.IN_MEMORY_BYTES, write = 0, prompt_cache._write

        def slowly(*arguments):
            print("prepared")
            time.sleep(1)
            write(*arguments)

        prompt_cache._write = slowly
        path = Path(sys.argv[1])
        source = FileSource.model_validate({"path": path / "a.jsonl", "template": "plain", "verifier": None})
        tokenizer = load_tokenizer("task:modular_arithmetic", path / sys.argv[2])
        options = {"max_prompt_length": None, "date": datetime.date(2026, 1, 1), "cache_dir": path / "cache"}
        print(len(prompts.load_prompts(source, tokenizer, **options).prompts))
    """
    write(tmp_path / "a.jsonl", [{"question": "1 2"}] * 50)
    command = [sys.executable, "-c", textwrap.dedent(program), tmp_path]
    running = [subprocess.Popen([*command, f"t{n}"], stdout=subprocess.PIPE, text=True) for n in range(2)]
    outputs = [process.communicate(timeout=600)[0].split() for process in running]
    assert sorted(map(len, outputs)) == [1, 2] and all(output[-1] == "50" for output in outputs), outputs


def test_seen_ids_are_those_of_a_set():
    seen, known = SeenIds(), set()
    rng = np.random.default_rng(0)
    for size in (1, 40, 7, 300, 300, 5, 64):
        names = [f"id{number}" for number in rng.integers(0, 700, size)]
        expected = []
        for name in names:
            expected.append(name not in known)
            known.add(name)
        assert seen.add(id_keys(names)).tolist() == expected
    assert not seen.add(id_keys(sorted(known))).any() and seen.add(id_keys(["new", "new"])).tolist() == [True, False]


def test_table_of_prompts_in_memory_keeps_every_field():
    prompt = Prompt("a", np.array([1, 2]), "text", "math", None, None)
    other = dataclasses.replace(prompt, id="b", verifier="math", answer="3", solution_token_ids=np.array([4]))
    table = PromptTable.of([prompt, other])
    assert table.is_null("answer").tolist() == [True, False] and table.solution_lengths.tolist() == [-1, 1]
    assert table[0].solution_token_ids is None and table[1].solution_token_ids.tolist() == [4]
    assert (table[0].verifier, table[1].answer) == (None, "3") and not PromptTable.of([])
