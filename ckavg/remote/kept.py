"""Stage *remote*: where files are kept that were fetched whole, and of which no other program's cache knows.

All processes that read from one address share them. A lock tells whether anybody still does, so that whoever is done
first does not take them from the others, and whoever is done last leaves nothing, of earlier attempts neither.
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
from pathlib import Path

from ckavg.errors import ReadError
from ckavg.storage.atomic import cache_directory, check_own, make_own_directory, open_own

_LOCK = ".lock"
_NAME = re.compile("[0-9a-f]{32}")
_SECONDS_KEPT = 7 * 24 * 3600
"""For how long an interrupted attempt may be continued."""


class Kept:
    """The files of one address that were fetched whole, or in part.

    Args:
        url: the address.
    """

    def __init__(self, url: str) -> None:
        self._directory = kept_directory() / _short(url)
        self._holding = threading.Lock()
        self._held: weakref.finalize[[int], Kept] | None = None

    def place(self, name: str, state: object) -> Path:
        """Where a file goes: another place for another state of it."""
        return self._directory / _short(repr((name, state))) / Path(name).name

    def hold(self, place: Path | None = None) -> None:
        """Have nobody remove the files, until they are dropped here or this object is gone.

        Args:
            place: where one of them is about to be written.

        Raises:
            ReadError: the system would not let us write.
        """
        try:
            with self._holding:
                if self._held is None or not self._held.alive:
                    self._held = weakref.finalize(self, os.close, _locked(self._directory))
            if place is not None:
                make_own_directory(place.parent)
        except OSError as error:
            raise ReadError(
                f"{error.filename or self._directory} cannot be written: {error.strerror or error}.",
                hint="Name a directory of yours with XDG_CACHE_HOME, or write none of it with --max-disk 0.",
            ) from error

    def drop(self) -> None:
        """Remove the files, unless another process uses them; and what nobody came back to for a week."""
        if kept_directory().is_symlink() or not kept_directory().is_dir():
            return
        if self._directory.is_dir():
            self.hold()
        with self._holding:
            if self._held is not None and (held := self._held.detach()) is not None:
                _remove(self._directory, held[2][0])
        for other in kept_directory().iterdir():
            with suppress(OSError):
                if _NAME.fullmatch(other.name) and time.time() - (other / _LOCK).lstat().st_mtime > _SECONDS_KEPT:
                    check_own(other, directory=True)
                    _remove(other, open_own(other / _LOCK, os.O_RDWR))


def kept_directory() -> Path:
    """Where all of them are."""
    return cache_directory() / "files"


def _locked(directory: Path) -> int:
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


def _remove(directory: Path, lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except OSError:  # somebody else uses them, and removes them in turn
        pass
    finally:
        os.close(lock)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
