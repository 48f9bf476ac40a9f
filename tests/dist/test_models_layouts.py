"""A model is the same at every layout: initial weights bit for bit; logits, losses, gradient norms, trained weights."""

from __future__ import annotations

import json

import pytest
from selection import selected

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.dist

PRESETS = {
    "tiny-teacher": ("tp2", "pp2", "tp2pp2", "tp2sp", "tp2pp2sp"),
    "tiny-llama": ("tp2", "pp2", "tp2pp2", "tp2sp", "tp2pp2sp", "tp4"),
    "tiny-moe": ("pp2", "tp2sp", "ep2", "ep2pp2", "ep2tp2sp", "ep4tp2sp"),
}
# Layouts whose parts occur in others of the preset, or of one with the same layers.
SLOW = (
    "tiny-teacher/tp2",
    "tiny-teacher/pp2",
    "tiny-teacher/tp2pp2",
    "tiny-teacher/tp2sp",
    "tiny-llama/tp2",
    "tiny-llama/pp2",
    "tiny-llama/tp2sp",
    "tiny-llama/tp2pp2",
    "tiny-moe/pp2",
    "tiny-moe/tp2sp",
    "tiny-moe/ep2",
    "tiny-moe/ep2tp2sp",
)
CASES = [
    pytest.param(preset, layout, marks=pytest.mark.slow if f"{preset}/{layout}" in SLOW else ())
    for preset, names in PRESETS.items()
    for layout in names
]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory, run_ranks) -> dict:
    output = tmp_path_factory.mktemp("models") / "results.json"
    cases = selected(request, "preset", "layout")
    names = {f"{preset}/{layout}" for preset, layout in cases} | {f"{preset}/dp4" for preset, _ in cases}
    run_ranks("models_worker.py", 4, output, *sorted(names))
    return json.loads(output.read_text())


@pytest.mark.parametrize(("preset", "layout"), CASES)
def test_initial_weights_are_bit_identical(results, preset, layout):
    assert results[f"{preset}/{layout}"]["before"] == results[f"{preset}/dp4"]["before"]


@pytest.mark.parametrize(("preset", "layout"), CASES)
def test_logits_agree(results, preset, layout):
    logits = torch.tensor(results[f"{preset}/{layout}"]["logits"])
    expected = torch.tensor(results[f"{preset}/dp4"]["logits"])
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("preset", "layout"), CASES)
def test_training_agrees(results, preset, layout):
    training, expected = results[f"{preset}/{layout}"], results[f"{preset}/dp4"]
    assert expected["losses"][2] < expected["losses"][0] - 0.1
    assert training["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert training["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert training["after"].keys() == expected["after"].keys()
    for name, norm in expected["after"].items():
        assert training["after"][name] == pytest.approx(norm, rel=1e-3), name


@pytest.mark.parametrize(("preset", "layout"), CASES)
def test_padded_rows_stay_zero(results, preset, layout):
    assert results[f"{preset}/{layout}"]["padding"] == 0
