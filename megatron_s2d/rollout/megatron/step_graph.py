"""A step of decoding as a CUDA graph: one launch in place of hundreds, which the host could not queue fast enough.

A graph holds the addresses of its buffers, so a step that reads and writes others is captured again. Graphs share one
pool of memory and are dropped with the batch: training needs the memory between two batches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch

from megatron_s2d.errors import UserError

# Steps that must be left for a capture, which takes the host about as long as two of them.
_FEWEST_STEPS = 4


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """The one stream of all captures: cuBLAS keeps a workspace for each stream that it was used on."""
    return torch.cuda.Stream()


class StepGraph:
    """Runs a step: in new buffers as it is, which compiles kernels and connects ranks, from then on as a graph."""

    def __init__(self, *, enabled: bool):
        self._enabled = enabled
        self._is_warm = False
        self._key: int | None = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool = torch.cuda.graph_pool_handle() if enabled else None

    def buffers_moved(self) -> None:
        """Forget the graph: it would use the buffers of before."""
        self._is_warm, self._graph = False, None

    def run(self, step: Callable[[], None], num_left: int, key: int | None = 0) -> None:
        """Run ``step``; num_left: steps to the last, with this one.

        key: the number of the host that it depends on; a graph is of one number. None: it cannot be captured.
        """
        if key is None:
            step()
            return
        if key != self._key:
            self.buffers_moved()
            self._key = key
        if self._graph is None and self._enabled and self._is_warm and num_left >= _FEWEST_STEPS:
            self._graph = self._capture(step)
        if self._graph is not None:
            self._graph.replay()
            return
        step()
        self._is_warm = True

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        # Not ``torch.cuda.graph``: it waits for the device and empties the allocator's cache.
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Other threads (NCCL's watchdog, copies of checkpoints) may call what a capture forbids.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
                graph.capture_end()
            except RuntimeError as error:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"the CUDA graph of a decoded token was not captured ({reason}): set rollout.enforce_eager: true"
                ) from error
        return graph
