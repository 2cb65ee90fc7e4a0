"""A run elsewhere as a storage: its listing is taken once, its weights are fetched whole or read by ranges."""

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
"""How much of a file is read for its header at first; most headers are shorter."""

_LEFT_FREE = 1 << 30
"""What is left of a disk whatever happens."""


class RemoteStorage:
    """The files of an address; see `Storage`.

    Args:
        address: what the user typed.
        trees: the directories that it consists of, each under its name; one alone, under `""`, is the root.
        max_disk: how many bytes may be downloaded; None: as many as there is room for.
        show: which files there are, by path; the others are not seen.
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
        """What the address names."""
        return RemotePath(self)

    @property
    def is_offline(self) -> bool:
        """Whether nothing can be read but what was downloaded before."""
        return any(tree.is_offline for tree in self.trees.values())

    @property
    def has_revisions(self) -> bool:
        """Whether it consists of revisions of a repository, each of them a folder of the root."""
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
            raise FileNotFoundError(errno.ENOENT, "there is no such directory", str(directory))
        return found

    def info(self, path: RemotePath) -> FileInfo | None:
        """What a file is; None where there is none."""
        try:
            tree, name = self._file(path)
        except FileNotFoundError:
            return None
        return tree.files[name]

    @contextmanager
    def open(self, path: RemotePath) -> Iterator[Opened]:
        """See `Storage`. The first bytes are fetched at once, for a header begins there."""
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
        """See `Storage`. It is fetched once."""
        tree, name = self._file(path)
        if tree.files[name].nbytes > most_bytes:
            raise OSError(errno.EFBIG, f"larger than {most_bytes:,} bytes", str(path))
        if path.inner not in self._small:
            self._small[path.inner] = self._read_whole(path)
        return self._small[path.inner]

    def put(self, path: RemotePath, data: bytes) -> None:
        """Write a small file, in one attempt; WriteError where it cannot be."""
        tree, inner = self.within(path)
        if not isinstance(tree, ObjectTree):
            raise WriteError(f"{path} cannot be written: the Hub takes commits.", hint="Keep it on this machine.")
        tree.put(inner.as_posix(), data, is_vital=False)

    def local(self, path: RemotePath) -> Path | None:
        """Where a file is on this machine, if it was downloaded."""
        tree, name = self._file(path)
        return tree.local(name)

    def download(self, path: RemotePath, on_bytes: OnBytes) -> Path:
        """Download a file, or what is missing of it; return where it is then."""
        tree, name = self._file(path)
        return tree.download(name, on_bytes)

    def address(self, path: RemotePath, *, is_pinned: bool = False) -> str:
        """What a user would type for a path.

        Args:
            path: any path in it.
            is_pinned: by what cannot come to mean something else: a commit instead of a branch, where there is one.
        """
        url, inner = self._url, path.inner
        if not self.has_revisions or inner.parts:
            tree, inner = self.within(path)
            url = tree.pinned_url if is_pinned else tree.url
        return f"{url}/{inner}" if inner.parts else url

    def identity(self, path: RemotePath) -> str:
        """What tells the content of a file from any other; another one each time where nothing does."""
        tree, name = self._file(path)
        info = tree.files[name]
        if info.identity is None:
            return secrets.token_hex(16)
        return info.identity if info.is_hash else f"{tree.url}/{name} {info.identity}"

    def prefetch(self, paths: Iterable[RemotePath], *, heads: bool = False) -> None:
        """Fetch several small files at the same time, so that they are here when they are read; or heads of weights."""
        fetched = self._heads if heads else self._small
        wanted = [path for path in paths if path.inner not in fetched and path.is_file()]
        fetch = (lambda path: self.read(path, 0, HEAD_BYTES)) if heads else self._read_whole
        fetched |= zip((path.inner for path in wanted), thread_map(fetch, wanted), strict=True)

    def check_unchanged(self) -> None:
        """Raise ChangedError where a file is another one than when it was listed."""
        for tree in self.trees.values():
            tree.check_unchanged()

    def remove_downloads(self) -> None:
        """Remove what was downloaded and is of no use to anybody else."""
        for tree in self.trees.values():
            tree.remove_downloads()

    def within(self, path: RemotePath) -> tuple[Tree, PurePosixPath]:
        """The directory of a path, and the path in it."""
        if not self.has_revisions:
            return self.trees[""], path.inner
        first, *rest = path.inner.parts or ("",)
        if first not in self.trees:
            raise FileNotFoundError(errno.ENOENT, "there is no such directory", f"{self._url}/{path.inner}")
        return self.trees[first], PurePosixPath(*rest)

    def _file(self, path: RemotePath) -> tuple[Tree, str]:
        tree, inner = self.within(path)
        name = inner.as_posix()
        if name not in tree.files or not self._show(name):
            raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
        return tree, name

    def _read_whole(self, path: RemotePath) -> bytes:
        tree, name = self._file(path)
        if tree.is_shared:  # it is in the cache then, for those who work offline later
            tree.download(name, lambda _: None)
        return self.read(path, 0, tree.files[name].nbytes)


def _list_folders(names: Iterable[str]) -> Mapping[PurePosixPath, Listing]:
    """All directories that files lie in, by path.

    Raises:
        ReadError: a name leads out of where it is listed.
    """
    files: dict[PurePosixPath, set[str]] = defaultdict(set)
    folders: dict[PurePosixPath, set[str]] = defaultdict(set)
    files[PurePosixPath()] = set()
    for name in names:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ReadError(f"{name!r} is listed as a file of the run, and leads out of it.", hint="It is not trusted.")
        files[path.parent].add(path.name)
        for folder in path.parents[:-1]:
            folders[folder.parent].add(folder.name)
    return {each: Listing(frozenset(files[each]), tuple(sorted(folders[each]))) for each in {*files, *folders}}


def open_storage(
    address: Address, *, max_disk: int | None = None, show: Callable[[str], bool] = lambda name: True
) -> RemoteStorage:
    """The files of an address that names one place; `max_disk` and `show` as of `RemoteStorage`.

    Raises:
        HubError: there is no such revision, or the Hub refused, or cannot be reached.
    """
    is_hub = address.is_hub
    tree = Repository(address.place).tree(address.revision, address.folder) if is_hub else ObjectTree(address)
    return RemoteStorage(address, {"": tree}, max_disk=max_disk, show=show)


def storages_of(paths: Iterable[AnyPath]) -> list[RemoteStorage]:
    """The storages elsewhere that paths are of."""
    return list({id(path.storage): path.storage for path in paths if isinstance(path, RemotePath)}.values())


def local_path(path: AnyPath) -> Path | None:
    """Where a file is on this machine; None where it is not."""
    return path.storage.local(path) if isinstance(path, RemotePath) else path


# --- what is downloaded whole ---


@dataclass(frozen=True, slots=True)
class Fetching:
    """What is fetched of weights elsewhere, and how.

    Attributes:
        whole: files that are downloaded before they are read.
        whole_bytes: size of these.
        kept_bytes: size of those that are on this machine already.
        streamed_bytes: what is fetched as it is read, and never written.
        directory: where what is downloaded goes.
        room: how many bytes there is room for, or was asked for at most.
    """

    whole: tuple[RemotePath, ...]
    whole_bytes: int
    kept_bytes: int
    streamed_bytes: int
    directory: Path
    room: int


def plan_fetching(readings: Mapping[RemotePath, float], *, other_bytes: int) -> Fetching:
    """Say what is downloaded: what a disk is of use for, as far as there is room.

    It is of use where it saves a second reading, or where the file is of use to others, too. Without a bound, all of it
    goes to the disk or nothing does: nobody asked to fill it.

    Args:
        readings: how often each weight file is read; less than once where only a sample is.
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
    """Download files, several at the same time; an earlier attempt is continued. `on_bytes` is called in this thread.

    Raises:
        HubError, ReadError: one could not be downloaded. What came of it stays.
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
    """How much room there is where a directory is, or will be."""
    for each in (directory, *directory.parents):
        with suppress(OSError):
            return shutil.disk_usage(each).free
    return 0
