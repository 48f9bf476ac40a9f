"""Progress bar of a conversion, with bytes a second, on the standard error stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[int], None]
Report = Callable[[str, int], contextlib.AbstractContextManager[Advance]]
"""Context manager: called with a description and the total bytes; yields a function that takes byte counts."""


@contextlib.contextmanager
def silent(description: str, total: int) -> Iterator[Advance]:
    """Show nothing; for use as a library and in tests."""
    yield lambda count: None


@contextlib.contextmanager
def bar(description: str, total: int) -> Iterator[Advance]:
    """Show a bar on the standard error stream."""
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
