"""Host copies share segments of powers of two, which PyTorch's host allocator would otherwise make of each of them."""

import itertools

import pytest
import torch

from megatron_s2d.parallel.pinned import pinned_like, place

MIB = 1 << 20


@pytest.mark.parametrize(
    "sizes",
    [[593 * MIB] * 3 + [24 * MIB] * 84, [600 * MIB] * 7, [3 * MIB], [1 << 20], [5000 * MIB, 1], [4, 8, 12]],
    ids=["an embedding and layers", "equal tensors", "one", "a power of two", "larger than a segment", "tiny"],
)
def test_segments_are_powers_of_two_that_waste_little(sizes):
    segments, places = place(sizes)
    taken = sorted((number, offset, offset + size) for size, (number, offset) in zip(sizes, places, strict=True))
    for (number, _, stop), (other, start, _) in itertools.pairwise(taken):
        assert number != other or stop <= start, "tensors overlap"
    for number, _, stop in taken:
        assert stop <= segments[number].size
    assert all(segment.size & (segment.size - 1) == 0 for segment in segments)
    rounded = sum(1 << (size - 1).bit_length() for size in sizes)
    assert sum(segment.size for segment in segments) <= max(MIB, rounded)


def test_many_tensors_take_little_more_than_their_bytes():
    sizes = [593 * MIB] * 3 + [24 * MIB, 13 * MIB, 9 * MIB] * 28
    segments, _ = place(sizes)
    assert sum(segment.size for segment in segments) < 1.05 * sum(sizes)


def test_copies_have_the_shapes_and_types_of_their_tensors():
    tensors = [torch.randn(3, 5), torch.arange(7), torch.randn(2, 2, dtype=torch.bfloat16), torch.zeros(0, 4)]
    copies = pinned_like(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        copy.copy_(tensor)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor)
