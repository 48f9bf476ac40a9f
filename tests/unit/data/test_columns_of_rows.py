"""Rows read as columns are the rows read one by one; tokens and keys of many texts are those of each."""

import datetime
import json

import numpy as np
import pytest

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_s2d.config.base import parse
from megatron_s2d.config.data import FileSource
from megatron_s2d.data import columns_of_rows, problems, row_ranges, text_columns
from megatron_s2d.data.columns_of_rows import ProblemColumns, plain_problems
from megatron_s2d.data.files import rows_of
from megatron_s2d.data.id_order import id_order
from megatron_s2d.data.prompts import load_prompts
from megatron_s2d.data.text_columns import list_array, list_content
from megatron_s2d.data.text_tokens import encode, token_keys
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.errors import UserError

ROWS = [
    {"name": f"n{number}", "question": f"{number} + ä\n😀 =", "answer": str(number), "passage": "p" * (number % 3 + 1),
     "solution": f"it is {number}", "unused": [number]}
    for number in range(50)
]  # fmt: skip
COLUMNS = {"id": "name", "question": "question", "answer": "answer", "solution": "solution"}
TEMPLATE = "{{Context}} {passage}: {question}?"


def source_of(path, **settings):
    return parse(FileSource, {"type": "file", "path": str(path), "columns": COLUMNS, **settings}, "test")


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=20)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def both_ways(source):
    """Return the problems and row numbers of a source's ranges, as columns and one by one."""
    as_columns, one_by_one = [], []
    for rows in row_ranges.row_ranges(source.paths[0]):
        columns, numbers = plain_problems(source, rows, "x")
        as_columns += zip(numbers.tolist(), columns, strict=True)
        one_by_one += [(row.number, problem) for row, problem in rows_of(source, rows, "x")]
    return as_columns, one_by_one


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("settings", [
    {}, {"template": TEMPLATE}, {"verifier": None}, {"columns": {"question": "question", "answer": "answer"}},
])  # fmt: skip
def test_columns_are_the_rows(tmp_path, monkeypatch, suffix, settings):
    monkeypatch.setattr(row_ranges, "ROWS_PER_RANGE", 7)
    source = source_of(write(tmp_path / f"a.{suffix}", ROWS), **settings)
    as_columns, one_by_one = both_ways(source)
    assert as_columns == one_by_one and len(as_columns) == 50 and as_columns[0][0] == 1


def test_numbers_are_the_text_of_the_row(tmp_path):
    answers = [0, -3, 10**30, "4", 12]
    rows = [{**ROWS[number], "answer": answer, "name": number} for number, answer in enumerate(answers)]
    as_columns, one_by_one = both_ways(source_of(write(tmp_path / "a.jsonl", rows)))
    assert as_columns == one_by_one and [problem.answer for _, problem in as_columns][2] == "1" + "0" * 30


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "int64", "uint64", "int8"])
def test_types_of_parquet_are_the_text_of_the_row(tmp_path, kind):
    numbers = [0, 7, 100, 3, 12]
    column = pyarrow.array(numbers, kind) if "int" in kind else pyarrow.array(list(map(str, numbers)))
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    rows = pyarrow.table({"name": column, "question": column, "answer": column, "solution": column})
    parquet.write_table(rows, tmp_path / "a.parquet")
    as_columns, one_by_one = both_ways(source_of(tmp_path / "a.parquet", template="plain"))
    assert as_columns == one_by_one and [problem.answer for _, problem in as_columns] == list(map(str, numbers))


def test_text_that_is_not_utf8_is_named(tmp_path):
    bad = pyarrow.StringArray.from_buffers(2, *pyarrow.array([b"1", b"\xff"]).buffers()[1:])
    parquet.write_table(pyarrow.table({"question": bad, "answer": bad}), tmp_path / "a.parquet")
    source = source_of(tmp_path / "a.parquet", template="plain", columns={})
    with pytest.raises(UserError, match="text is not UTF-8"):
        list(problems.read_problems(source, {}))


def test_lines_with_blanks_between_and_after_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + b"\r\n \n".join(json.dumps(row).encode() + b" " for row in ROWS[:9]) + b"\n\n")
    as_columns, one_by_one = both_ways(source_of(path))
    assert as_columns == one_by_one and [number for number, _ in as_columns] == list(range(1, 10))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("value", ["", " \n", None, True, 1.5, ["4"], {"a": "4"}])
