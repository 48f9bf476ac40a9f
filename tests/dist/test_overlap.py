"""Gradients reduced during the backward pass and weights gathered after the update: the bits of no overlap."""

import json

import pytest

RUNS = {2: ["dp2", "ep2"], 4: ["tp2dp2sp"]}
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name != "dp2" else ()) for names in RUNS.values() for name in names
]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, run_ranks) -> dict:
    wanted = {item.callspec.params["layout"] for item in request.session.items if item.module is request.module}
    results = {}
    for ranks, names in RUNS.items():
        output = tmp_path_factory.mktemp("overlap") / f"{ranks}.json"
        if present := [name for name in names if name in wanted]:
            run_ranks("overlap_worker.py", ranks, output, *present)
            results |= json.loads(output.read_text())
    return results


@pytest.mark.dist
@pytest.mark.parametrize("small", [False, True], ids=["one_bucket", "small_buckets"])
@pytest.mark.parametrize("layout", NAMES)
def test_overlap_changes_no_bit(runs, layout, small):
    plain, *others = (runs[f"{layout}/{variant}/{small}"] for variant in ("none", "reduce", "both"))
    for rows in others:
        assert (rows[0]["buckets"] > 1) == small
        for row, expected in zip(rows, plain, strict=True):
            assert row["loss"] == expected["loss"]
            assert row["norm"] == pytest.approx(expected["norm"], rel=1e-6 if small else 0, abs=0)
            # Scored and exported directly after an update: every weight has arrived.
            assert row.get("digest") == expected.get("digest")
            assert row.get("scores") == expected.get("scores")
    assert plain[1]["digest"] != plain[-1]["digest"]
    assert plain[1]["pending"] == others[0][1]["pending"] == 0
    assert others[1][1]["pending"] > 0  # the gathers were still under way when the update returned
