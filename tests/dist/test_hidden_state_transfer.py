"""Hidden states of a teacher go to the ranks that train on them and nowhere else, and change no bit on the way."""

import json
from pathlib import Path

import pytest
from hidden_state_transfer_worker import SCENARIOS

# student:teacher; tensor, pipeline, data and sequence parallelism differ in turn, and the last pair has one layout
FAST, SLOW = ["tp2dp2sp:pp2dp2", "dp4:tp2pp2", "tp2dp2sp:tp2dp2sp"], ["tp2pp2:tp4", "tp2dp2:dp4", "dp4:tp2dp2sp"]
PAIRS = [*FAST, *(pytest.param(pair, marks=pytest.mark.slow) for pair in SLOW)]
CASES = [
    pytest.param(f"{pair}/{scenario}", marks=pytest.mark.slow if pair in SLOW else ())
    for pair in FAST + SLOW
    for scenario in SCENARIOS
]


class Found(dict):
    """What the ranks found, by case; pairs run together when the first of them is asked for."""

    def __init__(self, run):
        super().__init__()
        self._run = run

    def __missing__(self, key: str):
        self.update(self._run(SLOW if key.partition("/")[0] in SLOW else FAST))
        return self[key]


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_ranks) -> Found:
    def run(pairs: list[str]) -> dict:
        output = Path(tmp_path_factory.mktemp("states")) / "found.json"
        run_ranks("hidden_state_transfer_worker.py", 4, output, *pairs)
        return json.loads(output.read_text())

    return Found(run)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_training_is_what_it_is_with_all_states_everywhere(found, case):
    """Equal bits: losses, metrics and gradient norms of three updates."""
    assert found[case]["losses"] == found[case]["plain"]
    assert found[case]["losses"][0] != found[case]["losses"][-1]  # the model moved


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_every_row_is_kept_once_and_by_the_rank_that_is_due(found, case):
    ranks = found[case]["transport"]
    assert all(rank["same"] for rank in ranks)
    for rank in ranks:
        assert rank["kept"] == rank["due"]
        assert rank["received"] <= rank["due"]
    # Over the whole job: each response token once, where the plain way has all tokens on all ranks.
    assert sum(rank["kept"] for rank in ranks) == ranks[0]["update"]
    for dp_rank in {rank["student"][0] for rank in ranks}:
        group = [rank for rank in ranks if rank["student"] == [dp_rank, True]]
        assert {rank["whole"] for rank in group} == {sum(rank["kept"] for rank in group)}


@pytest.mark.dist
@pytest.mark.parametrize("pair", PAIRS)
def test_bytes_on_the_wire_are_those_of_the_rows(found, pair):
    """A rank that computes no states receives all that it keeps; one that trains on none receives nothing."""
    ranks = found[f"{pair}/full"]["transport"]
    for rank in ranks:
        if not rank["student"][1]:
            assert rank["received"] == 0
        elif not rank["computes"][0]:
            assert rank["received"] == rank["due"]
    student, teacher = pair.split(":")
    assert (sum(rank["received"] for rank in ranks) == 0) == (student == teacher)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_pickled_and_no_output_layer_is_cut_again(found, case):
    for rank in found[case]["transport"]:
        assert rank["objects"] == 0 and rank["broadcasts"] == 0


@pytest.mark.dist
def test_buckets_bound_what_is_in_flight(found):
    """8 MiB per rank pass through two quarters of a MiB."""
    for rank in found["bucketed"]:
        assert rank["same"]
        assert 0 < rank["peak"] <= 2 * (1 << 18)
