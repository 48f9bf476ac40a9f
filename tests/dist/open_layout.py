"""A layout for the length of a block: gloo groups keep threads, and a worker of many layouts would run out of them."""

import contextlib
from collections.abc import Iterator

from process_groups import free_trained_models

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.parallel.layout import Layout, build_layout


@contextlib.contextmanager
def open_layout(config: ParallelConfig) -> Iterator[Layout]:
    """Build a layout, and destroy it; models of other layouts cannot train after that."""
    layout = build_layout(config)
    try:
        yield layout
    finally:
        free_trained_models()
        layout.destroy()
