"""File objects for ``torch.save`` (hashes what it writes) and ``torch.load`` (a slice of a file), and a prefetcher."""

from __future__ import annotations

import hashlib
import io
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_s2d.models.tensor_files import BLOCK_BYTES

_WINDOW = 64 * 2**20  # bytes of a written file that may stay in the page cache


def read_ahead[T](items: Iterator[T], depth: int = 1) -> Iterator[T]:
    """Yield ``items``, computed by a second thread up to ``depth`` items ahead.

    An exception of the iterator is raised here; if the generator is closed early, the thread ends at its next item.
    """
    prefetched: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, T | BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                prefetched.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
                del item
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = prefetched.get()
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
    """A file that is written once, from start to end, and records its length and SHA-256.

    A second thread hashes contents while they are written.
    """

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._dropped_to = 0
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
                self._drop_from_cache(self.length + done)
        finally:
            # The caller may reuse the buffer after this returns.
            hashed.result()
        self.length += len(view)
        return len(view)

    def _drop_from_cache(self, position: int) -> None:
        """Tell the kernel to write the last window to disk and to drop the one before from the page cache.

        Otherwise a conversion would evict everything else from memory, and mostly wait for free pages.
        """
        if position - self._dropped_to >= _WINDOW:
            start = max(0, self._dropped_to - _WINDOW)
            os.posix_fadvise(self._file.fileno(), start, position - start, os.POSIX_FADV_DONTNEED)
            self._dropped_to = position

    def flush(self) -> None:
        """Do nothing, as nothing is buffered; ``torch.save`` calls it."""

    def close(self) -> None:
        """Close the file; its digest is complete."""
        self._hasher.shutdown()
        self._file.close()


class FileSlice(io.RawIOBase):
    """Bytes [start, start + length) of a file as a separate file object."""

    def __init__(self, path: Path, start: int, length: int):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
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
