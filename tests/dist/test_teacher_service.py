"""A served teacher gives what the same teacher gives in the trainer, for every payload and layout of the student."""

import json

import pytest
from selection import selected
from service_worker import KINDS
from teacher_server import running

RUNS = {1: ["tp1packed", "tp1"], 2: ["tp2sp", "pp2", "dp2", "cp2"], 4: ["tp4", "tp2pp2"]}
SLOW = ("tp1packed", "pp2", "tp4", "tp2pp2")
NAMES = [
    pytest.param(name, marks=(pytest.mark.slow,) if name in SLOW else ()) for names in RUNS.values() for name in names
]
ABSOLUTE = 1e-5


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, run_ranks) -> dict:
    """Results of the selected layouts, against one server with two tensor-parallel ranks."""
    directory = tmp_path_factory.mktemp("service")
    run_ranks("service_worker.py", 1, "save", directory / "teacher")
    wanted, results = {name for (name,) in selected(request, "layout")}, {}
    with running(directory / "teacher", "parallel.tensor_model_parallel_size=2") as server:
        for ranks, names in RUNS.items():
            if chosen := [name for name in names if name in wanted]:
                run_ranks("service_worker.py", ranks, directory / f"{ranks}.json", server.url, *chosen)
                results |= json.loads((directory / f"{ranks}.json").read_text())
    return results


@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", NAMES)
def test_a_served_teacher_is_the_teacher_in_the_trainer(runs, layout, kind):
    result = runs[f"{layout}/{kind}"]
    for served, expected in zip(result["served"], result["in_trainer"], strict=True):
        if kind == "sampled":
            assert served == pytest.approx(expected, rel=0, abs=ABSOLUTE)
            continue
        assert served.keys() == expected.keys()
        for name, value in expected.items():
            assert served[name] == pytest.approx(value, rel=1e-5, abs=ABSOLUTE), name


@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", NAMES)
def test_requests_in_the_background_change_no_bit(runs, layout, kind):
    assert runs[f"{layout}/{kind}"]["served"] == runs[f"{layout}/{kind}"]["serial"]
