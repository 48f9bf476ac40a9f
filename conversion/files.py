"""File objects for ``torch.save`` and ``torch.load`` (one hashes, one is part of a file), and reading ahead."""

from __future__ import annotations

import hashlib
import io
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megatron_s2d.models.hf_checkpoint import BLOCK_BYTES

T = TypeVar("T")

_WINDOW = 64 * 2**20  # bytes of a written file that may lie in the page cache


def read_ahead(items: Iterator[T], depth: int = 1) -> Iterator[T]:
    """``items``, made by a second thread while the last one is being used; ``depth`` of them may wait.

    An exception of the iterator is raised here, and when this is closed early the thread ends at its next item.
    """
    waiting: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def hand_over(entry: tuple[bool, T | BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not hand_over((True, item)):
                    return
                del item
            hand_over((False, None))
        except BaseException as error:
            hand_over((False, error))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = waiting.get()
            if not more:
                if item is not None:
                    raise item
                return
            yield item
            del item
    finally:
        stopped.set()
        thread.join()


class HashedFile:
    """A file that is written once, from start to end, with its length and SHA-256 kept along the way.

    Large contents are hashed by a second thread while they are written.
    """

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=0)
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._let_go_to = 0
        self.digest = hashlib.sha256()
        self.length = 0

    def write(self, content: Any) -> int:
        """Write all of ``content`` (bytes or a buffer); returns its length."""
        view = memoryview(content).cast("B")
        hashed = self._hasher.submit(self.digest.update, view)
        try:
            done = 0
            while done < len(view):
                done += self._file.write(view[done : done + BLOCK_BYTES])
                self._let_go(self.length + done)
        finally:
            # The buffer is the caller's again when this returns.
            hashed.result()
        self.length += len(view)
        return len(view)

    def _let_go(self, position: int) -> None:
        """Have the kernel start writing the last window to the disk, and drop the one before from the page cache.

        Otherwise a conversion would push everything else out of memory, and wait for fresh pages most of its time.
        """
        if position - self._let_go_to >= _WINDOW:
            start = max(0, self._let_go_to - _WINDOW)
            os.posix_fadvise(self._file.fileno(), start, position - start, os.POSIX_FADV_DONTNEED)
            self._let_go_to = position

    def flush(self) -> None:
        """Nothing is buffered; ``torch.save`` asks."""

    def close(self) -> None:
        """No more will be written."""
        self._hasher.shutdown()
        self._file.close()


class FileSlice(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file of its own."""

    def __init__(self, path: Path, start: int, length: int):
        self._file = open(path, "rb", buffering=0)
        self._start, self._length, self._position = start, length, 0
        os.posix_fadvise(self._file.fileno(), start, length, os.POSIX_FADV_SEQUENTIAL)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        done = 0
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done : done + BLOCK_BYTES]], self._start + self._position + done)
            if got == 0:
                break
            done += got
        self._position += done
        return done

    def close(self) -> None:
        self._file.close()
        super().close()
