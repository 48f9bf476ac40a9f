"""The preloaded CUDA stub as Python sees it: its counters, and the line of Python that each wait comes from."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import sys
import threading

from megatron_s2d.measure.build_stub import LIBRARY_NAME
from megatron_s2d.parallel.out_of_memory import MODEL_CODE, line_of

_WAIT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@dataclasses.dataclass(frozen=True)
class Product:
    """Calls of one matrix product, column-major as cuBLAS sees it; types as in ``bf16`` and ``f32``."""

    function: str
    m: int
    n: int
    k: int
    a: str
    b: str
    c: str
    compute: str
    accumulates: bool  # added to what is there
    batch: int
    count: int

    @property
    def flops(self) -> int:
        """Operations of all calls."""
        return 2 * self.m * self.n * self.k * self.batch * self.count


@dataclasses.dataclass(frozen=True)
class Collective:
    """Calls of one kind of collective over groups of one size; bytes: of the larger side, over all calls."""

    kind: str
    ranks: int
    dtype: str
    count: int
    bytes: int
    begun_before: bool = False  # of overlapped ones: in an earlier phase


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies between host and device. kind: ``to device`` or ``to host``, and whether pageable memory blocked it."""

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass
class Counts:
    """What the stub counted: since the last ``take``, or summed."""

    launches: dict[str, int] = dataclasses.field(default_factory=dict)  # kernel -> launches
    waits: dict[str, int] = dataclasses.field(default_factory=dict)  # line -> waits of the host for the device
    products: list[Product] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    overlapped: list[Collective] = dataclasses.field(default_factory=list)  # of them: see ``PhaseCall``
    copies: list[Copies] = dataclasses.field(default_factory=list)
    moved: dict[str, int] = dataclasses.field(default_factory=dict)  # PyTorch operator -> bytes of its tensors


class Stub:
    """The stub library in this process, which must have been preloaded."""

    def __init__(self, *, devices: int = 8, device_gib: float = 79.1):
        """Configure the devices; call it before CUDA is used."""
        self._library = ctypes.CDLL(LIBRARY_NAME)
        if not hasattr(self._library, "stub_take"):
            raise RuntimeError(f"{LIBRARY_NAME} is NVIDIA's driver, not the stub: start the process with LD_PRELOAD")
        self._library.stub_take.restype = ctypes.c_char_p
        self._library.stub_configure(ctypes.c_int(devices), ctypes.c_double(device_gib), ctypes.c_size_t(4 << 20))
        self._waits: collections.Counter[str] = collections.Counter()
        self._moved: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._callback = _WAIT_CALLBACK(self._on_wait)  # must live as long as the library calls it
        self._library.stub_on_wait(self._callback)

    def trace(self, on: bool) -> None:
        """Count from now on, or stop."""
        self._library.stub_trace(ctypes.c_bool(on))

    def count(self, operation: str, *, launches: int, waits: int) -> None:
        """Count what an operation would have done that was computed on the host instead."""
        self._library.stub_count(operation.encode(), ctypes.c_long(launches), ctypes.c_long(waits))

    def count_moved(self, operation: str, size: int) -> None:
        """Count the bytes that the kernels of a PyTorch operator read and write."""
        with self._lock:
            self._moved[operation] += size

    def take(self) -> Counts:
        """Return the counts since the last call, and start again from zero."""
        with self._lock:
            waits, self._waits = dict(self._waits), collections.Counter()
            moved, self._moved = dict(self._moved), collections.Counter()
        launches = {name: count for name, count, _ in self._rows("launches")}
        products = []
        for key, count, _ in self._rows("products"):
            function, m, n, k, a, b, c, compute, accumulates, batch = key.split("\t")
            sizes = (int(m), int(n), int(k))
            products.append(Product(function, *sizes, a, b, c, compute, accumulates == "1", int(batch), count))
        collectives, overlapped = self._collectives("collectives"), self._collectives("overlapped")
        copies = [Copies(kind, count, size) for kind, count, size in self._rows("copies")]
        return Counts(launches, waits, products, collectives, overlapped, copies, moved)

    def _collectives(self, table: str) -> list[Collective]:
        rows = []
        for key, count, size in self._rows(table):
            kind, ranks, dtype, *begun = key.split("\t")
            rows.append(Collective(kind, int(ranks), dtype, count, size, begun == ["before"]))
        return rows

    def _rows(self, kind: str) -> list[tuple[str, int, int]]:
        rows = []
        for line in self._library.stub_take(kind.encode()).decode().splitlines():
            key, count, size = line.rsplit("\t", 2)
            rows.append((key, int(count), int(size)))
        return rows

    def _on_wait(self, call: bytes) -> None:
        """Called by the library in the thread that waits."""
        line = f"{line_of(sys._getframe(1), MODEL_CODE)}: {call.decode()}"
        with self._lock:
            self._waits[line] += 1