def test_a_value_of_another_kind_is_read_by_itself(tmp_path, suffix, value):
    rows = [{**row, "answer": value} for row in ROWS[:4]]
    source = source_of(write(tmp_path / f"a.{suffix}", rows), template="plain")
    (part,) = row_ranges.row_ranges(source.paths[0])
    assert plain_problems(source, part, "x") is None


@pytest.mark.parametrize("line", [
    b'{"name": "a", "question": "q", "answer": "1", "solution": "s"} {}', b"[]", b"{", b'"text"', b"\xff",
    b'{"name": "a", "question": "\\ud800", "answer": "1", "solution": "s"}', b'{"name": "a", "question": "q"}',
    b"{" * 100_000, b"\xef\xbb\xbf{}",
])  # fmt: skip
def test_a_line_with_a_mistake_is_read_by_itself_and_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:3]) + line + b"\n")
    source = source_of(path, template="plain")
    (part,) = row_ranges.row_ranges(path)
    assert plain_problems(source, part, "x") is None
    with pytest.raises(UserError, match="line 4|row 4"):
        list(problems.read_problems(source, {}))


@pytest.mark.parametrize("settings", [
    {"schema": "gsm8k"}, {"min_values": {"level": 1}}, {"columns": {"question": "a.b"}},
])  # fmt: skip
def test_other_sources_are_read_row_by_row(tmp_path, settings):
    path = write(tmp_path / "a.parquet", [{"question": "1", "answer": "#### 2", "level": 3, "a": {"b": "1"}}])
    source = source_of(path, **({"columns": {}} | settings))
    (part,) = row_ranges.row_ranges(path)
    assert plain_problems(source, part, "x") is None
    assert len(list(problems.read_problems(source, {}))) == 1


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_prompts_of_columns_are_those_of_rows(tmp_path, monkeypatch, suffix):
    """Tables in memory and on disk, of the fast and of the careful way: every column has the same values."""
    tokenizer = load_tokenizer("task:modular_arithmetic", tmp_path / "tokenizer")
    monkeypatch.setattr(row_ranges, "ROWS_PER_RANGE", 7)
    source = source_of(write(tmp_path / f"a.{suffix}", ROWS), template=TEMPLATE, domain="d")

    def table():
        settings = {"max_prompt_length": None, "date": datetime.date(2026, 1, 1), "cache_dir": tmp_path / "cache"}
        monkeypatch.setattr("megatron_s2d.data.prompt_cache._recent", {})
        return load_prompts(source, tokenizer, **settings).prompts._table.to_pydict()

    fast = table()
    monkeypatch.setattr(problems, "plain_problems", lambda *_: None)
    assert table() == fast and fast["text"][3] == "{Context} p: 3 + ä\n😀 =?" and len(fast["id"]) == 50


def test_slices_of_columns_are_problems(tmp_path):
    source = source_of(write(tmp_path / "a.jsonl", ROWS), template=TEMPLATE)
    (part,) = row_ranges.row_ranges(source.paths[0])
    columns, _ = plain_problems(source, part, "x")
    one_by_one = [problem for _, problem in rows_of(source, part, "x")]
    assert list(columns[3:9]) == one_by_one[3:9] and columns[-1] == one_by_one[-1]
    assert list(ProblemColumns.of(one_by_one)) == one_by_one
    texts = [problem.question + problem.answer + problem.solution for problem in one_by_one]
    sizes = [len(text.encode()) for text in texts]
    assert columns.sizes().tolist() == ProblemColumns.of(one_by_one).sizes().tolist() == sizes


def words_tokenizer(**settings):
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2, "<end>": 3}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.enable_truncation(2)  # what some published files have
    backend.enable_padding(length=5)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **settings)


