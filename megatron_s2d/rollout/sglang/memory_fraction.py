"""The share of a GPU's memory that a started SGLang server takes. No torch here.

SGLang 0.5.17 takes ``--mem-fraction-static`` of the memory that is free when a server starts for weights and KV cache;
the rest of it is left to activations, CUDA graphs and whoever else uses the GPU (``kv_cache_configurator.py`` there).
"""

from __future__ import annotations

import dataclasses
import math

OPTION = "--mem-fraction-static"
_LARGEST = 0.95


@dataclasses.dataclass(frozen=True)
class ServerMemory:
    """Memory of one server on each of its GPUs, in bytes; ``estimate/server_memory.py`` finds it."""

    model: str  # entry of `models`
    weights: int
    static: int  # weights and KV cache
    beside: int  # of the trainer while the server has its memory; 0 on other GPUs

    def fraction(self, free: int) -> float:
        """Return SGLang's option for a server that starts with ``free`` bytes, rounded down to three digits."""
        return math.floor(1000 * min(_LARGEST, self.static / free)) / 1000
