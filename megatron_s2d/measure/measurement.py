"""What is measured of one rank, phase by phase. JSON in and out. No torch here.

A phase is what ``s2d plan`` calls a phase (prefill, decode, score, teacher, train, update), or ``build`` (models and
optimizer), ``export``, ``save`` and ``load``. Each call of a phase is a ``PhaseCall``: the first update allocates the
optimizer's state, so the last call is the steady one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_s2d.measure.stub import Collective, Copies, Product


@dataclasses.dataclass(frozen=True)
class PhaseCall:
    """One call of a phase."""

    phase: str
    step: int  # of the stage, from 1; 0 before the first
    held_bytes: int  # allocated on the device when it began
    peak_bytes: int  # allocated at most
    reserved_bytes: int  # of the caching allocator, at most: allocated blocks, cached blocks and fragmentation
    pinned_bytes: int  # host memory that is pinned when it ended
    micro_batches: int  # that it ran; 0 where there are none
    launches: Mapping[str, int]  # kernel -> launches
    waits: Mapping[str, int]  # line of the host -> waits for the device
    products: tuple[Product, ...]
    collectives: tuple[Collective, ...]
    # Collectives that a stream waited for in this call after matrix products had been queued behind them: NCCL can move
    # their bytes while the products run.
    overlapped: tuple[Collective, ...]
    copies: tuple[Copies, ...]
    # PyTorch operator -> bytes of the device tensors that it reads and writes; without matrix products and attention,
    # and without kernels that are not PyTorch's.
    moved: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def num_launches(self) -> int:
        """Kernels that were launched."""
        return sum(self.launches.values())

    @property
    def num_waits(self) -> int:
        """Times that the host waited for the device."""
        return sum(self.waits.values())

    @property
    def flops(self) -> int:
        """Operations of all matrix products; those inside attention kernels are not seen."""
        return sum(product.flops for product in self.products)


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """Where the device's memory did not suffice."""

    phase: str
    tensor: str  # what was to be allocated
    line: str  # of the project or Megatron-Core
    message: str  # PyTorch's, with the size that was asked for


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One rank of a stage."""

    stage: str
    rank: int
    world_size: int
    coordinates: Mapping[str, int]  # tp, pp, cp, dp -> rank
    num_parameters: int  # of the trained model on this rank
    device_bytes: int  # of the device
    transformer_engine: bool  # whether layers are Transformer Engine's
    calls: tuple[PhaseCall, ...]
    out_of_memory: OutOfMemory | None = None

    def call(self, phase: str) -> PhaseCall:
        """Return the last call of ``phase``; raise ``KeyError`` if there was none."""
        for call in reversed(self.calls):
            if call.phase == phase:
                return call
        raise KeyError(f"no phase {phase} among {sorted({call.phase for call in self.calls})}")

    def overlapped(self, phase: str) -> tuple[Collective, ...]:
        """Return the overlapped collectives that began in the last call of ``phase``.

        Of an update: the gathers of weights that a later call waits for. Only the first update is followed by calls.
        """
        if phase != "update":
            return tuple(item for item in self.call(phase).overlapped if not item.begun_before)
        return tuple(
            item for call in self.calls for item in call.overlapped if item.begun_before and item.kind == "AllGather"
        )

    @property
    def peaks(self) -> dict[str, int]:
        """Largest number of bytes allocated in each phase."""
        peaks: dict[str, int] = {}
        for call in self.calls:
            peaks[call.phase] = max(peaks.get(call.phase, 0), call.peak_bytes)
        return peaks

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes allocated at all."""
        return max(self.peaks.values(), default=0)

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measurement:
        """Return the measurement that ``to_json`` wrote."""
        calls = tuple(
            PhaseCall(
                **{
                    **call,
                    "products": tuple(Product(**item) for item in call["products"]),
                    "collectives": tuple(Collective(**item) for item in call["collectives"]),
                    "overlapped": tuple(Collective(**item) for item in call["overlapped"]),
                    "copies": tuple(Copies(**item) for item in call["copies"]),
                }
            )
            for call in values["calls"]
        )
        out_of_memory = values["out_of_memory"] and OutOfMemory(**values["out_of_memory"])
        return cls(**{**values, "calls": calls, "out_of_memory": out_of_memory})
