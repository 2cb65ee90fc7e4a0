"""Directories of object stores that fsspec has a driver for, such as `s3://bucket/run`.

What is downloaded of them is kept in the user's cache, for all processes that read from the same address. A lock tells
whether anybody still does: who is done first does not take it from the others, and who is done last leaves nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ckavg.errors import ChangedError, CkavgError, NoCheckpointsError, ReadError, SettingError
from ckavg.storage.address import Address
from ckavg.storage.atomic import cache_directory, check_own, make_own_directory, open_own
from ckavg.storage.base import FileInfo, OnBytes
from ckavg.storage.download import complete, exactly
from ckavg.storage.hub_errors import retry, without_credentials
from ckavg.storage.redaction import without_secrets

_HASHES = ("ETag", "etag", "md5Hash", "content_md5")
_TIMES = ("LastModified", "last_modified", "mtime", "created")
"""Where drivers tell what changes when a file does."""

_MOST_OF_A_REASON = 4_000
_FINAL = (FileNotFoundError, PermissionError, NotImplementedError, IsADirectoryError)

_LOCK = ".lock"
_NAME = re.compile("[0-9a-f]{32}")
_SECONDS_CACHED = 7 * 24 * 3600
"""For how long an interrupted attempt may be continued."""


class ObjectTree:
    """A directory of a file system that fsspec knows; see `Tree`."""

    is_shared = False
    is_offline = False

    def __init__(self, address: Address) -> None:
        self.url = self.pinned_url = str(address)
        self.directory = _downloads_directory()
        self._fs, self._root = _file_system(address)
        self._downloads = Downloads(self.url)
        self._attempt = secrets.token_hex(8)
        """Stands for the state of files of which nothing is told that changes with it: they are not taken up again."""

    @cached_property
    def files(self) -> Mapping[str, FileInfo]:
        """See `Tree`."""
        return self._list()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """See `Tree`."""
        path = f"{self._root}/{name}" if name else self._root

        def read_range() -> bytes:
            data = self._fs.cat_file(path, start=start, end=stop)
            return exactly(data, start, stop, self.files[name].nbytes)

        with self._explaining(f"{self.url}/{name}"):
            return retry(read_range, is_transient=_may_pass)

    def local(self, name: str) -> Path | None:
        """See `Tree`."""
        target = self._target(name)
        if target.is_file():
            self._downloads.hold()
        return target if target.is_file() else None

    def download(self, name: str, on_bytes: OnBytes) -> Path:
        """See `Tree`."""
        target = self._target(name)
        self._downloads.hold(target)
        complete(partial(self.read, name), self.files[name].nbytes, target, on_bytes, url=f"{self.url}/{name}")
        return target

    def remove_downloads(self) -> None:
        """See `Tree`."""
        self._downloads.remove()

    def check_unchanged(self) -> None:
        """See `Tree`."""
        self._fs.invalidate_cache()
        before, now = self.files, self._list()
        for name, file in before.items():
            if name.endswith((".safetensors", ".distcp")) and now.get(name) != file:
                self.remove_downloads()  # they may be of either state, and must not be taken for what was listed
                raise ChangedError(
                    f"{self.url}/{name} was changed or replaced while it was read.",
                    hint="Run again once nothing writes to the checkpoints any more, or leave this one out.",
                )

    def _target(self, name: str) -> Path:
        file = self.files[name]
        return self._downloads.target(name, file if file.identity is not None else (file, self._attempt))

    def _list(self) -> Mapping[str, FileInfo]:
        with self._explaining(self.url):
            found: dict[str, dict[str, Any]] = retry(
                lambda: self._fs.find(self._root, detail=True), is_transient=_may_pass
            )
        listed = {}
        for path, told in found.items():
            name = path.removeprefix(self._root).lstrip("/")
            if told.get("type") == "file" and name:
                listed[name] = _info(told)
        if not listed:
            raise NoCheckpointsError(f"{self.url} does not exist, or is empty.", hint="Check the name and the rights.")
        return listed

    @contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        """Make an error of the driver one of ours; drivers raise what their clients do."""
        try:
            yield
        except CkavgError:
            raise
        except FileNotFoundError as error:
            raise ReadError(f"{what} does not exist.", hint="Check the name, and the rights to list it.") from error
        except Exception as error:
            verb, checked = "cannot", "the network and the credentials"
            if isinstance(error, PermissionError):
                verb, checked = "may not", f"the credentials of {self._fs.protocol}"
            raise ReadError(
                f"{what} {verb} be read: {_reason(error)}.", hint=f"Check {checked}."
            ) from without_credentials(error)


def _file_system(address: Address) -> tuple[Any, str]:
    """The driver of an address, and the path in it. Nothing of the address can name another driver."""
    try:
        from fsspec import get_filesystem_class

        driver = get_filesystem_class(address.scheme)
        # an instance of its own: a cached one remembers old lists, and the credentials of before
        fs = driver(skip_instance_cache=True, **driver._get_kwargs_from_urls(str(address)))
        return fs, str(driver._strip_protocol(str(address))).rstrip("/")
    except ImportError as error:
        raise SettingError(f"{address}: {error}", hint="Install the driver, then run the command again.") from error
    except Exception as error:  # whatever a driver does not like about it, or about its configuration
        raise SettingError(
            f"{address}: {_reason(error)}.", hint="Check the address, and what its driver is configured with."
        ) from without_credentials(error)


def _reason(error: Exception) -> str:
    """The words of a driver, without what they may hold of credentials."""
    return without_secrets(str(error)[:_MOST_OF_A_REASON]).strip().rstrip(".") or type(error).__name__


def _may_pass(error: Exception) -> bool:
    return not isinstance(error, _FINAL)


def _info(told: Mapping[str, Any]) -> FileInfo:
    size = int(told.get("size") or 0)
    key = next((key for key in (*_HASHES, *_TIMES) if told.get(key)), None)
    return FileInfo(size) if key is None else FileInfo(size, None, f"{key}:{told[key]}", key in _HASHES)


class Downloads:
    """The files of one address that were downloaded, whole or in part, and of which no other program's cache knows."""

    def __init__(self, url: str) -> None:
        self._all = _downloads_directory()
        self._directory = self._all / _short(url)
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
        if self._all.is_symlink() or not self._all.is_dir():
            return
        if self._directory.is_dir():
            self.hold()
        with self._holding:
            if self._held is not None and (held := self._held.detach()) is not None:
                _remove_unused(self._directory, held[2][0])
        for other in self._all.iterdir():
            with suppress(OSError):
                if _NAME.fullmatch(other.name) and time.time() - (other / _LOCK).lstat().st_mtime > _SECONDS_CACHED:
                    check_own(other, directory=True)
                    _remove_unused(other, open_own(other / _LOCK, os.O_RDWR))


def _downloads_directory() -> Path:
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
