"""Training gives the same losses at every layout: TP, SP, PP, DP, EP, CP and combinations against one rank,
with padded and with packed sequences."""

import json
from pathlib import Path

import numpy as np
import pytest
from selection import selected
from view_layouts import ONLY_VIEWS, VIEW_LAYOUTS

WORKER = Path(__file__).with_name("training_worker.py")
RUNS = {
    1: ["tp1", "tp1packed"],
    2: [
        "tp2", "tp2sp", "pp2", "dp2", "ep2", "dp2:tp2", "tp2sp:pp2", "pp2:dp2", "dp2:tp2+pp2",
        "tp2sppacked", "pp2packed", "cp2", "cp2:tp2", "dp2:cp2packed",
    ],
    4: ["tp2pp2", "tp2dp2sp", "tp2pp2:tp4", "tp2dp2sp:pp2dp2", "tp2cp2sp", "cp2pp2", "cp2dp2:tp2cp2sp", "tp4"],
}  # fmt: skip


def _slow(condition: bool) -> tuple:
    return (pytest.mark.slow,) if condition else ()


# Layouts whose parts occur in others.
SLOW = ("tp2", "tp2sp:pp2", "pp2:dp2", "pp2packed", "dp2:cp2packed", "tp2dp2sp:pp2dp2", "cp2pp2", "cp2dp2:tp2cp2sp")
NAMES = [
    pytest.param(name, marks=_slow(name in SLOW))
    for names in RUNS.values()
    for name in names
    if name not in ("tp1", *ONLY_VIEWS)
]
LAYOUTS = [case for case in NAMES if ":" not in case.values[0] and "ep" not in case.values[0]]
PAIRS = [case for case in NAMES if ":" in case.values[0]]
SCENARIOS = ["supervised", "grpo", "gspo", "opd", "opd_by_domain", "forward_kl"]
# Of scenarios that share most with others: the layouts that are not slow, each kind of rank once.
QUICK = {
    "supervised": ("tp1packed", "tp2sp", "dp2"),
    "grpo": ("tp1packed", "tp2sp", "pp2", "dp2", "tp2cp2sp"),
    "forward_kl": ("tp1packed", "tp2sp", "pp2", "cp2", "tp2dp2sp"),
    "gspo": ("dp2", "cp2", "tp2cp2sp"),
    "opd_by_domain": ("tp1packed", "pp2", "tp2dp2sp"),
}
CASES = [
    pytest.param(
        *case.values, scenario, marks=case.marks or _slow(case.values[0] not in QUICK.get(scenario, case.values))
    )
    for case in LAYOUTS
    for scenario in SCENARIOS
]
VIEWS = ["view_full", "view_by_domain", "view_top_k", "view_self"]
VIEW_CASES = [pytest.param(name, marks=_slow(name in ("tp2sp", "pp2", "tp4"))) for name in VIEW_LAYOUTS]

# Losses, KLs and entropies are O(1) and summed in another order; gradient norms carry the same relative error.
ABSOLUTE, RELATIVE = 2e-5, 2e-5


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, run_ranks) -> dict:
    """What the selected tests compare, trained in one launch for each number of ranks."""
    wanted = {"tp1"} | {name for (name,) in selected(request, "layout") | selected(request, "pair")}
    scenarios = selected(request, "layout", "scenario") | {
        ("tp1", name) for name in [*SCENARIOS, *VIEWS, "episodes", "ema"]
    }
    results = {}
    for ranks, names in RUNS.items():
        output = tmp_path_factory.mktemp("training") / f"{ranks}.json"
        if present := [
            f"{name}={','.join(sorted(scenario for layout, scenario in scenarios if layout == name))}"
            for name in names
            if name in wanted
        ]:
            run_ranks("training_worker.py", ranks, output, *present)
            results |= json.loads(output.read_text())
    return results


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "scenario"), CASES)
def test_losses_and_gradient_norms_do_not_depend_on_the_layout(runs, layout, scenario):
    _assert_rows_agree(runs[f"{layout}/{scenario}"], runs[f"tp1/{scenario}"])


