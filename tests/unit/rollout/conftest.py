"""Fixtures of the tests of served engines; imports that need torch are inside, because some tests run without."""

import stat
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def layout():
    from megatron_s2d.config.parallel import ParallelConfig
    from megatron_s2d.parallel.layout import build_layout, initialize_distributed

    initialize_distributed()
    return build_layout(ParallelConfig())


@pytest.fixture
def chunks(layout):
    from served_helpers import SPEC

    from megatron_s2d.models.build import build_model

    return build_model(SPEC, layout, seed=3)


@pytest.fixture
def short_pauses(monkeypatch):
    from megatron_s2d.rollout.served import server_pool

    monkeypatch.setattr(server_pool, "_FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def interpreter(tmp_path) -> Path:
    """A program in place of the interpreter with sglang: its modules are the toy server and the toy router."""
    path, here, modules = tmp_path / "interpreter", Path(__file__).parent, tmp_path / "modules"
    for package, module, toy in (
        ("sglang", "launch_server", "fake_sglang"),
        ("sglang_router", "launch_router", "fake_router"),
    ):
        (modules / package).mkdir(parents=True)
        (modules / package / "__init__.py").touch()
        (modules / package / f"{module}.py").symlink_to(here / f"{toy}.py")
    path.write_text(f'#!/bin/sh\nPYTHONPATH={modules} exec {sys.executable} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def servers():
    from fake_sglang import FakeServer
    from served_helpers import VOCAB_SIZE

    fakes = [FakeServer(np.zeros((VOCAB_SIZE, 4), np.float32)) for _ in range(2)]
    yield fakes
    for server in fakes:
        server.close()
