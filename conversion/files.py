"""Two file objects for ``torch.save`` and ``torch.load``: one that hashes what is written, one that is part of a file."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any


class HashedFile:
    """A file that is written once, from start to end, with its length and SHA-256 kept along the way."""

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=0)
        self.digest = hashlib.sha256()
        self.length = 0

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        self.digest.update(view)
        self.length += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered; ``torch.save`` asks."""

    def close(self) -> None:
        self._file.close()


class FileSlice(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file of its own."""

    def __init__(self, path: Path, start: int, length: int):
        self._file = open(path, "rb", buffering=0)
        self._start, self._length, self._position = start, length, 0

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
            got = os.preadv(self._file.fileno(), [view[done : done + 2**30]], self._start + self._position + done)
            if got == 0:
                break
            done += got
        self._position += done
        return done

    def close(self) -> None:
        self._file.close()
        super().close()