@pytest.mark.dist
@pytest.mark.parametrize("pair", PAIRS)
def test_a_teacher_of_another_layout_gives_the_same_distillation(runs, pair):
    scenario = "opd_by_domain" if "+" in pair else "opd"
    _assert_rows_agree(runs[f"{pair}/{scenario}"], runs[f"tp1/{scenario}"])


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["ep2", "tp2sp", "cp2"])
def test_moe_losses_and_loads_agree_under_expert_sequence_and_context_parallelism(runs, layout):
    _assert_rows_agree(runs[f"{layout}/moe"], runs["tp1/moe"])


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["tp2sp", "pp2", "cp2", "ep2", "dp2"])
def test_load_balancing_loss_gradients_and_expert_load_do_not_depend_on_the_layout(runs, layout):
    _assert_rows_agree(runs[f"{layout}/balanced"], runs["tp1/balanced"])
    plain = [row["grad_norm"] for row in runs["tp1/moe"]]
    first = runs["tp1/balanced"][0]
    assert abs(first["grad_norm"] / plain[0] - 1) > 1e-4  # the loss takes part
    assert first["moe/aux_loss"] > 1 and 1 < first["moe/load_max_over_mean"] < 4 and first["moe/dropped_tokens"] == 0


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout",
    [
        "tp2sp",
        "pp2",
        "cp2",
        "ep2",
        "dp2",
        "tp1packed",
        "tp2sppacked",
        pytest.param("pp2packed", marks=pytest.mark.slow),
    ],
)
def test_replayed_experts_do_not_depend_on_the_layout(runs, layout):
    """Experts that no router chose, so that a token with another one's experts changes losses and gradients."""
    _assert_rows_agree(runs[f"{layout}/replayed"], runs["tp1/replayed"])
    first = runs["tp1/replayed"][0]
    assert 0.4 < first["moe/replayed_agreement_min"] <= first["moe/replayed_agreement"] < 0.6  # chance: 2 of 4 experts
    # The old log-probabilities replayed the same experts.
    assert first["ratio_min"] == pytest.approx(1, abs=1e-5) == first["ratio_max"] and first["grad_norm"] > 0.01


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_cached_distributions_do_not_depend_on_the_layout(runs, layout):
    for mine, reference in zip(runs[f"{layout}/scores"], runs["tp1/scores"], strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5)
    for kind, rows in runs[f"{layout}/cached"].items():
        for mine, reference in zip(rows, runs["tp1/cached"][kind], strict=True):
            np.testing.assert_allclose(mine, reference, atol=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize("scenario", VIEWS)
@pytest.mark.parametrize("layout", VIEW_CASES)
def test_a_teacher_with_a_view_of_its_own_gives_the_loss_and_gradient_of_float64(runs, layout, scenario):
    """Prompts of other lengths, so that teacher and student never have a response at the same positions."""
    first, expected = runs[f"{layout}/{scenario}"][0], runs["tp1/float64"][scenario]
    assert first["loss"] == pytest.approx(expected["loss"], rel=0, abs=1e-5)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    _assert_rows_agree(runs[f"{layout}/{scenario}"], runs[f"tp1/{scenario}"])  # of both updates


@pytest.mark.dist
@pytest.mark.parametrize("layout", VIEW_CASES)
def test_scores_of_a_teacher_with_a_view_of_its_own_are_those_of_float64(runs, layout):
    for mine, expected in zip(runs[f"{layout}/view_sampled"], runs["tp1/float64"]["view_sampled"], strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "scenario"), [(layout, "episodes") for layout in ("tp2sp", "pp2", "dp2")])
