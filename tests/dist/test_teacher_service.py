"""A served teacher gives what the same teacher gives in the trainer, for every payload and layout of the student."""

import json

import pytest
from selection import selected
from service_worker import KINDS
from teacher_server import running

RUNS = {1: ["tp1", "tp1packed"], 2: ["tp2sp", "dp2", "pp2", "cp2"], 4: ["tp4", "tp2pp2"]}
QUICK = {"tp1": ("by_domain", "top_k_union"), "tp2sp": ("sampled", "full"), "dp2": ("full",)}  # each kind once
CASES = [
    pytest.param(name, kind, marks=() if kind in QUICK.get(name, ()) else (pytest.mark.slow,))
    for names in RUNS.values()
    for name in names
    for kind in KINDS
]
# Of the second update: rounding that Adam's first step enlarges, as between layouts (test_training_layouts.py).
FIRST, LATER = 1e-5, 4e-5


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, run_ranks) -> dict:
    """Results of the selected layouts, against one server with two tensor-parallel ranks."""
    directory = tmp_path_factory.mktemp("service")
    run_ranks("service_worker.py", 1, "save", directory / "teacher")
    wanted, results = selected(request, "layout", "kind"), {}
    with running(directory / "teacher", "parallel.tensor_model_parallel_size=2") as server:
        for ranks, names in RUNS.items():
            kinds = {name: sorted(kind for layout, kind in wanted if layout == name) for name in names}
            if chosen := [f"{name}={','.join(of_name)}" for name, of_name in kinds.items() if of_name]:
                run_ranks("service_worker.py", ranks, directory / f"{ranks}.json", server.url, *chosen)
                results |= json.loads((directory / f"{ranks}.json").read_text())
    return results


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_a_served_teacher_is_the_teacher_in_the_trainer(runs, layout, kind):
    result = runs[f"{layout}/{kind}"]
    for update, (served, expected) in enumerate(zip(result["served"], result["in_trainer"], strict=True)):
        if kind == "sampled":
            assert served == pytest.approx(expected, rel=0, abs=FIRST)
            continue
        assert served.keys() == expected.keys()
        for name, value in expected.items():
            limit = FIRST if update == 0 else LATER
            assert served[name] == pytest.approx(value, rel=limit, abs=limit), (update, name)


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_requests_in_the_background_change_no_bit(runs, layout, kind):
    assert runs[f"{layout}/{kind}"]["served"] == runs[f"{layout}/{kind}"]["serial"]
