"""The served engine returns the same samples at every training layout; ranks recover from server faults together."""

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
    result, expected = results[case], results[case.partition("/")[0] + "/one"]
    assert len(result["samples"]) == 12
    assert result["samples"] == expected["samples"]
    assert result["gap"] < 1e-5
    assert result["faults_left"] < 8  # some of the faults were hit
    assert result["top_agree"] == [True] * 4  # each replica has the likeliest tokens of its own samples


@pytest.mark.parametrize("case", CASES)
def test_each_sender_pushes_to_its_own_servers_and_writes_its_part_of_the_files(results, case):
    """Senders are ranks 0 and 2, as if each were the first of a machine."""
    assert results[case]["pushed_to"] == [[0], [], [1], []]
    files = results[case]["files"]
    number = len(files[0]) + len(files[2])
    assert number > 3 and not files[1] and not files[3]
    assert [files[0], files[2]] == [[f"model-{n:05d}.safetensors" for n in range(k, number, 2)] for k in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_a_failed_weight_update_raises_the_same_error_on_every_rank(results, case):
    refused = results[case]["refused"]
    assert len(set(refused)) == 1 and "status 500" in refused[0]


@pytest.mark.parametrize("case", CASES)
def test_partial_responses_continue_after_a_weight_update(results, case):
    result = results[case]
    assert len(result["partial"]) == 12 and result["partial_gap"] < 1e-5
    assert result["mixed"] == 12  # all were interrupted with tokens


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_take_the_same_groups_from_the_buffer(results, case):
    first, *others = results[case]["taken"]
    assert others == [first] * 3
    ids = [name for step in first for name in step]
    assert [len(step) for step in first] == [8] * 3 and len(set(ids)) == len(ids)
