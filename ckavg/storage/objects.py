"""Directories of object stores with an fsspec driver, such as `s3://bucket/run`: read and write them.

Downloads go to the user's cache, shared by all processes that read from the same address. Each holds a lock while it
reads; the last one to finish removes the downloads.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import inspect
import os
import re
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ckavg.errors import ChangedError, CkavgError, NoCheckpointsError, ReadError, SettingError, WriteError
from ckavg.storage.address import SCHEMES, Address
from ckavg.storage.atomic import cache_directory, check_own, make_own_directory, open_own
from ckavg.storage.base import FileInfo, OnBytes
from ckavg.storage.download import Stopped, complete, exactly
from ckavg.storage.hub_errors import retry, without_credentials
from ckavg.storage.redaction import without_secrets

_HASHES = ("ETag", "etag", "md5Hash", "content_md5")
_TIMES = ("LastModified", "last_modified", "mtime", "created")
"""Keys of drivers for values that change with a file."""

_MD5 = re.compile('"?([0-9a-f]{32}(?:-[0-9]+)?)"?')

_MOST_OF_A_REASON = 4_000
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError, IsADirectoryError, Stopped)
_NO_CREDENTIALS = re.compile("Credentials?(?:Retrieval|NotFound)?Error$|^(?:Profile|Config)NotFound$")
"""Names of errors in drivers' clients that a retry does not solve."""

PROBE = ".ckavg-probe"
"""A file written to test access; it stays if it cannot be removed."""

_REMOVING = ("rm_file", "_rm_file", "_rm")
_PART_BYTES, _MOST_PARTS = 16 << 20, 10_000
"""Parts of a large upload, at most as many as S3 allows."""

LOCK = ".lock"
"""The lock in an address's directory of the cache: its holder uses the files beside it."""

_WEIGHTS = (".safetensors", ".distcp", ".bin", ".pt", ".pth", ".th", ".ckpt", ".tar")
"""Suffixes of files that must not change while they are read; logs may."""

_NAME = re.compile("[0-9a-f]{32}")
_SECONDS_CACHED = 7 * 24 * 3600
"""For how long an interrupted attempt may be continued."""


