"""The weight files of a result, written tile by tile at their places."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ckavg.checkpoints.headers import KNOWN_HASHES
from ckavg.errors import WriteError
from ckavg.output.layout import ShardPlan, encode_header

if TYPE_CHECKING:
    from torch import Tensor

# Never for reading: a network file system then writes the bytes it is given, and not their whole pages.
_WRITE = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW

_LEGACY_START, _LEGACY_BYTES = 1 << 20, 1 << 16


class WeightFiles:
    """The weight files of a result, written tile by tile from several threads.

    Args:
        directory: where they go; it is made where it does not exist.
        shards: their layout.
        create: make them, as one process does, unless an interrupted attempt did; otherwise they are there.
        keep_open: hold all of them open. Where there are too many for that, each is opened for every tile.

    Raises:
        WriteError: the system would not let us write.
    """

    def __init__(
        self, directory: Path, shards: tuple[ShardPlan, ...], *, create: bool = True, keep_open: bool = True
    ) -> None:
        self._paths = {directory / shard.name: shard for shard in shards}
        self._positions = {
            name: (path, offset) for path, shard in self._paths.items() for name, offset in shard.offsets.items()
        }
        self._open: dict[Path, int] = {}
        for path, shard in self._paths.items():
            with write_errors(path):
                if create:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _create(path, shard)
                if keep_open:
                    self._open[path] = os.open(path, _WRITE)

    def put(self, name: str, offset: int, values: Tensor) -> None:
        """Write the bytes of tensor `name` from byte `offset` on: (n,) uint8 in CPU memory."""
        path, start = self._positions[name]
        with self._handle(path) as handle:
            _write_at(handle, values.numpy().data, start + offset)

    def sync(self) -> None:
        """Wait until every byte is on the disk."""
        for path in self._paths:
            with self._handle(path) as handle:
                os.fsync(handle)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    @contextmanager
    def _handle(self, path: Path) -> Iterator[int]:
        with write_errors(path):
            if path in self._open:
                yield self._open[path]
                return
            handle = os.open(path, _WRITE)
            try:
                yield handle
            finally:
                os.close(handle)


def write_own_hashes(path: Path, shard: ShardPlan) -> None:
    """Put the hashes of its tensors into the header of a finished file that is to state them (sd-scripts defines them).

    `sshs_model_hash` is the SHA-256 of all that follows the header. `sshs_legacy_hash` is 8 digits of that of 64 KiB,
    taken 1 MiB into the file as it would be if its header kept only the entries of training.

    Raises:
        WriteError: the system would not let us read or write it.
    """
    if not KNOWN_HASHES.keys() & shard.metadata.keys():
        return
    declared = json.loads(shard.header[8:])
    of_training = {key: value for key, value in shard.metadata.items() if key.startswith("ss_")}
    head = encode_header(declared | {"__metadata__": of_training})
    with write_errors(path), os.fdopen(os.open(path, _WRITE & ~os.O_WRONLY | os.O_RDWR), "r+b") as file:
        file.seek(len(shard.header))
        whole = hashlib.file_digest(file, "sha256").hexdigest()
        piece = head[_LEGACY_START : _LEGACY_START + _LEGACY_BYTES]
        file.seek(len(shard.header) + max(0, _LEGACY_START - len(head)))
        piece += file.read(_LEGACY_BYTES - len(piece))
        hashes = {"sshs_model_hash": whole, "sshs_legacy_hash": hashlib.sha256(piece).hexdigest()[:8]}
        stated = {key: hashes.get(key, value) for key, value in shard.metadata.items()}
        file.seek(0)
        file.write(encode_header(declared | {"__metadata__": stated}))


def _create(path: Path, shard: ShardPlan) -> None:
    handle = os.open(path, _WRITE | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _reserve(path, shard.nbytes)
        os.truncate(handle, shard.nbytes)
        _write_at(handle, memoryview(shard.header), 0)
    finally:
        os.close(handle)


def _reserve(path: Path, nbytes: int) -> None:
    """Have the file system keep blocks for a new file, where it can: writing into them is twice as fast.

    Where it cannot, the C library would write to every block, unless the file was opened for appending.

    Raises:
        OSError: there is no room for it.
    """
    if nbytes and hasattr(os, "posix_fallocate"):
        handle = os.open(path, _WRITE | os.O_APPEND)
        try:
            os.posix_fallocate(handle, 0, nbytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
        finally:
            os.close(handle)


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        count = os.pwrite(handle, data[done:], offset + done)
        if count == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += count


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
