"""Generation gives the same samples at every layout, on every rank of a replica, and agrees with the full forward."""

from __future__ import annotations

import json

import pytest
from selection import selected

pytest.importorskip("torch")

pytestmark = pytest.mark.dist

LAYOUTS = {
    "tiny-llama": ("one", "tp2", "pp2", "tp2pp2", "tp4", "tp2pp2sp"),
    "tiny-moe": ("one", "pp2", "tp2sp", "ep4", "ep2pp2", "ep4tp2sp"),
}
SLOW = ("tiny-llama/pp2", "tiny-llama/tp2pp2", "tiny-moe/pp2", "tiny-moe/ep4")
CASES = [
    pytest.param(preset, layout, marks=pytest.mark.slow if f"{preset}/{layout}" in SLOW else ())
    for preset, names in LAYOUTS.items()
    for layout in names
]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory, run_ranks) -> dict:
    output = tmp_path_factory.mktemp("rollout") / "results.json"
    names = {f"{preset}/{layout}" for preset, layout in selected(request, "preset", "layout")}
    run_ranks("rollout_worker.py", 4, output, *sorted(names | {f"{preset}/one" for preset in LAYOUTS}))
    return json.loads(output.read_text())


def test_the_reference_is_worth_comparing_with(results):
    for preset in LAYOUTS:
        samples = results[f"{preset}/one"]["samples"].values()
        assert len(samples) == 24
        assert {sample["reason"] for sample in samples} == {"stop", "length"}
        assert len({tuple(sample["tokens"]) for sample in samples}) > 16


@pytest.mark.parametrize(("preset", "layout"), CASES)
def test_all_ranks_of_a_replica_return_the_same(results, preset, layout):
    assert results[f"{preset}/{layout}"]["same"]


@pytest.mark.parametrize(("preset", "layout"), CASES)
def test_samples_are_those_of_one_rank(results, preset, layout):
    samples, expected = results[f"{preset}/{layout}"]["samples"], results[f"{preset}/one"]["samples"]
    assert samples.keys() == expected.keys()
    for name, sample in expected.items():
        assert samples[name]["tokens"] == sample["tokens"], name
        assert samples[name]["reason"] == sample["reason"], name
        assert samples[name]["routes"] == sample["routes"], name
        assert sample["routes"] is None or len(sample["routes"]) == len(sample["tokens"]) - 1
        assert samples[name]["log_probs"] == pytest.approx(sample["log_probs"], rel=0, abs=1e-4), name


@pytest.mark.parametrize(("preset", "layout"), CASES)
def test_episodes_are_those_of_one_rank(results, preset, layout):
    conversations = results[f"{preset}/{layout}"]["conversations"]
    expected = results[f"{preset}/one"]["conversations"][0]
    assert len(expected) == 12 and conversations == [expected] * len(conversations) and conversations


@pytest.mark.parametrize(
    ("preset", "layout"), [case for case in CASES if case.values[1] not in ("ep4", "ep2pp2", "ep4tp2sp")]
)
def test_log_probs_are_those_of_a_full_forward(results, preset, layout):
    assert results[f"{preset}/{layout}"]["worst"] < 1e-4


def test_ranks_of_a_replica_notice_different_requests(results):
    assert "different requests" in results["different_requests"]
