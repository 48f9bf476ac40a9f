"""One uninterrupted smoke run, which the tests of this folder compare with."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory) -> Path:
    from s2d import SMOKE, s2d

    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    finished = s2d("run", SMOKE, "--out", run_dir)
    assert finished.returncode == 0, finished.stderr
    return run_dir
