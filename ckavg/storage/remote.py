"""A remote run as a storage: listed once, its weights downloaded whole or read by ranges."""

from __future__ import annotations

import errno
import secrets
import shutil
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ckavg.errors import ReadError, WriteError
from ckavg.storage.address import Address
from ckavg.storage.atomic import cache_directory
from ckavg.storage.base import AnyPath, FileInfo, Listing, OnBytes, Opened, RemotePath, Tree
from ckavg.storage.download import Stopped, thread_map
from ckavg.storage.hub import Repository
from ckavg.storage.objects import ObjectTree

HEAD_BYTES = 64 << 10
"""First read of a file for its header; most headers are shorter."""

_LEFT_FREE = 1 << 30
"""Bytes that are always left free on a disk."""


class RemoteStorage:
    """The files of an address; see `Storage`.

    Args:
        address: what the user typed.
        trees: its directories by name; a single one under `""` is the root.
        max_disk: how many bytes may be downloaded; None: as many as there is room for.
        show: whether a file is visible, by its path.
    """

    def __init__(
        self,
        address: Address,
        trees: Mapping[str, Tree],
        *,
        max_disk: int | None = None,
        show: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.name = address.name
        self.trees = trees
        self.max_disk = max_disk
        self._url = str(address)
        self._show = show
        self._listings: dict[int, Mapping[PurePosixPath, Listing]] = {}
        self._small: dict[PurePosixPath, bytes] = {}
        self._heads: dict[PurePosixPath, bytes] = {}

    @property
    def root(self) -> RemotePath:
        """The path of the address itself."""
        return RemotePath(self)

    @property
    def is_offline(self) -> bool:
        """Whether only earlier downloads can be read."""
        return any(tree.is_offline for tree in self.trees.values())

    @property
    def has_revisions(self) -> bool:
        """Whether its folders are revisions of a repository."""
        return "" not in self.trees

    def list(self, directory: RemotePath) -> Listing:
        """See `Storage`."""
        if directory == self.root and self.has_revisions:
            return Listing(frozenset(), tuple(sorted(self.trees)))
        tree, inner = self.within(directory)
        if id(tree) not in self._listings:
            self._listings[id(tree)] = _list_folders(filter(self._show, tree.files))
        found = self._listings[id(tree)].get(inner)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(directory))
        return found

    def info(self, path: RemotePath) -> FileInfo | None:
        """The description of a file; None if it does not exist."""
        try:
            tree, name = self._file(path)
        except FileNotFoundError:
            return None
        return tree.files[name]

    @contextmanager
    def open(self, path: RemotePath) -> Iterator[Opened]:
        """See `Storage`. The first bytes are fetched in one request, since the header is there."""
        tree, name = self._file(path)
        head, done = self._heads.pop(path.inner, b"") or self.read(path, 0, HEAD_BYTES), 0

        def read(count: int) -> bytes:
            nonlocal head, done
            begin, done = done, done + count
            if done > len(head):
                head += self.read(path, len(head), done)
            return head[begin:done]

        yield tree.files[name], read

    def read(self, path: RemotePath, start: int, stop: int) -> bytes:
        """See `Storage`."""
        tree, name = self._file(path)
        stop = min(stop, tree.files[name].nbytes)
        if start >= stop:
            return b""
        local = tree.local(name)
        if local is None:
            return tree.read(name, start, stop)
        with local.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def read_small(self, path: RemotePath, most_bytes: int) -> bytes:
        """See `Storage`. The file is downloaded once."""
        tree, name = self._file(path)
        if tree.files[name].nbytes > most_bytes:
            raise OSError(errno.EFBIG, f"larger than {most_bytes:,} bytes", str(path))
        if path.inner not in self._small:
            self._small[path.inner] = self._read_whole(path)
        return self._small[path.inner]

    def put(self, path: RemotePath, data: bytes) -> None:
        """Write a small file, without retries; WriteError if that fails."""
        tree, inner = self.within(path)
        if not isinstance(tree, ObjectTree):
            raise WriteError(
                f"{path} cannot be written: the Hub accepts only commits.", hint="Write it to this machine."
            )
        tree.put(inner.as_posix(), data, is_vital=False)

    def local(self, path: RemotePath) -> Path | None:
        """Where a file is on this machine; None if it was not downloaded."""
        tree, name = self._file(path)
        return tree.local(name)

    def download(self, path: RemotePath, on_bytes: OnBytes) -> Path:
        """Download a file, or its missing part; return its local path."""
        tree, name = self._file(path)
        return tree.download(name, on_bytes)

    def address(self, path: RemotePath, *, is_pinned: bool = False) -> str:
        """What a user would type for a path.

        Args:
            path: any path in it.
            is_pinned: with the commit instead of the branch, if there is one.
        """
        url, inner = self._url, path.inner
        if not self.has_revisions or inner.parts:
            tree, inner = self.within(path)
            url = tree.pinned_url if is_pinned else tree.url
        return f"{url}/{inner}" if inner.parts else url

    def identity(self, path: RemotePath) -> str:
        """A value that identifies the content of a file; new each time if the storage gives none."""
        tree, name = self._file(path)
        info = tree.files[name]
        if info.identity is None:
            return secrets.token_hex(16)
        return info.identity if info.is_hash else f"{tree.url}/{name} {info.identity}"

    def prefetch(self, paths: Iterable[RemotePath], *, heads: bool = False) -> None:
        """Download several small files at the same time, before they are read; with `heads`, the headers of weights."""
        fetched = self._heads if heads else self._small
        wanted = [path for path in paths if path.inner not in fetched and path.is_file()]
        fetch = (lambda path: self.read(path, 0, HEAD_BYTES)) if heads else self._read_whole
        fetched |= zip((path.inner for path in wanted), thread_map(fetch, wanted), strict=True)

    def check_unchanged(self) -> None:
        """Raise ChangedError if a file has changed since it was listed."""
        for tree in self.trees.values():
            tree.check_unchanged()

    def remove_downloads(self) -> None:
        """Remove downloads that no other program uses."""
        for tree in self.trees.values():
            tree.remove_downloads()

    def within(self, path: RemotePath) -> tuple[Tree, PurePosixPath]:
        """The tree of a path, and the path in it."""
        if not self.has_revisions:
            return self.trees[""], path.inner
        first, *rest = path.inner.parts or ("",)
        if first not in self.trees:
            raise FileNotFoundError(errno.ENOENT, "no such directory", f"{self._url}/{path.inner}")
        return self.trees[first], PurePosixPath(*rest)

    def _file(self, path: RemotePath) -> tuple[Tree, str]:
        tree, inner = self.within(path)
        name = inner.as_posix()
        if name not in tree.files or not self._show(name):
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return tree, name

    def _read_whole(self, path: RemotePath) -> bytes:
        tree, name = self._file(path)
        if tree.is_shared:  # puts it in the cache, for offline use later
            tree.download(name, lambda _: None)
        return self.read(path, 0, tree.files[name].nbytes)


