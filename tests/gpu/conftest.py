"""These checks need a CUDA device, most of them Transformer Engine as well; elsewhere they are skipped and say why."""

from pathlib import Path

import pytest
import torch

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import build_layout, initialize_distributed

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


@pytest.fixture(scope="session")
def transformer_engine():
    """Skips where Transformer Engine does not import."""
    if not device.capabilities().transformer_engine:
        pytest.skip("Transformer Engine does not import")
