"""The rotation of packed sequences equals Megatron's own, which rotates each sequence by itself."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_s2d.models.rope import packed_positions, rotate_packed
from megatron_s2d.parallel.context_parallel import cp_positions

# Megatron's function, not the one that a model that was built before has installed.
SOURCE = "megatron.core.models.common.embeddings.rope_utils"


@pytest.fixture
def megatrons(monkeypatch):
    import importlib.util

    spec = importlib.util.find_spec(SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._apply_rotary_pos_emb_thd


def group(size: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[8, 24, 16], [8], [64, 8, 8, 8]])
def test_rotation_equals_megatrons_bit_for_bit(megatrons, cp_size, lengths):
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    angles = torch.randn(max(lengths) + 3, 1, 1, 6).repeat(1, 1, 1, 2)
    for rank in range(cp_size):
        heads = torch.randn(sum(lengths) // cp_size, 3, 12)
        expected = megatrons(heads, cu_seqlens, angles, cp_group=group(cp_size, rank))
        assert torch.equal(rotate_packed(heads, cu_seqlens, angles, cp_group=group(cp_size, rank)), expected)
        positions = packed_positions(cu_seqlens, len(heads), cp_size, rank)
        starts = torch.repeat_interleave(cu_seqlens[:-1], torch.tensor(lengths) // cp_size)
        assert torch.equal(positions + starts, torch.from_numpy(cp_positions(cu_seqlens.tolist(), cp_size))[rank])


def test_models_rotate_without_waits():
    from megatron_s2d.models.rope import use_rotation_without_waits

    use_rotation_without_waits()
    assert rope_utils._apply_rotary_pos_emb_thd is rotate_packed
