"""Bytes, wherever they are: what a storage can do, and paths that know theirs.

Paths on this machine are `pathlib.Path`s. Those of a storage elsewhere are `RemotePath`s: taken apart and put together
like any path, and shown as the address that a user would type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from ckavg.storage.remote import RemoteStorage


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies in a directory: names of files (and whatever else is no directory), and of directories, sorted."""

    files: frozenset[str]
    folders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file, as its storage tells it.

    Attributes:
        nbytes: size in bytes.
        state: inode and time of modification in nanoseconds; None elsewhere than on this machine.
        identity: elsewhere, the same for the same content, as far as the storage tells: a hash, or what changes with
            every change. None where nothing tells.
        is_hash: whether the same identity in two places means the same content.
        md5: elsewhere, the MD5 of the content in hexadecimal digits or, of one that was written in N parts, that of
            their MD5s, and `-N`; a store that encrypts may tell something else of this form. None where nothing tells.
    """

    nbytes: int
    state: tuple[int, int] | None = None
    identity: str | None = None
    is_hash: bool = False
    md5: str | None = None


OnBytes = Callable[[int], None]
"""Called with the number of bytes that have come since the last call."""

Opened = tuple[FileInfo, Callable[[int], bytes]]
"""A file that is read from its beginning: what it is, and what gives up to so many of its next bytes."""

AnyPath_contra = TypeVar("AnyPath_contra", contravariant=True)


class Storage(Protocol[AnyPath_contra]):
    """Where files are. OSError where there is no such file or directory, or the system would not let us; ValueError
    where none can have this name; elsewhere than on this machine HubError or ReadError, too.
    """

    def list(self, directory: AnyPath_contra) -> Listing:
        """The names in a directory."""

    def open(self, path: AnyPath_contra) -> AbstractContextManager[Opened]:
        """Read a plain file from its beginning."""

    def read(self, path: AnyPath_contra, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`; ReadError where they could not be read."""

    def read_small(self, path: AnyPath_contra, most_bytes: int) -> bytes:
        """All bytes of a plain file; OSError where there are more than `most_bytes`."""


class Tree(Protocol):
    """What the Hub and object stores have in common: a directory whose files do not change while they are read.

    Every method raises HubError or ReadError where it is refused, or cannot be reached.

    Attributes:
        url: its address, as a user may type it.
        pinned_url: its address by what cannot come to mean something else, where there is such a thing.
        is_shared: whether what is downloaded goes into a cache that other programs share, and stays there.
        is_offline: whether nothing can be read but what was downloaded before.
        directory: where what is downloaded goes.
    """

    url: str
    pinned_url: str
    is_shared: bool
    is_offline: bool
    directory: Path

    @property
    def files(self) -> Mapping[str, FileInfo]:
        """All files in it, by relative path; listed once."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of a file: all of them, or an error."""

    def local(self, name: str) -> Path | None:
        """Where a file is on this machine, if it was downloaded."""

    def download(self, name: str, on_bytes: OnBytes) -> Path:
        """Download a file, or what is missing of it; return where it is then."""

    def remove_downloads(self) -> None:
        """Remove what was downloaded, where nobody else knows of it."""

    def check_unchanged(self) -> None:
        """Raise ChangedError where a file is another one than when it was listed."""


class RemotePath:
    """A path within a storage that is elsewhere."""

    __slots__ = ("inner", "storage")

    def __init__(self, storage: RemoteStorage, inner: PurePosixPath = PurePosixPath()) -> None:  # noqa: B008 - a constant
        self.storage = storage
        self.inner = inner

    @property
    def name(self) -> str:
        """As of any path; that of the root is the last part of its address."""
        return self.inner.name or self.storage.name

    @property
    def stem(self) -> str:
        """As of any path."""
        return self.inner.stem

    @property
    def suffix(self) -> str:
        """As of any path."""
        return self.inner.suffix

    @property
    def parent(self) -> RemotePath:
        """As of any path; that of the root is the root."""
        return RemotePath(self.storage, self.inner.parent)

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        return RemotePath(self.storage, self.inner / name)

    def relative_to(self, other: AnyPath) -> PurePosixPath:
        """As of any path; ValueError where it does not lie below the other."""
        if not (isinstance(other, RemotePath) and self.storage is other.storage):
            raise ValueError(f"{self} does not lie below {other}")
        return self.inner.relative_to(other.inner)

    def exists(self) -> bool:
        """Whether it is a file or a directory."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self.storage.info(self) is not None

    def is_dir(self) -> bool:
        """Whether it is a directory."""
        try:
            self.storage.list(self)
        except FileNotFoundError:
            return False
        return True

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies in it; FileNotFoundError where it is no directory."""
        listing = self.storage.list(self)
        return (self / name for name in (*listing.folders, *sorted(listing.files)))

    def __str__(self) -> str:
        return self.storage.address(self)

    __fspath__ = __str__  # no file has such a name: whoever opens it as one gets an error

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.storage is other.storage and self.inner == other.inner

    def __hash__(self) -> int:
        return hash((id(self.storage), self.inner))

    def __lt__(self, other: RemotePath) -> bool:
        return self.inner < other.inner


AnyPath = Path | RemotePath
"""A path wherever it is."""
