"""Cuts what happens in this process into phases, and counts each: memory of the allocator, and what the stub counts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_s2d.measure.measurement import OutOfMemory, PhaseCall
from megatron_s2d.measure.stub import Counts, Stub
from megatron_s2d.parallel.out_of_memory import describe


@dataclasses.dataclass
class _Open:
    """A phase that has begun."""

    phase: str
    held_bytes: int
    peak_bytes: int = 0
    reserved_bytes: int = 0
    micro_batches: int = 0
    counts: Counts = dataclasses.field(default_factory=Counts)


class Recorder:
    """Phases may be nested: what happens in the inner one does not count for the outer one, except its memory."""

    def __init__(self, stub: Stub):
        self.calls: list[PhaseCall] = []
        self.step = 0
        self.out_of_memory: OutOfMemory | None = None
        self._stub = stub
        self._open: list[_Open] = []
        stub.trace(True)
        stub.take()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as a call of phase ``name``; a phase inside itself is one call."""
        if self._open and self._open[-1].phase == name:
            yield
            return
        self._flush()
        self._open.append(_Open(name, torch.cuda.memory_allocated()))
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.out_of_memory is None:
                found = describe(error)
                self.out_of_memory = OutOfMemory(name, found.tensor, found.line, found.message)
            raise
        finally:
            self._flush()
            self._close(self._open.pop())

    def wrap[**P, R](self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """Return ``function`` as a phase."""

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.phase(name):
                return function(*args, **kwargs)

        return wrapped

    def count_micro_batches(self, count: int) -> None:
        """Say how many micro-batches the open phase runs."""
        if self._open:
            self._open[-1].micro_batches += count

    def _flush(self) -> None:
        """Give what happened since the last boundary to the innermost phase, and its peak to those around it."""
        counts = self._stub.take()
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        for item in self._open:
            item.peak_bytes = max(item.peak_bytes, peak)
            item.reserved_bytes = max(item.reserved_bytes, reserved)
        if self._open:
            _add(self._open[-1].counts, counts)

    def _close(self, item: _Open) -> None:
        counts = item.counts
        self.calls.append(
            PhaseCall(
                item.phase,
                self.step,
                item.held_bytes,
                item.peak_bytes,
                item.reserved_bytes,
                torch.cuda.host_memory_stats().get("allocated_bytes.current", 0),
                item.micro_batches,
                counts.launches,
                counts.waits,
                tuple(counts.products),
                tuple(counts.collectives),
                tuple(counts.overlapped),
                tuple(counts.copies),
                counts.moved,
            )
        )


def _add(total: Counts, part: Counts) -> None:
    for name in ("launches", "waits", "moved"):
        sums = getattr(total, name)
        for key, count in getattr(part, name).items():
            sums[key] = sums.get(key, 0) + count
    moved = ("count", "bytes")
    for name, summed in (("products", ("count",)), ("collectives", moved), ("overlapped", moved), ("copies", moved)):
        setattr(total, name, _merge(getattr(total, name) + getattr(part, name), summed))


def _merge(items: list[Any], summed: tuple[str, ...]) -> list[Any]:
    """Return one entry for each kind of call; the fields of ``summed`` are added."""
    merged: dict[tuple, Any] = {}
    for item in items:
        key = tuple(value for name, value in vars(item).items() if name not in summed)
        known = merged.get(key)
        if known is not None:
            item = dataclasses.replace(item, **{name: getattr(known, name) + getattr(item, name) for name in summed})
        merged[key] = item
    return list(merged.values())
