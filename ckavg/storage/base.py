"""The interface of storages, and paths that know theirs.

A path on this machine is a `pathlib.Path`. A path in a remote storage is a `RemotePath`: it is used like a `Path`, and
shown as the address that a user would type.
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
    """The names of files and of directories in a directory, sorted. What is not a directory counts as a file."""

    files: frozenset[str]
    folders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file, as its storage describes it.

    Attributes:
        nbytes: size in bytes.
        state: inode and time of modification in nanoseconds; None for a remote file.
        identity: of a remote file: a hash of its content, or another value that changes with it; None if unknown.
        is_hash: whether two files with the same identity have the same content.
        md5: of a remote file: the MD5 of its content in hexadecimal digits; if it was written in N parts, the MD5 of
            their MD5s, and `-N`. A store that encrypts may give another value of this form. None if unknown.
    """

    nbytes: int
    state: tuple[int, int] | None = None
    identity: str | None = None
    is_hash: bool = False
    md5: str | None = None


OnBytes = Callable[[int], None]
"""Called with the number of bytes received since the last call."""

Opened = tuple[FileInfo, Callable[[int], bytes]]
"""A file read from its beginning: its description, and a function that returns up to so many of its next bytes."""

AnyPath_contra = TypeVar("AnyPath_contra", contravariant=True)


class Storage(Protocol[AnyPath_contra]):
    """Where files are.

    Methods raise OSError if there is no such file or directory or it cannot be read, ValueError if the name is not
    possible, and for remote storages also HubError or ReadError.
    """

    def list(self, directory: AnyPath_contra) -> Listing:
        """The names in a directory."""

    def open(self, path: AnyPath_contra) -> AbstractContextManager[Opened]:
        """Read a plain file from its beginning."""

    def read(self, path: AnyPath_contra, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`; ReadError if they cannot be read."""

    def read_small(self, path: AnyPath_contra, most_bytes: int) -> bytes:
        """All bytes of a plain file; OSError if there are more than `most_bytes`."""


class Tree(Protocol):
    """A remote directory, on the Hub or in an object store, whose files do not change while they are read.

    Every method raises HubError or ReadError if it is refused, or the storage cannot be reached.

    Attributes:
        url: its address, as a user may type it.
        pinned_url: its address by commit, if there is one: it cannot come to mean something else.
        is_shared: whether downloads go into a cache shared with other programs, and stay there.
        is_offline: whether only earlier downloads can be read.
        directory: where downloads go.
    """

    url: str
    pinned_url: str
    is_shared: bool
    is_offline: bool
    directory: Path

    @property
    def files(self) -> Mapping[str, FileInfo]:
        """All files by relative path; listed once."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of a file, all of them or an error."""

    def local(self, name: str) -> Path | None:
        """Where a file is on this machine; None if it was not downloaded."""

    def download(self, name: str, on_bytes: OnBytes) -> Path:
        """Download a file, or its missing part; return its local path."""

    def remove_downloads(self) -> None:
        """Remove downloads that no other program uses."""

    def check_unchanged(self) -> None:
        """Raise ChangedError if a file has changed since it was listed."""


class RemotePath:
    """A path in a remote storage."""

    __slots__ = ("inner", "storage")

    def __init__(self, storage: RemoteStorage, inner: PurePosixPath = PurePosixPath()) -> None:  # noqa: B008 - a constant
        self.storage = storage
        self.inner = inner

    @property
    def name(self) -> str:
        """Like `Path.name`; for the root, the last part of its address."""
        return self.inner.name or self.storage.name

    @property
    def stem(self) -> str:
        """Like `Path.stem`."""
        return self.inner.stem

    @property
    def suffix(self) -> str:
        """Like `Path.suffix`."""
        return self.inner.suffix

    @property
    def parent(self) -> RemotePath:
        """Like `Path.parent`; for the root, the root."""
        return RemotePath(self.storage, self.inner.parent)

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        return RemotePath(self.storage, self.inner / name)

    def relative_to(self, other: AnyPath) -> PurePosixPath:
        """Like `Path.relative_to`; ValueError if it is not below the other."""
        if not (isinstance(other, RemotePath) and self.storage is other.storage):
            raise ValueError(f"{self} is not below {other}")
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
        """Like `Path.iterdir`; FileNotFoundError if it is not a directory."""
        listing = self.storage.list(self)
        return (self / name for name in (*listing.folders, *sorted(listing.files)))

    def __str__(self) -> str:
        return self.storage.address(self)

    __fspath__ = __str__  # no local file has such a name, so opening it fails

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.storage is other.storage and self.inner == other.inner

    def __hash__(self) -> int:
        return hash((id(self.storage), self.inner))

    def __lt__(self, other: RemotePath) -> bool:
        return self.inner < other.inner


AnyPath = Path | RemotePath
"""A local or a remote path."""
