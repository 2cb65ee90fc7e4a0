"""Whole files, downloaded piece after piece: each goes on where an earlier attempt ended.

Those of object stores are kept in the user's cache, for all processes that read from the same address. A lock tells
whether anybody still does: who is done first does not take them from the others, and who is done last leaves nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from ckavg.errors import ReadError
from ckavg.storage.atomic import cache_directory, check_own, make_own_directory, open_own
from ckavg.storage.base import OnBytes

if TYPE_CHECKING:
    from hashlib import _Hash

PIECE_BYTES = 16 << 20
"""How much is asked for at once: what an interrupt costs of each file at most."""

_LOCK = ".lock"
_NAME = re.compile("[0-9a-f]{32}")
_SECONDS_CACHED = 7 * 24 * 3600
"""For how long an interrupted attempt may be continued."""


class Readable(Protocol):
    """What a file is downloaded from: a `Tree`."""

    @property
    def url(self) -> str:
        """Its address."""
        ...

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`."""
        ...


@dataclass(frozen=True, slots=True)
class Download:
    """A file to be downloaded.

    Attributes:
        tree: where it is.
        name: its path there.
        nbytes: its size.
        target: where it goes. What there is of it lies beside that, with `.incomplete` after the name.
        sha256: what its content must hash to; None where that is not known.
    """

    tree: Readable
    name: str
    nbytes: int
    target: Path
    sha256: str | None = None


def complete(download: Download, on_bytes: OnBytes) -> None:
    """Download what is missing of a file, and give it its name once it is there as a whole.

    Two processes that want the same file download it once: the second waits, and finds it.

    Raises:
        ReadError: it is not what its hash promises, or the system would not let us write.
        HubError: it could not be downloaded. What came of it stays.
    """
    target, nbytes = download.target, download.nbytes
    unfinished = target.with_name(f"{target.name}.incomplete")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_own(unfinished, os.O_RDWR), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if target.exists():
                on_bytes(nbytes)
                with suppress(OSError):  # of the process that held it until now
                    if os.fstat(file.fileno()).st_ino == unfinished.stat().st_ino:
                        unfinished.unlink()
                return
            digest = hashlib.sha256()
            begun = _take_up(file, nbytes, digest)
            on_bytes(begun)
            for start in range(begun, nbytes, PIECE_BYTES):
                data = download.tree.read(download.name, start, min(start + PIECE_BYTES, nbytes))
                file.write(data)
                digest.update(data)
                on_bytes(len(data))
            file.flush()
            os.fsync(file.fileno())
            if download.sha256 is not None and digest.hexdigest() != download.sha256:
                unfinished.unlink()
                raise ReadError(
                    f"{download.tree.url}: {download.name} came with other content than its SHA-256 promises.",
                    hint="Something changed it on the way. It was removed; run the command again.",
                )
            unfinished.replace(target)
    except OSError as error:
        raise ReadError(
            f"{unfinished} cannot be written: {error.strerror or error}.",
            hint="Free some space, or fetch less to disk with --max-disk.",
        ) from error


def _take_up(file: BinaryIO, nbytes: int, digest: _Hash) -> int:
    """How much of the file is there already; it goes into the hash, and the file stands at its end."""
    begun = min(os.fstat(file.fileno()).st_size, nbytes)
    for start in range(0, begun, PIECE_BYTES):
        digest.update(file.read(min(PIECE_BYTES, begun - start)))
    file.truncate(begun)
    return begun


class Downloads:
    """The files of one address that were downloaded, whole or in part, and of which no other program's cache knows."""

    def __init__(self, url: str) -> None:
        self._directory = downloads_directory() / _short(url)
        self._holding = threading.Lock()
        self._held: weakref.finalize[[int], Downloads] | None = None

    def target(self, name: str, state: object) -> Path:
        """Where a file goes: another place for another state of it."""
        return self._directory / _short(repr((name, state))) / Path(name).name

    def hold(self, target: Path | None = None) -> None:
        """Have nobody remove the files, until they are removed here or this object is gone.

        Args:
            target: where one of them is about to be written.

        Raises:
            ReadError: the system would not let us write.
        """
        try:
            with self._holding:
                if self._held is None or not self._held.alive:
                    self._held = weakref.finalize(self, os.close, _lock_shared(self._directory))
            if target is not None:
                make_own_directory(target.parent)
        except OSError as error:
            raise ReadError(
                f"{error.filename or self._directory} cannot be written: {error.strerror or error}.",
                hint="Name a directory of yours with XDG_CACHE_HOME, or write none of it with --max-disk 0.",
            ) from error

    def remove(self) -> None:
        """Remove the files, unless another process uses them; and what nobody came back to for a week."""
        if downloads_directory().is_symlink() or not downloads_directory().is_dir():
            return
        if self._directory.is_dir():
            self.hold()
        with self._holding:
            if self._held is not None and (held := self._held.detach()) is not None:
                _remove_unused(self._directory, held[2][0])
        for other in downloads_directory().iterdir():
            with suppress(OSError):
                if _NAME.fullmatch(other.name) and time.time() - (other / _LOCK).lstat().st_mtime > _SECONDS_CACHED:
                    check_own(other, directory=True)
                    _remove_unused(other, open_own(other / _LOCK, os.O_RDWR))


def downloads_directory() -> Path:
    """Where the files of all addresses are."""
    return cache_directory() / "files"


def _lock_shared(directory: Path) -> int:
    """A handle of the lock, shared with whoever else reads from there."""
    while True:
        make_own_directory(directory.parent)
        make_own_directory(directory)
        with suppress(FileNotFoundError):  # removed this very moment, and made again
            lock = open_own(directory / _LOCK, os.O_RDWR, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if os.fstat(lock).st_ino == (directory / _LOCK).stat().st_ino:
                    os.utime(lock)
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


def _remove_unused(directory: Path, lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except OSError:  # somebody else uses them, and removes them in turn
        pass
    finally:
        os.close(lock)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