@pytest.mark.parametrize("special", [True, False])
def test_tokens_of_many_texts_are_those_of_each(special):
    texts = ["a b a", "", "b", "a <end> b b b b b"]
    expected = [words_tokenizer()(text, add_special_tokens=special)["input_ids"] for text in texts]
    tokenizer = words_tokenizer()
    assert encode(tokenizer, texts, add_special_tokens=special) == expected
    calls = []
    monkeypatched = type(
        "Own",
        (PreTrainedTokenizerFast,),
        {"__call__": lambda self, texts, **_: calls.append(texts) or {"input_ids": [[9]] * len(texts)}},
    )
    own = monkeypatched(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>")
    assert encode(own, texts, add_special_tokens=special) == [[9]] * 4 and calls == [texts]


def test_keys_are_digests_of_tokens():
    rows = [np.arange(3), np.zeros(0, np.int64), np.array([70_000, 5]), np.array([5, 70_000]), np.zeros(1), np.zeros(2)]
    values, lengths = np.concatenate(rows).astype(np.int32), np.array(list(map(len, rows)))
    keys = token_keys(values, lengths)
    assert len(set(keys.tolist())) == len(rows) and keys.dtype == np.uint64
    one_by_one = [token_keys(row.astype(np.int64), np.array([len(row)]))[0] for row in rows]
    assert keys.tolist() == one_by_one
    lists = list_array(np.array([0, 1, 2, 70_000, 5]), np.array([3, -1, 0, 2]))
    assert lists.to_pylist() == [[0, 1, 2], None, [], [70_000, 5]]
    back, lengths = list_content(lists)
    assert back.tolist() == [0, 1, 2, 70_000, 5] and lengths.tolist() == [3, -1, 0, 2]


def test_digests_of_texts_are_those_of_each(monkeypatch):
    """Whatever stands beside a text, and however many are digested together."""
    texts = ["", "a", "a\0", "\0a", "\0", "12345678", "123456789", "12345678\0", "ä" * 9, "b", "a", "x" * 100]
    column = pyarrow.array(["before", *texts, "after"])[1:-1]
    digests = text_columns.text_digests(column)
    assert digests.tolist() == [text_columns.text_digests(pyarrow.array([text]))[0] for text in texts]
    assert len(set(digests.tolist())) == len(set(texts))
    monkeypatch.setattr(text_columns, "_WORDS_AT_ONCE", 2)
    assert text_columns.text_digests(column).tolist() == digests.tolist()
    assert not len(text_columns.text_digests(column[:0]))


def test_marks_of_texts():
    texts = pyarrow.array(["?", "a<e>b", "", "<e", ">", "é", "<e><e>", " "])[1:]
    assert text_columns.with_bytes(texts, np.arange(256) >= 128).tolist() == [False] * 4 + [True] + [False] * 2
    marked = text_columns.with_parts(texts, ["<e>", "?"])
    assert marked[[0, 5]].all() and not marked[[1, 3, 4, 6]].any()  # one may begin in a text and end in the next one
    assert text_columns.some_blank(texts) and not text_columns.some_blank(pyarrow.array(["a", "\u2003é", " b"]))
    assert text_columns.some_blank(pyarrow.array(["a", "\u2003"])) and text_columns.some_blank(pyarrow.array(["\x1c"]))


@pytest.mark.parametrize("ids", [
    [], ["one"], ["a", "a\0", "", "a\0b", "ab"], ["x/10", "x/9", "x/1", "x/ä", "x/😀", "x/ü"],
    ["same-prefix/" + "0" * 12 + str(number) for number in (3, 20, 1, 100)],
    [f"t/{number}" for number in np.random.default_rng(0).permutation(3000)],
    [f"t/{'long' * (number % 3)}{number}" for number in np.random.default_rng(1).permutation(3000)],
])  # fmt: skip
def test_order_of_ids_is_that_of_text(ids):
    chunks = [ids[start : start + 700] for start in range(0, len(ids), 700)]
    column = pyarrow.chunked_array(
        [pyarrow.array(["?", *chunk], pyarrow.string())[1:] for chunk in chunks], pyarrow.string()
    )
    order = id_order(pyarrow.table({"id": column}))
    assert [ids[index] for index in order] == sorted(ids) and order.dtype == np.int32


def test_rows_with_text_are_read_as_columns(tmp_path, monkeypatch):
    """The usual rows never take the careful way, which takes ten times as long."""
    monkeypatch.setattr(problems, "rows_of", None)
    for suffix in ("parquet", "jsonl"):
        source = source_of(write(tmp_path / f"a.{suffix}", ROWS))
        assert len(list(problems.read_problems(source, {}))) == 50
    assert columns_of_rows._texts(["a", 1]).to_pylist() == ["a", "1"]
