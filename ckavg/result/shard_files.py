"""Stage *write*: the weight files of a result, written tile by tile at their places."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ckavg.errors import WriteError
from ckavg.result.layout import ShardPlan

if TYPE_CHECKING:
    from torch import Tensor


class ShardFiles:
    """The weight files of a result, written tile by tile from several threads.

    Args:
        directory: where they go; it is made where it does not exist.
        shards: their layout.
        create: make them, as one process does, unless an interrupted attempt did; otherwise they are there.

    Raises:
        WriteError: the system would not let us write.
    """

    def __init__(self, directory: Path, shards: tuple[ShardPlan, ...], *, create: bool = True) -> None:
        self._offsets: dict[str, tuple[int, int, Path]] = {}
        self._handles: list[tuple[int, Path]] = []
        for shard in shards:
            path = directory / shard.name
            with write_errors(path):
                if create:
                    path.parent.mkdir(parents=True, exist_ok=True)
                # Never for reading: a network file system then writes the bytes it is given, and not their whole pages.
                made = os.O_CREAT | os.O_EXCL if create else 0
                handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC | made, 0o666)
                self._handles.append((handle, path))
                if create:
                    _reserve(handle, shard.nbytes)
                    _write_at(handle, memoryview(shard.header), 0)
            for name, offset in shard.offsets.items():
                self._offsets[name] = handle, offset, path

    def put(self, name: str, offset: int, values: Tensor) -> None:
        """Write the bytes of tensor `name` from byte `offset` on: (n,) uint8 in CPU memory."""
        handle, start, path = self._offsets[name]
        with write_errors(path):
            _write_at(handle, values.numpy().data, start + offset)

    def sync(self) -> None:
        """Wait until every byte is on the disk."""
        for handle, path in self._handles:
            with write_errors(path):
                os.fsync(handle)

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            os.close(self._handles.pop()[0])


def _reserve(handle: int, nbytes: int) -> None:
    """Give a file its size, and the blocks for it where the file system can: writing into them is twice as fast.

    `os.posix_fallocate` will not do: where the file system cannot, the C library writes every block.

    Raises:
        OSError: there is no room for it.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None and nbytes:
        failed = fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))
        if failed and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.truncate(handle, nbytes)


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], offset + done)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """What the system says against writing `path`, as an error of ours.

    Raises:
        WriteError: it said something.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Nothing was left under the final name. Choose another place with --out, or free some space.",
        ) from error
