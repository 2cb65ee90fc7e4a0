"""Stage *health*: the SHA-256 of files whose bytes come from several threads, each file's in its own order.

A thread that holds bytes of a file waits until those before them are hashed. Pieces are begun in order, so the thread
it waits for never waits for it, and the threads follow each other through the checkpoints, one piece apart.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

from ckavg.engine.reader import Files
from ckavg.health.plan import WeightFile
from ckavg.storage.base import AnyPath


class Digests:
    """Hashes of the files that are hashed on the way."""

    def __init__(self) -> None:
        self._hashes: dict[WeightFile, hashlib._Hash] = {}
        self._next: dict[WeightFile, int] = {}
        self._turn = threading.Condition()
        self._stopped = False

    def begin(self, file: WeightFile) -> None:
        """Say that a file is hashed on the way, from its first byte on."""
        self._hashes[file] = hashlib.sha256(usedforsecurity=False)
        self._next[file] = 0

    def add(self, file: WeightFile, offset: int, data: memoryview) -> None:
        """Hash bytes of a file once all before them are; nothing is done for a file that was not begun.

        Args:
            file: which one.
            offset: where in the file the bytes begin.
            data: the bytes.
        """
        if file not in self._hashes:
            return
        with self._turn:
            self._turn.wait_for(lambda: self._stopped or self._next[file] == offset)
            if self._stopped:
                return
        self._hashes[file].update(data)  # without the lock: it is this thread's turn until it says otherwise
        with self._turn:
            self._next[file] = offset + len(data)
            self._turn.notify_all()

    def stop(self) -> None:
        """Let nobody wait any longer: the reading is given up."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def results(self) -> dict[WeightFile, str]:
        """The hashes in hexadecimal, when all is read."""
        return {file: each.hexdigest() for file, each in self._hashes.items()}


def hash_file(files: Files, path: AnyPath, nbytes: int, buffer: memoryview, tell: Callable[[int], None]) -> str:
    """SHA-256 of a whole file.

    Args:
        files: this thread's open files.
        path: the file.
        nbytes: its size.
        buffer: what to read into.
        tell: called with the number of bytes after each that were read.

    Raises:
        TruncatedShardError, ReadError: it changed or cannot be read.
    """
    digest = hashlib.sha256(usedforsecurity=False)
    for offset in range(0, nbytes, len(buffer)):
        part = buffer[: min(len(buffer), nbytes - offset)]
        files.read_into(path, offset, part, on_miss=lambda: None)
        digest.update(part)
        tell(len(part))
    return digest.hexdigest()
