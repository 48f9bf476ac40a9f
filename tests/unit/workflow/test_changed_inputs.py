"""A finished stage whose files changed afterwards is not an input any more."""

import pytest

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.workflow.worker import _outputs, changed_input


@pytest.fixture
def finished(tmp_path):
    directory = StageDirectory(tmp_path / "stages" / "teacher")
    directory.model_path.mkdir(parents=True)
    (directory.model_path / "weights").write_bytes(b"weights")
    directory.begin({}, {}, {})
    directory.finish({"seconds": 1.0, "outputs": _outputs(directory)})
    return directory


def test_intact_inputs_pass(finished):
    assert changed_input({"teacher": finished}) is None


def test_unreadable_records_are_returned_and_not_raised(finished):
    finished.finished_path.write_text("{")
    assert "finished.json" in changed_input({"teacher": finished})
    finished.finished_path.write_text('{"seconds": 1}')
    assert "teacher/model has changed" in changed_input({"teacher": finished})
    finished.finished_path.unlink()
    assert "has not finished" in changed_input({"teacher": finished})


@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_every_change_is_named(finished, change):
    path = finished.model_path / "weights"
    if change == "edit":
        path.write_bytes(b"weighty")
    elif change == "add":
        finished.cache_path.mkdir()
    else:
        path.unlink()
        finished.model_path.rmdir()
    name = "cache" if change == "add" else "model"
    assert f"teacher/{name} has changed since its stage finished" in changed_input({"teacher": finished})
