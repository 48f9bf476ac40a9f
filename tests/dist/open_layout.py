"""A layout for the length of a block: gloo groups keep threads, and a worker of many layouts would run out of them."""

import contextlib
import gc
from collections.abc import Iterator

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.parallel.layout import Layout, build_layout


@contextlib.contextmanager
def open_layout(config: ParallelConfig) -> Iterator[Layout]:
    """Build a layout, and destroy it."""
    layout = build_layout(config)
    try:
        yield layout
    finally:
        gc.collect()  # models that are still referred to would keep the groups
        layout.destroy()
