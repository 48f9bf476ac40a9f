"""The bars of a training step on 2 and 4 ranks, for every kind of stage: bytes, host memory, nothing pickled."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import control_plane

RESPONSE_LENGTH = 1024


@pytest.fixture(scope="module")
def rows() -> dict[int, dict]:
    """What the benchmark measures; a rank fails, and so does this, if a step of any stage pickles something."""
    return {size: control_plane.measure(size, RESPONSE_LENGTH, "forkserver") for size in (2, 4)}


@pytest.mark.parametrize("kind", control_plane.SOURCES)
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_sends_at_most_its_samples_and_64_bytes_a_response(rows, size, kind):
    assert 0 < rows[size]["of_bound_by_kind"][kind] <= 1
    assert rows[size]["responses"] == 8 * size


def test_memory_of_a_rank_does_not_grow_with_the_ranks(rows):
    assert rows[4]["rss"] <= rows[2]["rss"] * (1 + control_plane.MEMORY_GROWTH)
    control_plane.check(list(rows.values()))


def test_rank_0_alone_writes_files_and_as_many_at_every_size(rows):
    assert rows[2]["writers"] == rows[4]["writers"] == [0]
    assert 0 < rows[4]["files"] == rows[2]["files"] <= 4


def test_pickling_is_refused_in_a_step():
    with control_plane.counted() as traffic:
        traffic.refuses_objects = True
        for name in control_plane.OBJECT_COLLECTIVES:
            with pytest.raises(AssertionError, match=f"{name} in a training step"):
                getattr(control_plane.dist, name)([None], None)
