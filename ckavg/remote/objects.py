"""Stage *remote*: directories of object stores that fsspec has a driver for, such as `s3://bucket/run`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from ckavg.errors import ChangedError, CkavgError, NoCheckpointsError, ReadError, SettingError
from ckavg.remote.download import Partial, complete
from ckavg.remote.kept import Kept, kept_directory
from ckavg.remote.store import OnBytes, RemoteFile
from ckavg.remote.tries import exactly, with_retries
from ckavg.storage.address import Address
from ckavg.storage.hub_errors import causes
from ckavg.storage.redaction import without_secrets

_HASHES = ("ETag", "etag", "md5Hash", "content_md5")
_MOST_OF_A_REASON = 4_000
_FINAL = (FileNotFoundError, PermissionError, NotImplementedError, IsADirectoryError)
_TIMES = ("LastModified", "last_modified", "mtime", "created")
"""Where drivers tell what changes when a file does."""


class ObjectTree:
    """A directory of a file system that fsspec knows; see `Tree`."""

    keeps = False
    is_offline = False

    def __init__(self, address: Address) -> None:
        self.url = self.pinned_url = str(address)
        self._fs, self._root = _file_system(address)
        self._kept = Kept(self.url)
        self._attempt = secrets.token_hex(8)
        """Stands for the state of files of which nothing is told that changes with it: they are not taken up again."""

    @cached_property
    def files(self) -> Mapping[str, RemoteFile]:
        """See `Tree`."""
        return self._listed()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """See `Tree`."""
        path = f"{self._root}/{name}" if name else self._root

        def piece() -> bytes:
            return exactly(self._fs.cat_file(path, start=start, end=stop), start, stop, self.files[name].size)

        with self._asking(f"{self.url}/{name}"):
            return with_retries(piece, passes=_may_pass)

    def kept(self, name: str) -> Path | None:
        """See `Tree`."""
        place = self._place(name)
        if place.is_file():
            self._kept.hold()
        return place if place.is_file() else None

    def fetch(self, name: str, on_bytes: OnBytes) -> Path:
        """See `Tree`."""
        place = self._place(name)
        self._kept.hold(place)
        complete(Partial(self, name, self.files[name].size, place), on_bytes)
        return place

    @property
    def directory(self) -> Path:
        """See `Tree`."""
        return kept_directory()

    def drop(self) -> None:
        """Remove what was fetched whole: nothing else knows of it."""
        self._kept.drop()

    def check_unchanged(self) -> None:
        """See `Tree`."""
        self._fs.invalidate_cache()
        before, now = self.files, self._listed()
        for name, file in before.items():
            if name.endswith(".safetensors") and now.get(name) != file:
                self.drop()  # what came of it may be of either state, and must not be taken for the one that was listed
                raise ChangedError(
                    f"{self.url}/{name} was changed or replaced while it was read.",
                    hint="Run again once nothing writes to the checkpoints any more, or leave this one out.",
                )

    def _place(self, name: str) -> Path:
        file = self.files[name]
        return self._kept.place(name, file if file.identity is not None else (file, self._attempt))

    def _listed(self) -> Mapping[str, RemoteFile]:
        with self._asking(self.url):
            found: dict[str, dict[str, Any]] = with_retries(
                lambda: self._fs.find(self._root, detail=True), passes=_may_pass
            )
        listed = {}
        for path, info in found.items():
            name = path.removeprefix(self._root).lstrip("/")
            if info.get("type") == "file" and name:
                listed[name] = RemoteFile(int(info.get("size") or 0), *_identity(info))
        if not listed:
            raise NoCheckpointsError(f"{self.url} does not exist, or is empty.", hint="Check the name and the rights.")
        return listed

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Make an error of the driver one of ours; drivers raise what their clients do."""
        try:
            yield
        except CkavgError:
            raise
        except FileNotFoundError as error:
            raise ReadError(f"{what} does not exist.", hint="Check the name, and the rights to list it.") from error
        except PermissionError as error:
            raise ReadError(
                f"{what} may not be read: {_told(error)}.", hint=f"Check the credentials of {self._fs.protocol}."
            ) from _shown(error)
        except Exception as error:
            raise ReadError(
                f"{what} cannot be read: {_told(error)}.", hint="Check the network and the credentials."
            ) from _shown(error)


def _file_system(address: Address) -> tuple[Any, str]:
    """The driver of an address, and the path in it. Nothing of the address can name another driver."""
    try:
        from fsspec import get_filesystem_class
    except ImportError as error:
        raise SettingError(f"{address} is read with fsspec, which is missing.", hint="pip install fsspec") from error
    try:
        driver = get_filesystem_class(address.scheme)
        # an instance of its own: a kept one remembers old lists, and the credentials of before
        fs = driver(skip_instance_cache=True, **driver._get_kwargs_from_urls(str(address)))
        return fs, str(driver._strip_protocol(str(address))).rstrip("/")
    except ImportError as error:
        raise SettingError(f"{address}: {error}", hint="Install the driver, then run the command again.") from error
    except Exception as error:  # whatever a driver does not like about it, or about its configuration
        raise SettingError(
            f"{address}: {_told(error)}.", hint="Check the address, and what its driver is configured with."
        ) from _shown(error)


def _told(error: Exception) -> str:
    """The words of a driver, without what they may hold of credentials."""
    return without_secrets(str(error)[:_MOST_OF_A_REASON]).strip().rstrip(".") or type(error).__name__


def _shown(error: Exception) -> Exception | None:
    """The error, for a traceback; None where that would show credentials."""
    chain = "".join(str(each) for each in causes(error))[:_MOST_OF_A_REASON]
    return error if without_secrets(chain) == chain else None


def _may_pass(error: Exception) -> bool:
    return not isinstance(error, _FINAL)


def _identity(info: Mapping[str, Any]) -> tuple[str | None, bool]:
    key = next((key for key in (*_HASHES, *_TIMES) if info.get(key)), None)
    return (None, False) if key is None else (f"{key}:{info[key]}", key in _HASHES)