class ObjectTree:
    """A directory of an fsspec file system; see `Tree`.

    Args:
        address: of the directory.
        driver: a tree in the same bucket, to reuse its driver: making one takes a while.
    """

    is_shared = False
    is_offline = False

    def __init__(self, address: Address, driver: ObjectTree | None = None) -> None:
        self.url = self.pinned_url = str(address)
        self.directory = _downloads_directory()
        self._fs: Any
        self._fs, self._root = _file_system(address, driver and driver._fs)
        self._downloads = Downloads(self.url)
        self._attempt = secrets.token_hex(8)
        """Identity of files that the store has none for: their downloads are never continued."""

    @cached_property
    def files(self) -> Mapping[str, FileInfo]:
        """See `Tree`."""
        listed = {name: file for name, file in self._list().items() if name}
        if not listed:
            raise NoCheckpointsError(f"{self.url} does not exist, or is empty.", hint="Check the name and your rights.")
        return listed

    def read(self, name: str, start: int, stop: int) -> bytes:
        """See `Tree`."""
        return self.read_part(name, start, stop, self.files[name].nbytes)

    def read_whole(self, name: str, info: FileInfo) -> bytes:
        """All bytes of a file, given its current listing."""
        return self.read_part(name, 0, info.nbytes, info.nbytes) if info.nbytes else b""

    def read_part(self, name: str, start: int, stop: int, nbytes: int) -> bytes:
        """The bytes from `start` to `stop` of a file of `nbytes` bytes."""
        path = f"{self._root}/{name}" if name else self._root

        def read_range() -> bytes:
            return exactly(self._fs.cat_file(path, start=start, end=stop), start, stop, nbytes)

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
        before, now = self.files, self.list_files()
        for name, file in before.items():
            if name.endswith(_WEIGHTS) and now.get(name) != file:
                self.remove_downloads()  # they may hold the file before or after the change
                raise ChangedError(
                    f"{self.url}/{name} was changed or replaced while it was read.",
                    hint="Run again when nothing writes to the checkpoints any more, or leave this one out.",
                )

    def _target(self, name: str) -> Path:
        file = self.files[name]
        return self._downloads.target(name, file if file.identity is not None else (file, self._attempt))

    def list_files(self) -> Mapping[str, FileInfo]:
        """List all files now, by relative path; none if it does not exist, `""` if it is a file itself."""
        self._fs.invalidate_cache()
        return self._list()

    def _list(self) -> Mapping[str, FileInfo]:
        with self._explaining(self.url):
            found: dict[str, dict[str, Any]] = retry(
                lambda: self._fs.find(self._root, detail=True), is_transient=_may_pass
            )
        listed = {}
        for path, item in found.items():
            if item.get("type") == "file":
                listed[path.removeprefix(self._root).lstrip("/")] = _info(item)
        return listed

    def check_driver(self) -> None:
        """Refuse a driver that cannot write or remove files. Makes no request.

        Raises:
            WriteError: it cannot.
        """
        kinds = type(self._fs).__mro__
        own = next((kind for kind in kinds if any(name in vars(kind) for name in _REMOVING)), None)
        if own is None or own.__module__ in ("fsspec.spec", "fsspec.asyn"):
            raise WriteError(
                f"{self.url} cannot be written: the driver of {self._scheme}:// only reads, or removes nothing.",
                hint="Choose another place with --out.",
            )

    def check_writable(self) -> None:
        """Write a small file and remove it; WriteError if that fails."""
        self.put(PROBE, b"Written and removed by ckavg, to see whether a result can be.\n")
        self.remove(PROBE)

    def put(self, name: str, data: bytes, *, is_vital: bool = True) -> None:
        """Write a small file, whole or not at all; without retries unless it is vital.

        Raises:
            WriteError: it could not be written.
        """
        self._write(name, lambda: self._fs.pipe_file(f"{self._root}/{name}", data), "written", is_vital=is_vital)

    def put_file(self, path: Path, name: str, on_bytes: OnBytes, *, parts: int) -> None:
        """Upload a local file, a large one in parts; it appears complete or not at all.

        Args:
            path: the file.
            name: relative path.
            on_bytes: called in other threads with the number of bytes sent; negative when they are sent again. An
                exception from it ends the upload.
            parts: how many are sent, and held in memory, at the same time.

        Raises:
            WriteError: it could not be written.
        """
        from fsspec.callbacks import Callback

        sent = 0

        def count(nbytes: int) -> None:
            nonlocal sent
            sent += nbytes
            on_bytes(nbytes)

        class Counting(Callback):  # type: ignore[misc]
            def relative_update(self, inc: int = 1) -> None:
                count(int(inc))

        takes = inspect.signature(getattr(self._fs, "_put_file", self._fs.put_file)).parameters
        given = {"chunksize": part_bytes(path.stat().st_size), "max_concurrency": parts, "overwrite": True}
        more = {option: value for option, value in given.items() if option in takes}

        def send() -> None:
            count(-sent)
            self._fs.put_file(str(path), f"{self._root}/{name}", callback=Counting(), **more)
            count(path.stat().st_size - sent)  # the driver may have reported less, or nothing

        self._write(name, send, "written")

    def remove(self, name: str) -> None:
        """Remove a file if it exists; WriteError if that fails."""
        with suppress(FileNotFoundError):
            self._write(name, lambda: self._fs.rm_file(f"{self._root}/{name}"), "removed")

    def _write(self, name: str, do: Callable[[], object], done: str, *, is_vital: bool = True) -> None:
        def attempt() -> None:
            self._fs.invalidate_cache()
            if self._scheme not in SCHEMES and done == "written":  # such drivers may have real directories
                self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
            do()

        with self._explaining(f"{self.url}/{name}", done):
            retry(attempt, is_transient=_may_pass if is_vital else lambda error: False)

    @contextmanager
    def _explaining(self, what: str, done: str = "read") -> Iterator[None]:
        """Convert errors of the driver to ours; drivers raise any error of their clients."""
        kind = ReadError if done == "read" else WriteError
        try:
            yield
        except (CkavgError, Stopped):
            raise
        except FileNotFoundError as error:
            if done == "removed":
                raise
            missing = what if done == "read" else f"{what} cannot be written: the bucket, or what is above it,"
            raise kind(f"{missing} does not exist.", hint="Check the name, and your right to list it.") from error
        except Exception as error:
            verb, checked = "cannot", "the network and the credentials"
            if isinstance(error, PermissionError):
                verb, checked = "may not", f"the credentials of {self._scheme}"
            elif isinstance(error, NotImplementedError):
                checked = "what its driver supports"
            raise kind(
                f"{what} {verb} be {done}: {_reason(error)}.", hint=f"Check {checked}."
            ) from without_credentials(error)

    @property
    def _scheme(self) -> str:
        return self.url.partition(":")[0]


