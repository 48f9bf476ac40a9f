"""PP 2 with two model chunks on each rank equals PP 2 and data parallelism: training, scores, files, weights."""

import json

import numpy as np
import pytest

ABSOLUTE, RELATIVE = 2e-5, 2e-5  # as in test_training_layouts.py


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_ranks) -> dict:
    directory = tmp_path_factory.mktemp("virtual_stages")
    run_ranks("virtual_stages_worker.py", 2, directory / "results.json", directory)
    return json.loads((directory / "results.json").read_text())


@pytest.mark.dist
def test_losses_norms_and_scores_are_those_of_other_layouts(runs):
    for name in ("dp2", "pp2vp2", "pp2vp2overlap"):
        _assert_agree(runs[name]["rows"], runs["pp2"]["rows"])
        for key in ("scores", "moved"):
            for mine, expected in zip(runs[name][key], runs["pp2"][key], strict=True):
                np.testing.assert_allclose(mine, expected, atol=1e-5)
    losses = [row["loss"] for row in runs["pp2"]["rows"]]
    assert losses[2] < losses[0] - 1e-3  # the model moves


@pytest.mark.dist
def test_replayed_experts_are_those_of_other_layouts(runs):
    """A rank's layers are not neighbours: routing replay (test_training_layouts.py) sends each its own experts."""
    _assert_agree(runs["pp2vp2"]["replayed"], runs["dp2"]["replayed"])


@pytest.mark.dist
def test_exported_weights_are_those_of_other_layouts(runs):
    assert len({runs[name]["before"] for name in ("dp2", "pp2", "pp2vp2")}) == 1  # the same seed
    assert runs["pp2vp2"]["after"] == runs["pp2vp2overlap"]["after"] != runs["pp2vp2"]["before"]


@pytest.mark.dist
@pytest.mark.parametrize(("resumed", "uninterrupted"), [("pp2vp2 to dp2", "dp2"), ("dp2 to pp2vp2", "pp2vp2")])
def test_a_checkpoint_continues_with_another_number_of_chunks(runs, resumed, uninterrupted):
    _assert_agree([runs[resumed]], runs[uninterrupted]["rows"][2:])


def _assert_agree(mine: list[dict], reference: list[dict]) -> None:
    assert len(mine) == len(reference)
    for row, expected in zip(mine, reference, strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            assert row[name] == pytest.approx(expected[name], rel=RELATIVE, abs=ABSOLUTE), name
