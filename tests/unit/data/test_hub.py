"""Data sets that ``datasets`` loads: local folders stand for those of a hub, which a test must not need."""

import datetime
import hashlib
import json
import shutil
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_s2d.config.base import parse
from megatron_s2d.config.data import FileSource, HubSource
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.hub import as_files
from megatron_s2d.data.prompts import load_prompts
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.errors import UserError
from megatron_s2d.workflow.plan import data_digest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"question": f"{number} + 1 =", "answer": str(number + 1)} for number in range(6)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set of one configuration with the splits train, in two files, and test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "arithmetic"
    path.mkdir()
    for name, rows in (("train-0", ROWS[:2]), ("train-1", ROWS[2:4]), ("test-0", ROWS[4:])):
        pq.write_table(pa.Table.from_pylist(rows), path / f"{name}.parquet")
    return path


def source(**settings) -> HubSource:
    return parse(HubSource, {"type": "hub", "template": "plain", **settings}, "data.train")


def test_the_rows_of_a_split_become_prompts(folder, tmp_path):
    tokenizer = load_tokenizer("task:modular_arithmetic", tmp_path)
    prompts = load_prompts(
        source(dataset=str(folder)),
        tokenizer,
        max_prompt_length=None,
        date=datetime.date(2026, 1, 1),
        cache_dir=tmp_path,
    ).prompts
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == [row["question"] for row in ROWS[:4]]
    (path,) = as_files(source(dataset=str(folder), split="test"), tmp_path).paths
    assert datasets.Dataset.from_file(str(path)).to_list() == ROWS[4:]


def test_settings_of_the_rows_are_those_of_files(folder, tmp_path):
    settings = {"schema": "columns", "skip": 1, "limit": 2, "domain": "sums"}
    files = as_files(source(dataset=str(folder), **settings), tmp_path)
    assert files == parse(FileSource, {"path": [str(path) for path in files.paths], "template": "plain"} | settings, "")


def test_other_rows_are_another_input_of_the_stages(folder, tmp_path):
    entries = {"train": source(dataset=str(folder))}
    config = WorkflowConfig.model_construct(data=entries, data_cache_dir=tmp_path / "tables")
    first = data_digest(config, "train")
    assert data_digest(config, "train") == first
    pq.write_table(pa.Table.from_pylist(ROWS[3:]), folder / "train-1.parquet")
    assert data_digest(config, "train") != first


def test_the_hub_is_asked_once_for_a_commit(folder, tmp_path, monkeypatch):
    asked, load = [], datasets.load_dataset

    def of_folder(name, *arguments, revision, **options):
        asked.append((name, revision))
        return load(str(folder), *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", of_folder)
    entry = source(dataset="owner/arithmetic", revision=COMMIT)
    files = as_files(entry, tmp_path / "tables")
    assert as_files(entry, tmp_path / "tables") == files and asked == [("owner/arithmetic", COMMIT)]
    shutil.rmtree(files.paths[0].parent)  # as on another machine that has the same folder of tables
    as_files(entry, tmp_path / "tables")
    assert len(asked) == 2


def test_the_first_rows_of_a_stream_are_kept_with_their_numbers(folder, tmp_path, monkeypatch):
    whole = as_files(source(dataset=str(folder)), tmp_path / "whole")
    asked, load = [], datasets.load_dataset

    def of_folder(name, *arguments, revision, **options):
        asked.append(options["streaming"])
        return load(str(folder), *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", of_folder)
    entry = source(dataset="owner/arithmetic", revision=COMMIT, stream_rows=3, skip=1)
    files = as_files(entry, tmp_path / "tables")
    (path,) = files.paths
    assert pq.read_table(path).to_pylist() == ROWS[:3] and files.skip == 1 and whole.skip == 0
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "tables").glob("hub-*.json"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record == {"paths": [str(path)], "revision": COMMIT, "rows": [0, 3], "sha256": digest}
    assert as_files(entry, tmp_path / "tables") == files and asked == [True]
    as_files(entry.model_copy(update={"stream_rows": 4}), tmp_path / "tables")
    assert asked == [True, True]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="differs from the rows that were streamed: remove it"):
        as_files(entry, tmp_path / "tables")
    path.unlink()
    assert as_files(entry, tmp_path / "tables") == files and len(asked) == 3


def test_a_stream_that_breaks_leaves_nothing(folder, tmp_path, monkeypatch):
    def breaking(rows, count):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets.IterableDataset, "take", breaking)
    with pytest.raises(UserError, match=r"cannot be loaded \(reset by peer\)"):
        as_files(source(dataset=str(folder), stream_rows=3), tmp_path / "tables")
    assert list((tmp_path / "tables").iterdir()) == []


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_revision_that_can_move_is_refused_with_the_commit_it_is_now(tmp_path, monkeypatch, revision):
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    with pytest.raises(UserError, match=f"may have other rows tomorrow: set revision: {COMMIT}"):
        as_files(source(dataset="owner/arithmetic", revision=revision), tmp_path)


@pytest.mark.parametrize("settings", [{"split": "missing"}, {"name": "another"}])
def test_what_the_data_set_lacks_is_one_line(folder, tmp_path, settings):
    with pytest.raises(UserError, match=r"data set '.*arithmetic' cannot be loaded \(.*\); give its name") as error:
        as_files(source(dataset=str(folder), **settings), tmp_path)
    assert "\n" not in str(error.value)


def test_a_slice_of_a_split_is_refused():
    with pytest.raises(UserError, match="split"):
        source(dataset="owner/arithmetic", split="train[:10%]")
