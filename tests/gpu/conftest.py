"""Checks that need a CUDA device (FP8: Transformer Engine too); skipped with the reason elsewhere.

They use the available layers: Transformer Engine, else Megatron-Core local layers.
"""

from pathlib import Path

import pytest
import torch

from megatron_s2d.config.parallel import ParallelConfig
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
