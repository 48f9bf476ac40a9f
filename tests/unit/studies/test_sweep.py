"""Sweeps: the points of a grid, which of them run, and results from runs with known numbers."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from megatron_s2d.artifacts.files import atomic_write_json
from megatron_s2d.config.base import dump
from megatron_s2d.config.sweep import load_sweep
from megatron_s2d.errors import UserError
from megatron_s2d.studies.sweep import expand_points, print_points, run_sweep, unfinished_points
from megatron_s2d.studies.sweep_report import write_sweep
from megatron_s2d.studies.sweep_results import collect_sweep
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.status import Interrupted

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"
ARM = "direct_student_grpo"
PROBLEMS = 200
SHORT = {"arms": {ARM: "student_grpo"}, "contrasts": []}  # each point has two stages and an evaluation


def sweep_file(tmp_path, **changes) -> Path:
    document = {
        "name": "test",
        "workflow": str(SMOKE),
        "set": SHORT,
        "grid": {
            "labels": {"key": "data.pool.num_prompts", "values": [64, 128, 256]},
            "layout": {"values": {"one": {}, "two": {"parallel.data_parallel_size": 2}}},
        },
        "seeds": [1, 2],
        "contrasts": [{"a": {"labels": 256}, "b": {"labels": 64}, "arm": ARM}],
        "fits": [{"x": "labels", "y": "error", "arm": ARM}, {"x": "labels", "y": "loss", "arm": ARM}],
        "efficiency": [{"axis": "layout", "stage": "student_grpo"}],
        "gpu": "h200",
    } | changes
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=400)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(sweep, directory) with every point finished."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep = load_sweep(sweep_file(folder))
    points = run_sweep(sweep, folder / "out", Console(file=io.StringIO()), write_finished_run)
    assert not unfinished_points(points, folder / "out")
    return sweep, folder / "out"


def write_finished_run(point, run_dir, console):
    """Write the files of a finished run: errors 8 / labels, losses 2 / labels, 100 or 180 tokens/s."""
    labels, ranks = int(point.choice["labels"]), point.config.parallel.world_size
    for job in make_plan(point.config, run_dir):
        job.directory.begin(job.resolved, job.inputs, {})
        job.directory.finish({"key": job.key, "seconds": 10.0, "outputs": {}, "peak_memory": 1 << 30})
        if job.is_stage:
            speed = 100.0 if ranks == 1 else 180.0
            seconds = 200 / speed  # a step has 200 tokens
            rows = [
                {"step": n, "loss": 2 / labels, "timing_s/step": seconds if n > 1 else 9.0, "tokens_per_second": speed}
                for n in range(1, 5)
            ]
            job.directory.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            wrong = PROBLEMS * 8 // labels
            rows = [
                {"problem_id": f"p{n}", "domain": "d", "rewards": [float(n >= wrong)] * 4, "response_lengths": [3] * 4,
                 "finish_reasons": ["stop"] * 4}
                for n in range(PROBLEMS)
            ]  # fmt: skip
            (job.directory.path / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    atomic_write_json(run_dir / "config.json", dump(point.config))
    atomic_write_json(run_dir / "results.json", {})


def test_points_are_the_product_of_axes_and_seeds_with_their_settings(tmp_path):
    points = expand_points(load_sweep(sweep_file(tmp_path, set=SHORT | {"evaluation.samples_per_prompt": 8})))
    assert len(points) == 12 and len({point.name for point in points}) == 12
    point = next(point for point in points if point.name == "labels-128_layout-two_seed-2")
    assert point.config.data["pool"].num_prompts == 128
    assert point.config.parallel.data_parallel_size == 2
    assert point.config.seed == 2 and point.config.evaluation.samples_per_prompt == 8


def test_failures_are_listed_and_other_points_run(tmp_path, console):
    sweep, out = load_sweep(sweep_file(tmp_path)), tmp_path / "out"
    ran = []

    def run(point, run_dir, console):
        ran.append(point.name)
        if point.choice == {"labels": "128", "layout": "one"}:
            raise UserError("out of memory")
        write_finished_run(point, run_dir, console)

    failed = unfinished_points(run_sweep(sweep, out, console, run), out)
    names = ["labels-128_layout-one_seed-1", "labels-128_layout-one_seed-2"]
    assert len(ran) == 12 and failed == dict.fromkeys(names, "out of memory")
    # The second sweep runs only the points that failed.
    ran.clear()
    points = run_sweep(sweep, out, console, lambda *a: (ran.append(a[0].name), write_finished_run(*a)))
    assert sorted(ran) == names and not unfinished_points(points, out)
    assert not (out / ran[0] / "failure.txt").exists()


def test_changed_point_runs_again(tmp_path, console, finished):
    ran = []
    run_sweep(finished[0], finished[1], console, lambda point, *_: ran.append(point.name))
    assert not ran
    changed = load_sweep(sweep_file(tmp_path, set=SHORT | {"evaluation.samples_per_prompt": 8}))
    run_sweep(changed, finished[1], console, lambda point, *_: ran.append(point.name))
    assert len(ran) == 12


def test_interruption_ends_the_sweep(tmp_path, console):
    def run(*_):
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        run_sweep(load_sweep(sweep_file(tmp_path)), tmp_path / "out", console, run)


@pytest.fixture(scope="module")
def results(finished):
    return collect_sweep(*finished, expand_points(finished[0]), {}), finished[1]


def test_rows_have_the_numbers_of_the_runs(results):
    sweep_results, _ = results
    assert len(sweep_results.rows) == 12
    row = next(row for row in sweep_results.rows if row.point.name == "labels-64_layout-one_seed-1")
    assert row.accuracy.mean == pytest.approx(1 - 8 / 64)
    assert row.accuracy.std_err == pytest.approx(np.sqrt(0.125 * 0.875 / (PROBLEMS - 1)))
    assert row.tokens_per_second == pytest.approx(100.0) and row.ranks == 1
    assert row.peak_memory == 1 << 30
    assert row.wall_seconds == pytest.approx(20.0)  # student_base and student_grpo
    # Six operations per GEMM weight and token: attention 48 x 48 four times, MLP, output layer of 25 tokens.
    weights = 2 * (4 * 48 * 48 + 3 * 48 * 128) + 25 * 48
    assert row.mfu == pytest.approx(100 * 6 * weights / 989e12)


def test_contrasts_are_paired_and_matched(results):
    sweep_results, _ = results
    assert [dict(row.others) for row in sweep_results.contrasts] == [{"layout": "one"}, {"layout": "two"}]
    row = sweep_results.contrasts[0]
    assert row.seeds == (1, 2) and row.comparison.k == 8
    # 25 and 6 of 200 problems are wrong: 19 differ.
    assert row.comparison.difference == pytest.approx(19 / 200)
    assert row.comparison.interval[0] > 0.05


def test_laws_and_efficiencies(results):
    sweep_results, _ = results
    errors, losses = sweep_results.fits[0], sweep_results.fits[2]
    assert errors.law.exponent == pytest.approx(-1.0, abs=0.03)  # 25, 12 and 6 of 200 problems
    low, high = errors.law.interval
    assert low < -1 < high
    assert losses.fit.y == "loss"
    assert losses.law.exponent == pytest.approx(-1.0) and losses.law.scale == pytest.approx(2)
    stage, _, rows = sweep_results.efficiencies[0]
    assert stage == "student_grpo" and [row.efficiency for row in rows] == pytest.approx([1.0, 0.9])


def test_report_has_every_table_and_plot(results, console, tmp_path):
    page = write_sweep(results[0], tmp_path, console).read_text()
    assert "<script" not in page and "Matched contrasts" in page and "Power laws" in page and "strong scaling" in page
    assert page.count("data:image/png;base64,") == 1 + 4 + 3  # accuracy, laws at two layouts, efficiencies
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert len(rows) == 12 and float(rows[0]["accuracy"]) == pytest.approx(1 - 8 / 64)
    assert float(rows[0]["final_loss"]) == pytest.approx(2 / 64)
    assert (tmp_path / "results.md").read_text().startswith("# test\n")


def test_markup_is_escaped_and_mfu_needs_a_gpu(tmp_path, console, finished):
    sweep = load_sweep(sweep_file(tmp_path, description="<script>alert(1)</script>", gpu=None))
    sweep_results = collect_sweep(
        sweep, finished[1], expand_points(sweep), {"labels-64_layout-one_seed-1": "<b>out of memory</b>"}
    )
    assert len(sweep_results.rows) == 11 and all(row.mfu is None for row in sweep_results.rows)
    page = write_sweep(sweep_results, tmp_path, console).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;out of memory" in page
    assert "| n/a |" in (tmp_path / "results.md").read_text()


def test_dry_run_lists_points_with_their_checks(tmp_path, console):
    grid = {"length": {"key": "evaluation.sampling.max_response_length", "values": [8, 900]}}
    sweep = load_sweep(sweep_file(tmp_path, grid=grid, contrasts=[], fits=[], efficiency=[], seeds=[1]))
    print_points(sweep, tmp_path / "out", console)
    text = console.file.getvalue()
    assert "length-8_seed-1" in text and "new" in text
    assert "cannot run: evaluation of" in text and "exceed the 512 positions" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bse": 1}, "bse: unknown key"),
        ({"workflow": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"grid": {"a b": {"key": "seed", "values": [1]}}}, "'a b' is not a valid name of an axis"),
        ({"grid": {"a": {"values": [1]}}}, "give `key` with a list of values"),
        ({"grid": {"a": {"key": "x", "values": ["../up"]}}}, "cannot be part of a directory name"),
        ({"contrasts": [{"a": {"labels": 3}, "b": {"labels": 64}, "arm": ARM}]}, "the grid has no labels: 3"),
        ({"fits": [{"x": "layout", "y": "error", "arm": ARM}]}, "'layout' are not all positive numbers"),
        ({"efficiency": [{"axis": "depth", "stage": "opd"}]}, "the grid has no 'depth'"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        load_sweep(sweep_file(tmp_path, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wrong_keys_and_arms_name_the_point(tmp_path):
    grid = {"a": {"key": "stages.opd.stpes", "values": [1]}}
    with pytest.raises(UserError, match=r"point a 1: .*did you mean 'steps'"):
        expand_points(load_sweep(sweep_file(tmp_path, grid=grid, contrasts=[], fits=[], efficiency=[])))
    contrast = {"a": {"labels": 256}, "b": {"labels": 64}, "arm": "nobody"}
    with pytest.raises(UserError, match="no arm 'nobody'"):
        expand_points(load_sweep(sweep_file(tmp_path, contrasts=[contrast])))
