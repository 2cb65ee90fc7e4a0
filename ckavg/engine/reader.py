"""Stage *engine*: positional reads from checkpoint files into memory that is there already.

Reads are `pread`s into small reused buffers rather than a memory map: measured as fast from a warm page cache, where
putting pages in their place costs what the copy does, no slower cold, and a file that is cut short under the reader is
an error instead of a killed process.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from ckavg.checkpoints.pieces import overlapping, spread
from ckavg.checkpoints.run import Checkpoint
from ckavg.errors import ReadError, TruncatedShardError
from ckavg.storage.base import AnyPath
from ckavg.storage.remote import local_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckavg.engine.remote import RemoteReader

_HAS_PREADV = hasattr(os, "preadv")
_HAS_NOWAIT = _HAS_PREADV and hasattr(os, "RWF_NOWAIT")
_HAS_FADVISE = hasattr(os, "posix_fadvise")
_RESERVED = 32
_PLENTY = 1 << 16


class Files:
    """The open files of one thread, least recently used ones closed first. Not for sharing between threads.

    Args:
        threads: how many threads read at the same time; they share the process's limit on open files.
        remote: reads files that are not on this machine; None where all are.
    """

    def __init__(self, *, threads: int, remote: RemoteReader | None = None) -> None:
        self._remote = remote
        self._most = max(2, usable_handles() // threads)
        self._open: OrderedDict[AnyPath, int] = OrderedDict()
        self._can_read_cached = _HAS_NOWAIT
        self._scratch = bytearray()
        self.bytes_read = 0

    def read_elements(
        self, checkpoint: Checkpoint, name: str, start: int, buffer: memoryview, *, on_miss: Callable[[], None]
    ) -> None:
        """Fill `buffer` with the elements of a tensor from `start` on, in row-major order, wherever they lie.

        Args, errors: as of `read_into`.
        """
        entry = checkpoint.entries[name]
        item = entry.item_bytes
        if not entry.pieces:
            path = checkpoint.shards[entry.shard].path
            self.read_into(path, entry.offset + start * item, buffer, on_miss=on_miss)
            return
        for piece, first, last in overlapping(entry.pieces, start, start + len(buffer) // item):
            path, offset, size = checkpoint.shards[piece.shard].path, piece.offset + first * item, (last - first) * item
            begin = piece.position(first)
            if piece.position(last - 1) - begin == last - 1 - first:  # one row, or part of one
                place = (begin - start) * item
                self.read_into(path, offset, buffer[place : place + size], on_miss=on_miss)
                continue
            if len(self._scratch) < size:
                self._scratch = bytearray(size)
            data = memoryview(self._scratch)[:size]
            self.read_into(path, offset, data, on_miss=on_miss)
            spread(piece, first, last, data, buffer, at=start, item=item)

    def read_into(self, path: AnyPath, offset: int, buffer: memoryview, *, on_miss: Callable[[], None]) -> None:
        """Fill `buffer` with the bytes of `path` from `offset` on.

        Args:
            path: the file.
            offset: where to begin, in bytes.
            buffer: what to fill.
            on_miss: called before the reading waits for the disk, where the system can tell that it would.

        Raises:
            TruncatedShardError: the file ends before the buffer is full.
            ReadError: the system would not let us read it.
        """
        size = len(buffer)
        if self._remote is not None and self._remote.has(path):
            self._remote.read_into(path, offset, buffer)
            self.bytes_read += size
            return
        try:
            done = self._read_cached(self._handle(path), (buffer,), offset)
            if done < size:
                on_miss()  # may open other files, and so close this one
            while done < size:
                handle = self._handle(path)
                count = _pread(handle, buffer[done:], offset + done)
                if count == 0:
                    raise TruncatedShardError(
                        f"{path} ends at byte {os.fstat(handle).st_size:,}; it was longer when the run was opened.",
                        hint="Something changed it meanwhile. Run again once the checkpoint is complete.",
                    )
                done += count
        except OSError as error:
            raise ReadError(
                f"{path} cannot be read: {error.strerror}.", hint="Check the disk and the rights."
            ) from error
        self.bytes_read += size

    def read_each(
        self, path: AnyPath, offsets: Sequence[int], buffer: memoryview, *, on_miss: Callable[[], None]
    ) -> None:
        """Fill equal parts of `buffer`, one after another, with the bytes from each of `offsets` on.

        Args, errors: as of `read_into`.
        """
        size = len(buffer) // len(offsets)
        place = 0
        if self._can_read_cached and not self._is_remote(path):
            with suppress(OSError):  # whatever is wrong is found again, and told, below
                handle = self._handle(path)
                while place < len(offsets):  # lean: this may be done a million times
                    part = buffer[place * size : (place + 1) * size]
                    if os.preadv(handle, (part,), offsets[place], os.RWF_NOWAIT) < size:
                        break
                    place += 1
            self.bytes_read += place * size
        for rest in range(place, len(offsets)):
            self.read_into(path, offsets[rest], buffer[rest * size : (rest + 1) * size], on_miss=on_miss)

    def read_scattered(
        self, path: AnyPath, offset: int, buffers: Sequence[memoryview], *, on_miss: Callable[[], None]
    ) -> None:
        """Fill one buffer after another, at most 1,024, with the bytes of `path` from `offset` on.

        Args, errors: as of `read_into`.
        """
        size = sum(map(len, buffers))
        if not self._is_remote(path):
            with suppress(OSError):  # whatever is wrong is found again, and told, below
                if self._read_cached(self._handle(path), buffers, offset) == size:
                    self.bytes_read += size
                    return
        if len(self._scratch) < size:
            self._scratch = bytearray(size)
        data, place = memoryview(self._scratch)[:size], 0
        self.read_into(path, offset, data, on_miss=on_miss)
        for buffer in buffers:
            buffer[:] = data[place : place + len(buffer)]
            place += len(buffer)

    def locate(
        self, checkpoints: Sequence[Checkpoint], name: str
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
        """For code that reads by itself: the open file of a tensor in each checkpoint, and where it begins there.

        They are good until another file is read. None where one lies elsewhere or in pieces, and where there are more
        files than may be open.
        """
        entries = [checkpoint.entries[name] for checkpoint in checkpoints]
        paths = [checkpoint.shards[entry.shard].path for checkpoint, entry in zip(checkpoints, entries, strict=True)]
        if any(entry.pieces for entry in entries) or len(paths) > self._most or any(map(self._is_remote, paths)):
            return None
        try:
            handles = [self._handle(path) for path in paths]
        except OSError:  # whoever reads it is told why
            return None
        import numpy as np

        return np.array(handles, np.int32), np.array([entry.offset for entry in entries], np.int64)

    def announce(self, path: AnyPath, offset: int, nbytes: int) -> None:
        """Tell the system that these bytes will be read soon, so that it fetches them in large pieces at once."""
        if _HAS_FADVISE and not self._is_remote(path):
            with suppress(OSError):  # a hint; whatever is wrong shows when the bytes are read
                os.posix_fadvise(self._handle(path), offset, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_remote(self, path: AnyPath) -> bool:
        return self._remote is not None and self._remote.has(path)

    def _read_cached(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read what is in memory already and return how much that was; 0 where the system cannot tell."""
        if not self._can_read_cached:
            return 0
        try:
            return os.preadv(handle, buffers, offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError:  # not every file system knows how
            self._can_read_cached = False
            return 0

    def _handle(self, path: AnyPath) -> int:
        handle = self._open.get(path)
        if handle is not None:
            self._open.move_to_end(path)
            return handle
        while len(self._open) >= self._most:
            os.close(self._open.popitem(last=False)[1])
        handle = os.open(local_path(path) or path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[path] = handle
        return handle


def usable_handles() -> int:
    """How many more files this process may open, a few left for whatever else it needs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _PLENTY if soft == resource.RLIM_INFINITY else soft - _open_handles() - _RESERVED


def _open_handles() -> int:
    """How many files this process has open, those of its results among them."""
    try:
        return len(os.listdir("/dev/fd"))  # noqa: PTH208 - numbers, not paths
    except OSError:  # no such directory in the barest of containers
        return _RESERVED


def _pread(handle: int, buffer: memoryview, offset: int) -> int:
    if _HAS_PREADV:
        return os.preadv(handle, [buffer], offset)
    data = os.pread(handle, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)
