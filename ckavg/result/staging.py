"""Stage *write*: a directory that is filled under another name and appears complete or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ckavg.atomic import resolved
from ckavg.errors import OutputError, WriteError
from ckavg.result.layout import ShardPlan
from ckavg.result.place import check_replaceable

if TYPE_CHECKING:
    from torch import Tensor

_SECONDS_TO_SEE = 90.0


class Staging:
    """Fills `.<name>.ckavg-partial` beside `out`; `commit` syncs it and renames it to `out`.

    Used as a context: on leaving it without a commit, whatever was written is removed. Where several processes fill it,
    one of them does all of this, and the others wait until they see its `mark`.

    Args:
        out: the final directory.
        force: replace a result that is there. Anything else that is there is left alone in any case.

    Raises:
        OutputError: another process is writing the same result.
        WriteError: the system would not let us write.
    """

    def __init__(self, out: Path, *, force: bool = False) -> None:
        self._out = resolved(out)
        self._force = force
        self.path = self._out.parent / f".{self._out.name}.ckavg-partial"
        self._made: list[Path] = []
        self._lock: int | None = None
        self._committed = False
        self._mark: Path | None = None

    def __enter__(self) -> Staging:
        with _write_errors(self._out.parent):
            try:
                self._make_parents()
                self.path.mkdir(exist_ok=True)
                self._lock = _locked(self.path)
                for leftover in self.path.iterdir():
                    _remove(leftover)
            except BaseException:
                self._clean_up()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean_up()

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with _write_errors(self.path / name):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

    def mark(self) -> str:
        """Leave an empty file with a name that nobody could have left before, and return the name."""
        self._mark = self.path / f".{secrets.token_hex(16)}"
        with _write_errors(self._mark):
            self._mark.touch(exist_ok=False)
        return self._mark.name

    def wait_for(self, mark: str) -> None:
        """Wait until this process sees what another has made; network file systems take up to a minute to show it.

        Raises:
            OutputError: it does not come, so that the two cannot be filling one directory.
        """
        end = time.monotonic() + _SECONDS_TO_SEE
        while not (self.path / mark).exists():
            if time.monotonic() > end:
                raise OutputError(
                    f"{self._out.parent} on {socket.gethostname()} is not the same directory as on the first machine.",
                    hint="Choose a place with --out on a file system that all machines share.",
                )
            time.sleep(0.05)

    def commit(self) -> None:
        """Sync everything and give it its final name.

        Raises:
            OutputExistsError: something came to be there since the work began.
            WriteError: the system would not let us; the final name is as it was.
        """
        with _write_errors(self._out):
            if self._mark is not None:
                self._mark.unlink()
            for directory, _, files in os.walk(self.path):
                for file in files:
                    _sync(Path(directory) / file)
                _sync(Path(directory))
            replaced = self._out.parent / f".{self._out.name}.ckavg-replaced"
            _remove(replaced)
            if self._out.exists() and any(self._out.iterdir()):
                check_replaceable(self._out, force=self._force)
                self._out.rename(replaced)
            try:
                self.path.rename(self._out)
            except OSError:
                if replaced.exists():
                    replaced.rename(self._out)
                raise
            self._committed = True
            _sync(self._out.parent)
            shutil.rmtree(replaced, ignore_errors=True)

    def _make_parents(self) -> None:
        missing = [parent for parent in self._out.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self._made.append(parent)

    def _clean_up(self) -> None:
        if not self._committed:
            if self._lock is not None:
                shutil.rmtree(self.path, ignore_errors=True)
            for parent in reversed(self._made):
                try:
                    parent.rmdir()
                except OSError:
                    break
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class ShardFiles:
    """The weight files of a result, written tile by tile from several threads.

    Args:
        directory: where they go; it is made where it does not exist.
        shards: their layout.
        create: make them, as one process does; the others write into them.

    Raises:
        WriteError: the system would not let us write.
    """

    def __init__(self, directory: Path, shards: tuple[ShardPlan, ...], *, create: bool = True) -> None:
        self._offsets: dict[str, tuple[int, int, Path]] = {}
        self._handles: list[tuple[int, Path]] = []
        for shard in shards:
            path = directory / shard.name
            with _write_errors(path):
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
        with _write_errors(path):
            _write_at(handle, values.numpy().data, start + offset)

    def sync(self) -> None:
        """Wait until every byte is on the disk."""
        for handle, path in self._handles:
            with _write_errors(path):
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


def _locked(directory: Path) -> int:
    handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == directory.stat().st_ino:
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    raise OutputError(
        f"Another ckavg is writing {directory.name.removeprefix('.').removesuffix('.ckavg-partial')} right now.",
        hint="Wait for it, or choose another place with --out.",
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="Nothing was left under the final name. Choose another place with --out, or free some space.",
        ) from error
