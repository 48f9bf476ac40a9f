"""The memory estimate of ``s2d plan`` against torch allocations: persistent within 2 %, total within 10 %.

docs/preflight.md promises 10 % and 20 %; these tighter bounds catch an estimate that no longer follows the code.
"""

import json

import pytest

CASES = {
    1: ["dense-full", "dense-bf16", "moe", "opd", "generate"],
    2: ["tp2sp", "pp2", "dp2", "ep2"],
}


@pytest.mark.dist
# tests/cuda_stub compares layouts of several ranks with what the allocator of CUDA reports.
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_estimates_agree_with_what_is_allocated(tmp_path, run_ranks, ranks):
    output = tmp_path / "rows.json"
    run_ranks("memory_worker.py", ranks, "--cases", *CASES[ranks], "--json", output)
    rows = json.loads(output.read_text())
    assert {row["case"] for row in rows} == set(CASES[ranks])
    for row in rows:
        assert abs(row["persistent_error"]) < 0.02, row
        assert abs(row["peak_error"]) < 0.15, row
        assert abs(row["total_error"]) < 0.10, row
        assert row["peak"] > 0.2 * row["persistent"], row  # otherwise the total would not test the peak
