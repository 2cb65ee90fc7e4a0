"""Directories of object stores that fsspec has a driver for, such as `s3://bucket/run`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from ckavg.errors import ChangedError, CkavgError, NoCheckpointsError, ReadError, SettingError
from ckavg.storage.address import Address
from ckavg.storage.base import FileInfo, OnBytes
from ckavg.storage.download import Download, Downloads, complete, downloads_directory
from ckavg.storage.hub_errors import causes, retry
from ckavg.storage.redaction import without_secrets
from ckavg.storage.tree import exactly

_HASHES = ("ETag", "etag", "md5Hash", "content_md5")
_TIMES = ("LastModified", "last_modified", "mtime", "created")
"""Where drivers tell what changes when a file does."""

_MOST_OF_A_REASON = 4_000
_FINAL = (FileNotFoundError, PermissionError, NotImplementedError, IsADirectoryError)


class ObjectTree:
    """A directory of a file system that fsspec knows; see `Tree`."""

    is_shared = False
    is_offline = False

    def __init__(self, address: Address) -> None:
        self.url = self.pinned_url = str(address)
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

    def read_whole(self, name: str) -> bytes:
        """See `Tree`."""
        size = self.files[name].nbytes
        return self.read(name, 0, size) if size else b""

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
        complete(Download(self, name, self.files[name].nbytes, target), on_bytes)
        return target

    @property
    def directory(self) -> Path:
        """See `Tree`."""
        return downloads_directory()

    def remove_downloads(self) -> None:
        """See `Tree`."""
        self._downloads.remove()

    def check_unchanged(self) -> None:
        """See `Tree`."""
        self._fs.invalidate_cache()
        before, now = self.files, self._list()
        for name, file in before.items():
            if name.endswith(".safetensors") and now.get(name) != file:
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
        except PermissionError as error:
            raise ReadError(
                f"{what} may not be read: {_reason(error)}.", hint=f"Check the credentials of {self._fs.protocol}."
            ) from _without_credentials(error)
        except Exception as error:
            raise ReadError(
                f"{what} cannot be read: {_reason(error)}.", hint="Check the network and the credentials."
            ) from _without_credentials(error)


def _file_system(address: Address) -> tuple[Any, str]:
    """The driver of an address, and the path in it. Nothing of the address can name another driver."""
    try:
        from fsspec import get_filesystem_class
    except ImportError as error:
        raise SettingError(f"{address} is read with fsspec, which is missing.", hint="pip install fsspec") from error
    try:
        driver = get_filesystem_class(address.scheme)
        # an instance of its own: a cached one remembers old lists, and the credentials of before
        fs = driver(skip_instance_cache=True, **driver._get_kwargs_from_urls(str(address)))
        return fs, str(driver._strip_protocol(str(address))).rstrip("/")
    except ImportError as error:
        raise SettingError(f"{address}: {error}", hint="Install the driver, then run the command again.") from error
    except Exception as error:  # whatever a driver does not like about it, or about its configuration
        raise SettingError(
            f"{address}: {_reason(error)}.", hint="Check the address, and what its driver is configured with."
        ) from _without_credentials(error)


def _reason(error: Exception) -> str:
    """The words of a driver, without what they may hold of credentials."""
    return without_secrets(str(error)[:_MOST_OF_A_REASON]).strip().rstrip(".") or type(error).__name__


def _without_credentials(error: Exception) -> Exception | None:
    """The error, for a traceback; None where that would show credentials."""
    chain = "".join(str(each) for each in causes(error))[:_MOST_OF_A_REASON]
    return error if without_secrets(chain) == chain else None


def _may_pass(error: Exception) -> bool:
    return not isinstance(error, _FINAL)


def _info(told: Mapping[str, Any]) -> FileInfo:
    size = int(told.get("size") or 0)
    key = next((key for key in (*_HASHES, *_TIMES) if told.get(key)), None)
    return FileInfo(size) if key is None else FileInfo(size, None, f"{key}:{told[key]}", key in _HASHES)