def _list_folders(names: Iterable[str]) -> Mapping[PurePosixPath, Listing]:
    """The listing of every directory, from the names of files.

    Raises:
        ReadError: a name leads out of the run.
    """
    files: dict[PurePosixPath, set[str]] = defaultdict(set)
    folders: dict[PurePosixPath, set[str]] = defaultdict(set)
    files[PurePosixPath()] = set()
    for name in names:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ReadError(f"The listed file {name!r} leads out of the run.", hint="Do not trust this source.")
        files[path.parent].add(path.name)
        for folder in path.parents[:-1]:
            folders[folder.parent].add(folder.name)
    return {each: Listing(frozenset(files[each]), tuple(sorted(folders[each]))) for each in {*files, *folders}}


def open_storage(
    address: Address, *, max_disk: int | None = None, show: Callable[[str], bool] = lambda name: True
) -> RemoteStorage:
    """The storage of an address without patterns; for `max_disk` and `show` see `RemoteStorage`.

    Raises:
        HubError: there is no such revision, or the Hub refused, or cannot be reached.
    """
    is_hub = address.is_hub
    tree = Repository(address.place).tree(address.revision, address.folder) if is_hub else ObjectTree(address)
    return RemoteStorage(address, {"": tree}, max_disk=max_disk, show=show)


