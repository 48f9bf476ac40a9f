"""Rotations of heads, of packed sequences too, equal Megatron's own; so do their gradients."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_s2d.models.rope import packed_positions, rotate, rotate_packed, use_own_rotation
from megatron_s2d.parallel.context_parallel import cp_positions

# Megatron's function, not the one that a model that was built before has installed.
SOURCE = "megatron.core.models.common.embeddings.rope_utils"


@pytest.fixture
def megatrons(monkeypatch):
    import importlib.util

    spec = importlib.util.find_spec(SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def group(size: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[8, 24, 16], [8], [64, 8, 8, 8]])
def test_packed_rotation_equals_megatrons(megatrons, cp_size, lengths):
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    angles = torch.randn(max(lengths) + 3, 1, 1, 6).repeat(1, 1, 1, 2)
    for rank in range(cp_size):
        heads = torch.randn(sum(lengths) // cp_size, 3, 12)
        expected = megatrons._apply_rotary_pos_emb_thd(heads, cu_seqlens, angles, cp_group=group(cp_size, rank))
        rotated = rotate_packed(heads, cu_seqlens, angles, cp_group=group(cp_size, rank))
        torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-6)
        positions = packed_positions(cu_seqlens, len(heads), cp_size, rank)
        starts = torch.repeat_interleave(cu_seqlens[:-1], torch.tensor(lengths) // cp_size)
        assert torch.equal(positions + starts, torch.from_numpy(cp_positions(cu_seqlens.tolist(), cp_size))[rank])


@pytest.mark.parametrize("mscale", [1.0, 1.3])
def test_rotation_and_its_gradient_equal_megatrons(megatrons, mscale):
    torch.manual_seed(0)
    angles = torch.randn(7, 1, 1, 5, dtype=torch.float64).repeat(1, 1, 1, 2)
    heads, upstream = torch.randn(2, 7, 3, 4, 10, dtype=torch.float64)
    results = []
    for function in (rotate, megatrons._apply_rotary_pos_emb_bshd):
        leaf = heads.clone().requires_grad_()
        rotated = function(leaf, angles, rotary_interleaved=False, mla_rotary_interleaved=False, mscale=mscale)
        rotated.backward(upstream)
        results.append((rotated.detach(), leaf.grad))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-13, atol=1e-13)


def test_models_use_these_rotations():
    use_own_rotation()
    assert rope_utils._apply_rotary_pos_emb_thd is rotate_packed
    assert rope_utils._apply_rotary_pos_emb_bshd is rotate
