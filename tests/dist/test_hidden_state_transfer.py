"""Hidden states of a teacher are sent to the ranks that train on them and nowhere else, bit for bit."""

import json
from pathlib import Path

import pytest
from hidden_state_transfer_worker import SCENARIOS

# student:teacher; tensor, pipeline, data and sequence parallelism differ in turn, and the last pair has one layout
FAST = ["tp2dp2sp:pp2dp2", "tp2dp2sp:tp2dp2sp"]
SLOW = ["dp4:tp2pp2", "tp2pp2:tp4", "tp2dp2:dp4", "dp4:tp2dp2sp"]
PAIRS = [*FAST, *(pytest.param(pair, marks=pytest.mark.slow) for pair in SLOW)]
CASES = [
    pytest.param(f"{pair}/{scenario}", marks=pytest.mark.slow if pair in SLOW else ())
    for pair in FAST + SLOW
    for scenario in SCENARIOS
]


class Results(dict):
    """Results of the ranks by case; pairs of layouts run together when the first of them is asked for."""

    def __init__(self, run):
        super().__init__()
        self._run = run

    def __missing__(self, key: str):
        self.update(self._run(SLOW if key.partition("/")[0] in SLOW else FAST))
        return self[key]


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_ranks) -> Results:
    def run(pairs: list[str]) -> dict:
        output = Path(tmp_path_factory.mktemp("states")) / "results.json"
        run_ranks("hidden_state_transfer_worker.py", 4, output, *pairs)
        return json.loads(output.read_text())

    return Results(run)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_training_equals_that_with_all_states_on_every_rank(results, case):
    """Equal bits: losses, metrics, gradient norms of two updates; by domain, of other micro-batches, up to rounding."""
    tolerance = 1e-5 if case.endswith("/by_domain") else 0
    for mine, reference in zip(results[case]["losses"], results[case]["gathered"], strict=True):
        assert mine == pytest.approx(reference, rel=tolerance, abs=tolerance)
    assert results[case]["losses"][0] != results[case]["losses"][-1]  # the model moved


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_every_row_is_stored_once_and_by_the_assigned_rank(results, case):
    ranks = results[case]["transport"]
    assert all(rank["same"] for rank in ranks)
    for rank in ranks:
        assert rank["stored"] == rank["expected_stored"]
        assert rank["received"] <= rank["stored"]
    # Over the whole job: each response token once, while the reference stores all tokens on all ranks.
    assert sum(rank["stored"] for rank in ranks) == ranks[0]["mini_batch"]
    for dp_rank in {rank["student"][0] for rank in ranks}:
        group = [rank for rank in ranks if rank["student"] == [dp_rank, True]]
        assert {rank["all_rows"] for rank in group} == {sum(rank["stored"] for rank in group)}


@pytest.mark.dist
@pytest.mark.parametrize("pair", PAIRS)
def test_received_bytes_are_those_of_the_rows(results, pair):
    """A rank that computes no states receives all that it stores; one that trains on none receives nothing."""
    ranks = results[f"{pair}/full"]["transport"]
    for rank in ranks:
        if not rank["student"][1]:
            assert rank["received"] == 0
        elif not rank["computes"]:
            assert rank["received"] == rank["stored"]
    student, teacher = pair.split(":")
    assert (sum(rank["received"] for rank in ranks) == 0) == (student == teacher)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_pickled_and_no_output_layer_is_resharded_twice(results, case):
    for rank in results[case]["transport"]:
        assert rank["objects"] == 0 and rank["broadcasts"] == 0


@pytest.mark.dist
def test_buckets_bound_the_bytes_in_flight(results):
    """8 MiB per rank pass through two quarters of a MiB."""
    for rank in results["bucketed"]:
        assert rank["same"]
        assert 0 < rank["peak"] <= 2 * (1 << 18)
