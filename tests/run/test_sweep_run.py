"""A sweep as a user runs it: real runs, one invalid point, and a second call that reuses the results."""

import csv

import yaml
from s2d import SMOKE, s2d, s2d_here


def test_sweep_runs_resumes_and_reports(tmp_path):
    sweep = {
        "name": "sizes",
        "workflow": str(SMOKE),
        "set": {
            "arms": {"base": "student_base"}, "contrasts": [], "stages.student_base.steps": 6,
            "evaluation.samples_per_prompt": 1,
        },
        "grid": {"size": {"values": {
            "small": {"models.student.hidden_size": 48},
            "broken": {"evaluation.sampling.max_response_length": 900},
        }}},
        "efficiency": [{"axis": "size", "stage": "student_base"}],
    }  # fmt: skip
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(sweep))
    first = s2d("sweep", path, "--out", out)
    assert first.returncode == 1, first.stderr
    assert "size-broken_seed-1: FAILED: evaluation of student_base" in first.stdout
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["size"] for row in rows] == ["small"]
    assert float(rows[0]["tokens_per_second"]) > 0 and int(rows[0]["peak_bytes"]) > 100 << 20
    assert float(rows[0]["final_loss"]) > 0 and rows[0]["mfu"] == ""
    written = (out / "size-small_seed-1" / "results.json").stat().st_mtime_ns
    second = s2d_here("sweep", path, "--out", out)  # starts no run
    assert "] size-small_seed-1: finished" in second.stdout
    assert (out / "size-small_seed-1" / "results.json").stat().st_mtime_ns == written
    assert "Failed points" in (out / "results.html").read_text()
