"""Read local files with care, and limit where links inside a run may lead.

A downloaded run may hold anything: a pipe that never ends, a link to a secret, gigabytes of brackets. Nothing here
waits for a writer, and nothing is parsed whose values would not fit in memory.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ckavg.errors import CkavgError, CorruptFileError, ReadError
from ckavg.storage.atomic import resolved
from ckavg.storage.base import AnyPath, FileInfo, Listing, Opened, RemotePath, Storage

_MOST_VALUES = 2_000_000
"""Values in a JSON file, about 200 bytes each once parsed. Logs and indexes of real runs have a tenth of that."""

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a plain file for reading; refuse a pipe, a device or a directory instead of blocking on it.

    Raises:
        OSError: it is not a plain file, is a link and `follow` is False, or cannot be opened.
        ValueError: no file can have this name.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # opening a pipe must not wait for a writer
    handle = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return os.fdopen(handle, "rb")


def read_small(path: Path, most: int = 100_000_000, *, follow: bool = True) -> bytes:
    """The bytes of a plain file of at most `most` bytes; for `follow` see `open_regular`.

    Raises:
        OSError: it is not a plain file, is larger, or cannot be read.
        ValueError: no file can have this name.
    """
    with open_regular(path, follow=follow) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
        return file.read()


def parse_json(text: str | bytes, of_object: Callable[[dict[str, Any]], Any] = lambda found: found) -> Any:
    """Parse JSON; refuse duplicate names and numbers that are not finite.

    Args:
        text: the JSON.
        of_object: what is kept of each object, the innermost first; by default all of it.

    Raises:
        ValueError, RecursionError: it is not such a text.
    """

    def kept(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name appears twice")
        return of_object(found)

    return json.loads(text, object_pairs_hook=kept, parse_constant=_no_constant)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


class LocalStorage:
    """The file system of this machine; see `Storage`."""

    def list(self, directory: Path) -> Listing:
        """See `Storage`."""
        files: set[str] = set()
        folders: set[str] = set()
        with os.scandir(directory) as entries:
            for entry in entries:
                (folders if _is_folder(entry) else files).add(entry.name)
        return Listing(frozenset(files), tuple(sorted(folders)))

    @contextmanager
    def open(self, path: Path) -> Iterator[Opened]:
        """See `Storage`."""
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            yield FileInfo(status.st_size, (status.st_ino, status.st_mtime_ns)), file.read

    def read(self, path: Path, start: int, stop: int) -> bytes:
        """See `Storage`."""
        try:
            with open_regular(path) as file:
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise ReadError(f"{path} cannot be read: {error.strerror}.", hint="Check that you may read it.") from error

    def read_small(self, path: Path, most_bytes: int) -> bytes:
        """See `Storage`."""
        return read_small(path, most_bytes)


LOCAL = LocalStorage()


def storage_of(path: AnyPath) -> Storage[AnyPath]:
    """The storage of a path."""
    return cast("Storage[AnyPath]", path.storage if isinstance(path, RemotePath) else LOCAL)


def size_of(path: AnyPath) -> int:
    """Size of a file in bytes; OSError if it does not exist or cannot be accessed."""
    if not isinstance(path, RemotePath):
        return path.stat().st_size
    info = path.storage.info(path)
    if info is None:
        raise FileNotFoundError(f"{path} does not exist")
    return info.nbytes


def read_object(path: AnyPath, most_bytes: int, parse: Callable[[bytes], Any] = json.loads) -> dict[str, Any]:
    """The JSON object in a small file; empty if it holds another value. `parse` does what `json.loads` does.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not JSON, too large, or nested too deeply.
    """
    text = storage_of(path).read_small(path, most_bytes)
    if text.count(b",") + text.count(b"[") + text.count(b"{") > _MOST_VALUES:
        raise ValueError(f"{path} holds more than {_MOST_VALUES:,} values")
    try:
        parsed = parse(text)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    return parsed if isinstance(parsed, dict) else {}


@dataclass(frozen=True, slots=True)
class Bounds:
    """The directories that must contain the files of a checkpoint, with links followed.

    They are the checkpoint itself, the directory that the user named and, for a snapshot in the Hub's cache, the
    `blobs` beside `snapshots`, since all of its files are links into that. A remote storage has no links.
    """

    roots: tuple[Path, ...]

    @classmethod
    def of(cls, checkpoint: AnyPath, named: AnyPath) -> Bounds:
        """The bounds of a checkpoint; `named` is the source or the model given with `--init`."""
        if isinstance(checkpoint, RemotePath) or isinstance(named, RemotePath):
            return cls(())
        roots = [resolved(checkpoint), resolved(named)]
        roots += [
            above.parent / "blobs"
            for above in (*roots[1].parents, roots[1])
            if above.name == "snapshots" and above.parent
        ]
        return cls(tuple(dict.fromkeys(roots)))

    def hold(self, path: Path) -> bool:
        """Whether a path, with links followed, is in one of them."""
        parents = resolved(path).parents
        return any(root in parents for root in self.roots)


def problem_with(path: AnyPath, bounds: Bounds) -> CkavgError | None:
    """Why a file of a checkpoint must not be opened: it is not a plain file, or a link leads out of the checkpoint.

    None if it may be opened, and if there is no such file: opening it reports that.
    """
    if isinstance(path, RemotePath):
        return None
    try:
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            return None
        if stat.S_ISLNK(mode):
            mode = path.stat().st_mode
            if stat.S_ISREG(mode) and not bounds.hold(path):
                return ReadError(
                    f"{path} is a link to {resolved(path)}, outside the directory that was named: not followed.",
                    hint="If you trust the link, replace it with a copy of the file.",
                )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return ReadError(f"{path} cannot be read: {error.strerror}.", hint="Check that you may read it.")
    if stat.S_ISREG(mode):
        return None
    return CorruptFileError(
        f"{path} is {next((name for is_kind, name in _KINDS if is_kind(mode)), 'no file')}, expected a file.",
        hint="Save the checkpoint again, or leave it out with --from-step, --to-step or --last.",
    )


def is_link(path: AnyPath) -> bool:
    """Whether a path is a symbolic link; a remote storage has none."""
    return not isinstance(path, RemotePath) and path.is_symlink()


def walk(directory: AnyPath) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a directory: for each folder its relative path, its folders and its files.

    Links to folders are left out. Remove a folder from the list to skip it.
    """
    left = [""]
    while left:
        place = left.pop()
        listing = storage_of(directory).list(directory / place)
        folders = [name for name in listing.folders if not is_link(directory / place / name)]
        yield place, folders, sorted(listing.files)
        left += [f"{place}/{name}" if place else name for name in reversed(folders)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False