def part_bytes(nbytes: int) -> int:
    """The size of the parts of an upload of `nbytes` bytes, in whole MiB.

    >>> part_bytes(10) >> 20, part_bytes(10**12) >> 20
    (16, 96)
    """
    return max(_PART_BYTES, -(-nbytes // (_MOST_PARTS << 20)) << 20)


def _file_system(address: Address, known: Any = None) -> tuple[Any, str]:
    """The driver of an address, and the path in it. No part of an address can select another driver."""
    try:
        from fsspec import get_filesystem_class

        driver = get_filesystem_class(address.scheme)
        # not a cached instance: that has old listings and old credentials
        fs = known or driver(skip_instance_cache=True, **driver._get_kwargs_from_urls(str(address)))
        return fs, str(driver._strip_protocol(str(address))).rstrip("/")
    except ImportError as error:
        raise SettingError(f"{address}: {error}", hint="Install the driver, then run the command again.") from error
    except Exception as error:  # drivers raise anything about an address or their configuration
        raise SettingError(
            f"{address}: {_reason(error)}.", hint="Check the address and the configuration of its driver."
        ) from without_credentials(error)


def _reason(error: Exception) -> str:
    """The message of a driver, without credentials."""
    return without_secrets(str(error)[:_MOST_OF_A_REASON]).strip().rstrip(".") or type(error).__name__


def _may_pass(error: Exception) -> bool:
    return not (isinstance(error, _FINAL) or _NO_CREDENTIALS.search(type(error).__name__))


def _info(item: Mapping[str, Any]) -> FileInfo:
    size = int(item.get("size") or 0)
    key = next((key for key in (*_HASHES, *_TIMES) if item.get(key)), None)
    identity = None if key is None else f"{key}:{item[key]}"
    return FileInfo(size, None, identity, key in _HASHES, _md5(item))


def _md5(item: Mapping[str, Any]) -> str | None:
    value = item.get("md5Hash") or item.get("content_md5")
    if value:
        with suppress(ValueError):
            return (bytes(value) if isinstance(value, bytes | bytearray) else base64.b64decode(value)).hex()
    found = _MD5.fullmatch(str(item.get("ETag", "")))
    return found and found[1]


def md5_of(path: Path, *, in_parts: bool) -> str:
    """The MD5 of a file as a store states it; see `FileInfo`.

    Args:
        path: the file.
        in_parts: whether the store hashes each part of `put_file`, if there are several.
    """
    nbytes = path.stat().st_size
    part = part_bytes(nbytes)
    whole, digests = hashlib.md5(usedforsecurity=False), []
    with path.open("rb") as file:
        while data := file.read(part):
            if in_parts and nbytes >= 2 * part:
                digests.append(hashlib.md5(data, usedforsecurity=False).digest())
            else:
                whole.update(data)
    if not digests:
        return whole.hexdigest()
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


class Downloads:
    """The complete and partial downloads of one address, in ckavg's own cache."""

    def __init__(self, url: str) -> None:
        self._all = _downloads_directory()
        self._directory = self._all / short_hash(url)
        self._holding = threading.Lock()
        self._held: weakref.finalize[[int], Downloads] | None = None

    def target(self, name: str, state: object) -> Path:
        """Where a file goes; different for every state of it."""
        return self._directory / short_hash(repr((name, state))) / Path(name).name

    def hold(self, target: Path | None = None) -> None:
        """Keep other processes from removing the files, until `remove` is called or this object is gone.

        Args:
            target: where one of them is about to be written.

        Raises:
            ReadError: the cache cannot be written.
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
                hint="Set XDG_CACHE_HOME to a directory of yours, or write nothing to disk with --max-disk 0.",
            ) from error

    def remove(self) -> None:
        """Remove the files unless another process uses them; also remove downloads that are a week old."""
        if self._all.is_symlink() or not self._all.is_dir():
            return
        if self._directory.is_dir():
            self.hold()
        with self._holding:
            if self._held is not None and (held := self._held.detach()) is not None:
                _remove_unused(self._directory, held[2][0])
        remove_old(self._all)


def remove_old(directory: Path) -> None:
    """Remove the files of addresses in a directory of the cache if they are a week old."""
    with suppress(OSError):
        for each in [] if directory.is_symlink() else list(directory.iterdir()):
            with suppress(OSError):
                if _NAME.fullmatch(each.name) and time.time() - (each / LOCK).lstat().st_mtime > _SECONDS_CACHED:
                    check_own(each, directory=True)
                    _remove_unused(each, open_own(each / LOCK, os.O_RDWR))


def _downloads_directory() -> Path:
    return cache_directory() / "files"


def _lock_shared(directory: Path) -> int:
    """A handle of the lock, shared with other readers."""
    while True:
        make_own_directory(directory.parent)
        make_own_directory(directory)
        with suppress(FileNotFoundError):  # another process removed it just now: make it again
            lock = open_own(directory / LOCK, os.O_RDWR, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if os.fstat(lock).st_ino == (directory / LOCK).stat().st_ino:
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
    except OSError:  # another process uses the files, and will remove them
        pass
    finally:
        os.close(lock)


def short_hash(text: str) -> str:
    """The name of an address in the cache."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