def test_episodes_rewards_and_updates_do_not_depend_on_the_layout(runs, layout, scenario):
    result, expected = runs[f"{layout}/{scenario}"], runs["tp1/episodes"]
    assert result["episodes"].keys() == expected["episodes"].keys() and len(expected["episodes"]) == 18
    for name, (tokens, mask, reward) in expected["episodes"].items():
        assert result["episodes"][name][:2] == [tokens, mask] and result["episodes"][name][2] == pytest.approx(reward)
    # The engine's log-probabilities differ from the trainer's by rounding, which the histogram shows.
    rows, expected_rows = (
        [{name: value for name, value in row.items() if "hist" not in name} for row in which["rows"]]
        for which in (result, expected)
    )
    _assert_rows_agree(rows, expected_rows)


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "scenario"), [(layout, "episodes") for layout in ("tp1", "tp2sp", "pp2", "dp2")])
def test_numbers_at_observations_change_no_bit_of_an_update(runs, layout, scenario):
    plain, spoiled = runs[f"{layout}/{scenario}"]["rows"]
    assert plain == spoiled and plain["grad_norm"] > 0.01
    masks = [mask for _, mask, _ in runs[f"{layout}/{scenario}"]["episodes"].values()]
    assert sum("True, False" in str(mask) for mask in masks) > 6  # several turns


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "scenario"), [(layout, "episodes") for layout in ("tp2sp", "pp2", "dp2")])
def test_validation_decides_alike_at_every_layout(runs, layout, scenario):
    result, expected = runs[f"{layout}/validation"], runs["tp1/validation"]
    assert result["ended"] == expected["ended"] and result["reasons"] == expected["reasons"]
    assert any(expected["ended"]) and not all(expected["ended"])
    for mine, theirs in zip(result["data"], expected["data"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)
    assert len({data["reward"] for data in expected["data"]}) > 1  # the updates changed the responses


@pytest.mark.dist
@pytest.mark.parametrize(("layout", "scenario"), [(layout, "ema") for layout in ("tp1", "tp2sp", "dp2")])
def test_a_student_taught_by_its_moving_average_resumes_with_the_same_bits(runs, layout, scenario):
    result = runs[f"{layout}/{scenario}"]
    assert result["resumed"] == result["rows"][2:] and result["same_bits"]
    assert result["error"] < 1e-6 and result["moved"] > 1e-3  # float32 against float64; the student is elsewhere
    _assert_rows_agree(result["rows"][:2], runs["tp1/ema"]["rows"][:2])


@pytest.mark.dist
def test_training_moved_the_model(runs):
    """Equal losses of a model that does not move would prove nothing."""
    for scenario in ("supervised", "opd", "forward_kl"):
        losses = [row["loss"] for row in runs[f"tp1/{scenario}"]]
        assert losses[-1] < losses[0] - 1e-3


@pytest.mark.dist
def test_gspo_clips_whole_responses_and_is_rewarded_for_entropy(runs):
    first = runs["tp1/gspo"][0]
    assert 0.1 < first["clip_fraction_low"] < 0.9 and 0.1 < first["clip_fraction_high"] < 0.9
    assert 0.7 < first["ratio_min"] < 1 < first["ratio_max"] < 1.4
    assert first["loss/entropy"] == pytest.approx(-0.1 * first["entropy"], rel=0.05) and first["entropy"] > 1


@pytest.mark.dist
def test_mismatch_with_the_rollout_engine_is_measured(runs):
    for scenario in ("grpo", "opd"):
        first = runs[f"tp1/{scenario}"][0]
        assert (
            0.01 < first["mismatch/log_prob_abs_diff_mean"] < first["mismatch/log_prob_abs_diff_max"] < 0.11
            and first["mismatch/k3_kl"] > 1e-5
        )
        assert sum(share for name, share in first.items() if name.startswith("mismatch/hist/")) == pytest.approx(1)


def _assert_rows_agree(mine: list[dict], reference: list[dict]) -> None:
    assert len(mine) == len(reference)
    for row, expected in zip(mine, reference, strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            assert row[name] == pytest.approx(expected[name], rel=RELATIVE, abs=ABSOLUTE), name