def storages_of(paths: Iterable[AnyPath]) -> list[RemoteStorage]:
    """The remote storages of some paths."""
    return list({id(path.storage): path.storage for path in paths if isinstance(path, RemotePath)}.values())


def local_path(path: AnyPath) -> Path | None:
    """Where a file is on this machine; None if it is not."""
    return path.storage.local(path) if isinstance(path, RemotePath) else path


# --- whole downloads ---


@dataclass(frozen=True, slots=True)
class Fetching:
    """How remote weights are fetched.

    Attributes:
        whole: files to download before they are read.
        whole_bytes: their size.
        kept_bytes: size of the files that are downloaded already.
        streamed_bytes: bytes to fetch as they are read, never written to disk.
        directory: where downloads go.
        room: free bytes on disk, or the requested limit.
    """

    whole: tuple[RemotePath, ...]
    whole_bytes: int
    kept_bytes: int
    streamed_bytes: int
    directory: Path
    room: int


def plan_fetching(readings: Mapping[RemotePath, float], *, other_bytes: int) -> Fetching:
    """Decide which files to download, within the room on disk, and which to stream.

    A download pays off if a file is read more than once, or if the cache is shared with other programs. Without a
    requested limit, all such files are downloaded or none: the disk is not filled unasked.

    Args:
        readings: how often each weight file is read; less than 1 for a sample.
        other_bytes: what else will be written to the disk.
    """
    trees = {path: path.storage.within(path)[0] for path in readings}
    sizes = {path: info.nbytes for path in readings if (info := path.storage.info(path)) is not None}
    here = {path for path in readings if path.storage.local(path) is not None}
    directory = next((tree.directory for tree in trees.values()), cache_directory())
    bounds = [storage.max_disk for storage in storages_of(readings) if storage.max_disk is not None]
    room = left = min([_free_bytes(directory) - other_bytes - _LEFT_FREE, *bounds])
    whole: list[RemotePath] = []
    wanted = [path for path, count in readings.items() if path not in here and count >= 2 - trees[path].is_shared]
    for path in wanted:
        if sizes[path] <= left:
            left -= sizes[path]
            whole.append(path)
    if not bounds and len(whole) < len(wanted):
        whole = []
    return Fetching(
        whole=tuple(whole),
        whole_bytes=sum(sizes[path] for path in whole),
        kept_bytes=sum(sizes[path] for path in here if readings[path]),
        streamed_bytes=int(sum(sizes[path] * readings[path] for path in readings.keys() - here.union(whole))),
        directory=directory,
        room=max(0, room),
    )


def download_all(paths: Collection[RemotePath], on_bytes: OnBytes) -> None:
    """Download files, several at the same time, continuing earlier attempts. `on_bytes` is called in this thread.

    Raises:
        HubError, ReadError: a download failed. The part received so far stays.
    """
    came: deque[int] = deque()
    over = threading.Event()

    def count(nbytes: int) -> None:
        if over.is_set():
            raise Stopped
        came.append(nbytes)

    def tell() -> None:
        while came:
            on_bytes(came.popleft())

    try:
        thread_map(lambda path: path.storage.download(path, count), list(paths), meanwhile=tell)
    finally:
        over.set()


def _free_bytes(directory: Path) -> int:
    """Free bytes on the disk of a directory that need not exist yet."""
    for each in (directory, *directory.parents):
        with suppress(OSError):
            return shutil.disk_usage(each).free
    return 0
