"""The served engine gives the same samples from every training layout, with faults on the way that ranks mend together."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

pytestmark = pytest.mark.dist

CASES = (
    "tiny-llama/one",
    "tiny-llama/tp2",
    "tiny-llama/tp2pp2",
    "tiny-moe/one",
    "tiny-moe/ep2pp2",
    "tiny-moe/ep4tp2sp",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_ranks) -> dict:
    output = tmp_path_factory.mktemp("sglang") / "results.json"
    run_ranks("sglang_worker.py", 4, output)
    return json.loads(output.read_text())


@pytest.mark.parametrize("case", CASES)
def test_samples_and_weights_are_those_of_one_rank(results, case):
    found, expected = results[case], results[case.partition("/")[0] + "/one"]
    assert len(found["samples"]) == 12
    assert found["samples"] == expected["samples"]
    assert found["gap"] < 1e-5
    assert found["faults_left"] < 8  # the faults were met
    assert found["top_agree"] == [True] * 4  # each replica has the likeliest tokens of its own samples


@pytest.mark.parametrize("case", CASES)
def test_a_push_that_fails_is_the_same_error_on_every_rank(results, case):
    refused = results[case]["refused"]
    assert len(set(refused)) == 1 and "status 500" in refused[0]


@pytest.mark.parametrize("case", CASES)
def test_responses_go_on_over_a_push_and_from_one_step_to_the_next(results, case):
    found = results[case]
    assert len(found["begun"]) == 12 and found["begun_gap"] < 1e-5
    assert found["mixed"] == 12  # all were interrupted with tokens
    assert found["carried"] == [f"{name}again" for name in found["begun"]]
    assert all(found["half"])
