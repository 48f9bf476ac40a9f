"""A progress bar with bytes a second on a terminal, one line per part elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[int], None]
Report = Callable[[str, int], contextlib.AbstractContextManager[Advance]]
"""Called with a description and the number of bytes to come; the block gets a function that takes byte counts."""


@contextlib.contextmanager
def silent(description: str, total: int) -> Iterator[Advance]:
    """No output; for use as a library and in tests."""
    yield lambda count: None


@contextlib.contextmanager
def bar(description: str, total: int) -> Iterator[Advance]:
    """A bar on the standard error stream."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
