"""Fixtures of the tests of served engines; imports that need torch are inside, because some tests run without."""

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
def servers():
    from fake_sglang import FakeServer
    from served_helpers import VOCAB_SIZE

    fakes = [FakeServer(np.zeros((VOCAB_SIZE, 4), np.float32)) for _ in range(2)]
    yield fakes
    for server in fakes:
        server.close()
