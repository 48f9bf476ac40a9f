"""A wheel, built from the checkout and unpacked elsewhere: configs and recipes are inside, commands work without it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_directory(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path / "wheel"), str(ROOT)], check=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = set(archive.namelist())
    for name in ("configs/quickstart.yaml", "configs/papers/s2d/stages.yaml", "recipes/opd.yaml", "conversion/cli.py"):
        assert f"megatron_s2d/{name}" in names
    assert not [name for name in names if name.startswith(("tests/", "configs/", "docs/"))]
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}

    def s2d(*arguments):
        command = [sys.executable, "-P", "-m", "megatron_s2d.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "empty", env=environment)

    planned = s2d("run", "configs/smoke.yaml", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "stages/rl_teacher" in planned.stdout
    missing = s2d("run", "configs/nothing.yaml", "--dry-run")
    assert missing.returncode == 1 and "configs/nothing.yaml" in missing.stderr
    asked = s2d("init", "my.yaml", "--recipe", "opd")
    assert asked.returncode == 1 and "give --student" in asked.stderr
