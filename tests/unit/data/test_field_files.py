"""Data files as people have them: cases reported from the field, and neighbours of them."""

import ast
import codecs
import datetime
import decimal
import gzip
import json
import math
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_s2d.config.base import parse
from megatron_s2d.config.data import FileSource
from megatron_s2d.data.prompts import load_prompts
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.errors import UserError

FIELD_CASES = Path(__file__).resolve().parents[3].parent / "shared" / "field-cases" / "data.jsonl"
DATE = datetime.date(2026, 1, 1)
ROW = {"question": "2+2?", "answer": "4"}
DAPO = {
    "prompt": [{"role": "user", "content": "34?"}],
    "reward_model": {"ground_truth": "34", "style": "rule"},
    "extra_info": {"index": "a1"},
}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(*rows, schema=None):
    return pa.Table.from_pylist(list(rows), schema=schema)


# id of a case -> content (bytes of a .jsonl file, a table, or the file's name and its bytes), settings of the source
CASES = {
    "d02": (("d02.json", codecs.BOM_UTF8 + json.dumps([ROW, ROW]).encode()), {}),
    "d03": (lines(ROW, ROW).replace(b"\n", b"\r\n"), {}),
    "d05": (lines({**ROW, "question": "2\0+2?"}), {}),
    "d07": (b"\n\n" + lines(ROW) + b"  \n" + lines(ROW) + b"\n", {}),
    "d09": (lines(ROW) + b'{"question": "2+2', {}),
    "d10": (lines({"id": "a", **ROW}, {"id": "a", **ROW}), {"columns": {"id": "id"}}),
    "d11": (
        b'{"question": "q", "answer": 4}\n{"question": "q", "answer": 0.5}\n{"question": "q", "answer": 1'
        + b"0" * 30
        + b'}\n{"question": "q", "answer": 1e-7}\n{"question": "q", "answer": 1e22}\n',
        {},
    ),
    "d12": (b'{"question": "q", "answer": NaN}\n', {}),
    "d13": (b'{"question": "q", "answer": Infinity}\n', {}),
    "d14": (lines({**ROW, "answer": ["4", "four"]}), {}),
    "d15": (lines(ROW, {**ROW, "answer": None}), {}),
    "d17": (lines({**ROW, "answer": "  "}), {}),
    "d18": (lines({**ROW, "answer": True}), {}),
    "d19": (
        lines({"problem": {"text": "2+3?"}, "label": {"value": 5}}),
        {"columns": {"question": "problem.text", "answer": "label.value"}},
    ),
    "d21": (table(DAPO), {"schema": "dapo"}),
    "d24": (table({**DAPO, "prompt": [{"role": "assistant", "content": "34"}]}), {"schema": "dapo"}),
    "d25": (table({**DAPO, "prompt": json.dumps(DAPO["prompt"])}), {"schema": "dapo"}),
    "d26": (table({**DAPO, "extra_info": {"index": 7}}), {"schema": "dapo"}),
    "d28": (table({**DAPO, "reward_model": {"ground_truth": 34}}), {"schema": "dapo"}),
    "d29": (table({**DAPO, "reward_model": {"ground_truth": ["34"]}}), {"schema": "dapo"}),
    "d30": (pa.Table.from_pandas(pandas.DataFrame({"question": ["a", "b"], "answer": [4.0, 5.0]})), {}),
    "d33": (table({**ROW, "answer": decimal.Decimal("1.50")}), {}),
    "d37": (gzip.compress(lines(ROW)), {}),
    "d39": (("d39.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), {}),
    "d40": (b"<!DOCTYPE html>\n<html></html>\n", {}),
    "d42": (("d42.json", json.dumps({"train": [ROW]}).encode()), {}),
    "d44": (json.dumps([ROW]).encode(), {}),
    "d45": (b'{"question": "\\ud800", "answer": "4"}\n', {}),
    "d46": (json.dumps({"question": "caf\xe9", "answer": "4"}, ensure_ascii=False).encode("latin-1"), {}),
    "d47": (lines(ROW, ROW).decode().encode("utf-16"), {}),
    "d48": (b'{"question": "q", "answer": "1", "answer": "2"}\n', {}),
    "d51": (lines({"question": "q", "answer": "4"}), {"schema": "gsm8k"}),
    "d52": (lines({"question": "q", "answer": "so #### -1,234 "}), {"schema": "gsm8k"}),
    "d53": (lines({"problem": "q", "answer": "1", "solution": "1"}), {"schema": "math500"}),
    "d54": (lines({"id": 3, "problem": "q", "answer": 204}), {"schema": "competition"}),
    "d60": (
        table({**DAPO, "prompt": [{"role": "user", "content": [{"type": "text", "text": "34?"}]}]}),
        {"schema": "dapo"},
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("task:modular_arithmetic", tmp_path_factory.mktemp("tokenizer"))


def load(directory, tokenizer, name, content, settings):
    if isinstance(content, tuple):
        name, content = content
    elif isinstance(content, pa.Table):
        name = f"{name}.parquet"
    path = directory / (name if "." in name else f"{name}.jsonl")
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content)
    source = parse(FileSource, {"type": "file", "path": path, "template": "plain", **settings}, "test")
    return load_prompts(source, tokenizer, max_prompt_length=None, date=DATE).prompts


def _right():
    if not FIELD_CASES.exists():
        return {}
    return {case["id"]: case for case in map(json.loads, FIELD_CASES.read_text().splitlines())}


RIGHT = _right()


@pytest.mark.parametrize("name", CASES)
def test_reported_files(tmp_path, tokenizer, name):
    if not RIGHT:
        pytest.skip("no field cases in shared/field-cases beside the repository")
    outcome, *expected = ast.literal_eval(RIGHT[name]["right"])
    if outcome == "error":
        with pytest.raises(UserError) as caught:
            load(tmp_path, tokenizer, name, *CASES[name])
        assert "\n" not in str(caught.value) and f"{name}." in str(caught.value)
        return
    prompts = load(tmp_path, tokenizer, name, *CASES[name])
    count, values = expected
    assert len(prompts) == count
    if "answers" in values:
        assert [prompt.answer for prompt in prompts] == values["answers"]
    if "answer" in values:
        assert prompts[0].answer == values["answer"]


@pytest.mark.parametrize(
    ("content", "settings", "words"),
    [
        (b'{"question": "q", "answer": -Infinity}\n', {}, "'answer' is -inf: only finite numbers are labels"),
        (table({**ROW, "answer": math.inf}), {}, "'answer' is inf: only finite numbers are labels"),
        (b'{"question": "q", "answer": 4, "d": Infinity}\n', {"min_values": {"d": 1}}, "'d' is inf, not a finite"),
        (table(schema=pa.schema({"question": pa.string(), "answer": pa.string()})), {}, "no rows"),
        (("x.parquet", b""), {}, "the file is empty"),
        (("x.json", codecs.BOM_UTF8), {}, "no rows|not valid JSON"),
        (("x.json", codecs.BOM_UTF8 + b"  []"), {}, "no rows"),
        (("x.json", b"[" * 100_000), {}, "not valid JSON"),
        (table({**DAPO, "extra_info": {"index": ["a"]}}), {"schema": "dapo"}, "'extra_info.index' must be text"),
        (
            lines({**DAPO, "prompt": [{"role": "user", "content": "\ud800"}]}),
            {"schema": "dapo"},
            "'prompt' is not valid Unicode",
        ),
    ],
)
def test_neighbours_are_refused_in_one_line(tmp_path, tokenizer, content, settings, words):
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path, tokenizer, "x", content, settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["run[1]", "a*b", "{x,y}", "what?", "50%", "it's"])
@pytest.mark.parametrize("content", [lines(ROW), table(ROW)])
def test_paths_are_names_and_not_patterns(tmp_path, tokenizer, folder, content):
    (tmp_path / folder).mkdir()
    assert len(load(tmp_path / folder, tokenizer, "x", content, {})) == 1


def test_a_byte_order_mark_before_json_lines(tmp_path, tokenizer):
    assert len(load(tmp_path, tokenizer, "x", codecs.BOM_UTF8 + lines(ROW, ROW), {})) == 2


def test_a_missing_number_of_a_row_is_no_id(tmp_path, tokenizer):
    """pandas writes NaN for a missing index: two of them are not the same row."""
    rows = [{**DAPO, "extra_info": {"index": math.nan}}, {**DAPO, "extra_info": {"index": math.nan}}]
    assert [prompt.id for prompt in load(tmp_path, tokenizer, "x", table(*rows), {"schema": "dapo"})] == ["x/0", "x/1"]
