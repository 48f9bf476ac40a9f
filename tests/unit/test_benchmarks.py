"""The benchmarks run with tiny models on a CPU, and the results of the GPU script become one file and tables."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_report

MACHINE = {"torch": "2.11.0", "apex": None, "capabilities": {"device_name": "NVIDIA H200"}}
CHECKS = """<testsuites><testsuite>
<testcase name="test_a" classname="c"><properties><property name="gap" value="0.01"/></properties></testcase>
<testcase name="test_b[x]" classname="c"><skipped message="no CUDA device"/></testcase>
<testcase name="test_c" classname="c"><failure message="assert 2 &lt;= 1&#10;more">long</failure></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("training_throughput", {"tokens_per_second", "mfu", "layers", "peak_bytes"}),
        ("opd_step", {"against_sampled", "loss", "tokens_per_second"}),
        ("teacher_forward", {"gives", "tokens_per_second", "mfu"}),
        ("generation_throughput", {"tokens_per_second", "roofline"}),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU benchmarks/gpu_all.sh runs them at their sizes")
def test_benchmarks_run_on_a_cpu(name, fields, tmp_path):
    output = tmp_path / "rows.json"
    importlib.import_module(name).main(["--json", str(output)])
    rows = [row for row in json.loads(output.read_text()) if "skipped" not in row]
    assert rows and all(fields <= row.keys() and row["device"] == "CPU" for row in rows)
    assert all(row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_without_a_gpu_prints_a_one_line_error(tmp_path):
    results = tmp_path / "results.json"
    result = subprocess.run(
        [BENCHMARKS / "gpu_all.sh", results], env={**os.environ, "PYTHON": sys.executable}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and not results.exists()
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1 and "sees no CUDA device" in result.stderr


def test_time_limits_of_the_parts_sum_to_less_than_eight_minutes():
    limits = [int(line.split()[2]) for line in (BENCHMARKS / "gpu_all.sh").read_text().splitlines()
              if line.startswith("part ")]  # fmt: skip
    assert len(limits) == 7 and sum(limits) < 480


def test_results_are_one_file_with_failures_and_reasons(tmp_path, capsys):
    parts = tmp_path / "parts"
    parts.mkdir()

    def part(name: str, code: int, **files: str) -> None:
        status = {"name": name, "exit": code, "seconds": 3, "limit": 10}
        (parts / f"{name}.status.json").write_text(json.dumps(status))
        for ending, text in files.items():
            (parts / f"{name}.{ending.replace('_', '.')}").write_text(text)

    rows = [{"device": "H200", "mfu": 0.4512, "peak_bytes": 2**31, "seconds": 1.23456},
            {"device": "H200", "mfu": None, "skipped": "no Transformer Engine"}]  # fmt: skip
    part("checks", 1, xml=CHECKS, log="boom\n")
    part("training", 0, rows_json=json.dumps(rows))
    part("kl", 124, log='noise\n{"name": "ours", "seconds": 0.5}\n{"name": "cut')
    results = tmp_path / "results.json"
    assert gpu_report.main(["collect", str(parts), str(results)], machine=lambda: MACHINE) == 1
    document = json.loads(results.read_text())
    by_name = {part["name"]: part for part in document["parts"]}
    assert {name: part["outcome"] for name, part in by_name.items()} == {
        "checks": "failed", "training": "passed", "kl": "out of time",
    }  # fmt: skip
    assert [check["outcome"] for check in by_name["checks"]["checks"]] == ["passed", "skipped", "failed"]
    assert by_name["checks"]["checks"][2]["reason"] == "assert 2 <= 1" and by_name["checks"]["end_of_log"] == ["boom"]
    assert by_name["training"]["rows"] == rows and by_name["kl"]["rows"] == [{"name": "ours", "seconds": 0.5}]
    capsys.readouterr()
    assert gpu_report.main(["table", str(results)]) == 0
    printed = capsys.readouterr().out
    assert "on NVIDIA H200; torch 2.11.0." in printed and "1 passed, 1 failed, 1 skipped." in printed
    assert "| test_a | passed | gap 0.01 |" in printed and "| test_b[x] | skipped | no CUDA device |" in printed
    assert "device: H200." in printed and "| mfu | peak, GiB | seconds | skipped |" in printed
    assert "| 45.1 % | 2.00 | 1.235 |  |" in printed and "### kl: out of time (3 s)" in printed


def test_failing_part_does_not_stop_the_others(tmp_path):
    """The script with a fake interpreter: checks fail, a benchmark crashes, the others write rows."""
    fake_python = tmp_path / "python"
    fake_python.write_text(
        "#!/usr/bin/env bash\n"
        'case "$*" in\n'
        "  -c*) exit 0 ;;\n"
        f'  *gpu_report.py*) exec {sys.executable} "$@" ;;\n'
        "  *pytest*) echo broken; exit 1 ;;\n"
        "  *opd_step*) kill -SEGV $$ ;;\n"
        "esac\n"
        'while [ "$1" != --json ]; do shift; done\n'
        """echo '[{"tokens_per_second": 5}]' > "$2"\n"""
    )
    fake_python.chmod(0o755)
    results = tmp_path / "results.json"
    result = subprocess.run(
        [BENCHMARKS / "gpu_all.sh", results], env={**os.environ, "PYTHON": str(fake_python)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    parts = {part["name"]: part for part in json.loads(results.read_text())["parts"]}
    # Not in order: parts that end within one tick of the file system's clock have equal times.
    assert set(parts) == {"checks", "training", "opd_step", "teacher_forward", "memory", "generation", "kl"}
    assert {name for name, part in parts.items() if part["outcome"] != "passed"} == {"checks", "opd_step"}
    assert parts["kl"]["rows"] == [{"tokens_per_second": 5}] and parts["checks"]["end_of_log"] == ["broken"]
