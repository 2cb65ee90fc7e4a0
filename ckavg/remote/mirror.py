"""Stage *remote*: a directory that stands in for a run that is not here.

It has the names and the small files of the run. In the place of a weight file there is, while the run is opened, a
sparse file of its size with its header, so that everything is found and checked as in a run on this machine. Once that
is done, a link that leads nowhere takes its place: whoever reads it without fetching gets an error instead of zeros.
When a file is fetched whole, a link to it takes its place in turn.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import secrets
import shutil
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.run import Checkpoint, Fetching
from ckavg.checkpoints.same import read_bytes
from ckavg.errors import ReadError
from ckavg.remote.budget import Origin, plan_fetching
from ckavg.remote.heads import head_of
from ckavg.remote.parallel import Stopped, at_once
from ckavg.remote.store import OnBytes, Tree
from ckavg.storage.atomic import cache_directory, check_own, make_own_directory, open_own

_OPEN: weakref.WeakSet[Mirror] = weakref.WeakSet()

_VIEWS = "views"
_NAME = re.compile("[0-9]+-[0-9a-f]{8}")
_LOCK = ".lock"
_WEIGHTS = ".safetensors"
_NOT_HERE = "not-on-this-machine"


class Mirror:
    """The stand-in for a run. It is removed with the object, or by the next one after a crash.

    Args:
        name: the name of its directory.
        max_disk: how many bytes may be fetched to the disk; None: as many as there is room for.
    """

    def __init__(self, name: str, *, max_disk: int | None = None) -> None:
        self._max_disk = max_disk
        home = cache_directory() / _VIEWS
        self._own = home / f"{os.getpid()}-{secrets.token_hex(4)}"
        self.root = self._own / (name or "run")
        try:
            make_own_directory(home)
            _tidy(home)
            self._own.mkdir(mode=0o700)
            lock = os.open(self._own / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.root.mkdir()
        except OSError as error:
            raise ReadError(
                f"{error.filename or self._own} cannot be made: {error.strerror}.",
                hint="It stands in for the run while that is read. Name a directory of yours with XDG_CACHE_HOME.",
            ) from error
        self._finalizer = weakref.finalize(self, _end, self._own, lock)
        self._writes = threading.Lock()
        _OPEN.add(self)
        self.weights: dict[Path, Origin] = {}
        self._names: dict[Path, str] = {}
        self._pinned: dict[Path, str] = {}
        self._trees: list[Tree] = []
        self._opened: set[Path] = set()

    def add(self, place: Path, tree: Tree, names: Iterable[str], *, prefix: str = "", url: str | None = None) -> None:
        """Show files of a tree in a directory of the mirror: weights by their size, others by their name alone.

        Args:
            place: the directory; it is made.
            tree: where they are.
            names: their paths in the tree.
            prefix: what their paths begin with there, and not here.
            url: what the directory stands for.
        """
        self.stand_for(place, url or tree.url)
        self._pinned[place] = f"{tree.pinned_url}/{prefix}".rstrip("/")
        if tree not in self._trees:
            self._trees.append(tree)
        with self._writing(place):
            place.mkdir(parents=True, exist_ok=True)
        for name in names:
            path = place / _checked(name.removeprefix(prefix))
            with self._writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                origin = Origin(tree, name)
                if path.name.endswith(_WEIGHTS):
                    self.weights[path] = origin
                    with path.open("wb") as file:
                        file.truncate(origin.file.size)
                elif path.name == RESULT_RECORD:
                    path.touch()
                else:
                    path.symlink_to(_NOT_HERE)

    def stand_for(self, place: Path, url: str) -> None:
        """Say what a place in the mirror is called elsewhere."""
        self._names[place] = url

    def bring(self, place: Path, tree: Tree, names: Iterable[str], *, prefix: str = "") -> None:
        """Fetch small files whole, and copy them to their places."""

        def one(name: str) -> None:
            path = place / _checked(name.removeprefix(prefix))
            kept = tree.fetch(name, lambda _: None) if tree.keeps else None
            data = b"" if kept is not None else tree.read(name, 0, tree.files[name].size)
            with self._writing(path):
                path.unlink(missing_ok=True)
                if kept is not None:
                    shutil.copyfile(kept, path)
                else:
                    path.write_bytes(data)

        at_once(one, list(names))

    def open_headers(self, paths: Iterable[Path]) -> None:
        """Put the headers of weight files into their places."""

        def one(path: Path) -> None:
            origin = self.weights[path]
            head = head_of(origin.tree, origin.name)
            with self._writing(path), path.open("r+b") as file:
                file.write(head)
            self._opened.add(path)

        at_once(one, [path for path in paths if path not in self._opened])

    def peek(self, path: Path, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of a weight file, wherever it is.

        Raises:
            HubError, ReadError: they could not be fetched.
        """
        return self.read(path, start, stop) if path in self.weights else read_bytes(path, start, stop)

    def seal(self) -> None:
        """Put links in the place of all weight files: to those that are on this machine whole, else to nowhere."""
        for path, origin in self.weights.items():
            self._link(path, origin.tree.kept(origin.name))

    @property
    def is_offline(self) -> bool:
        """Whether nothing can be read but what was fetched before."""
        return any(tree.is_offline for tree in self._trees)

    def holds(self, path: Path) -> bool:
        """See `Remote`."""
        return path == self._own or self._own in path.parents

    def identified(self, checkpoint: Checkpoint) -> Checkpoint:
        """With what tells the content of its weight files from any other."""
        shards = tuple(
            dataclasses.replace(shard, state=None, identity=self.identity(shard.path))
            if shard.path in self.weights
            else shard
            for shard in checkpoint.shards
        )
        return dataclasses.replace(checkpoint, shards=shards)

    def identity(self, path: Path) -> str:
        """What tells the content of a weight file from any other; another one each time where nothing does."""
        origin = self.weights[path]
        file = origin.file
        if file.identity is None:
            return secrets.token_hex(16)
        return file.identity if file.is_hash else f"{origin.tree.url}/{origin.name} {file.identity}"

    def content_hash(self, path: Path) -> str | None:
        """A hash of the content of a weight file; None where it is not known, or the file is of this machine."""
        origin = self.weights.get(path)
        return origin.file.identity if origin is not None and origin.file.is_hash else None

    def named(self, path: Path) -> str:
        """See `Remote`."""
        return _outside(path, self._names)

    def pinned(self, path: Path) -> str:
        """See `Remote`."""
        return _outside(path, self._pinned)

    def told(self, text: str) -> str:
        """A text with the places in the mirror as users know them."""
        for place in sorted(self._names, key=lambda each: -len(str(each))):
            text = text.replace(str(place), self._names[place])
        return text

    def is_far(self, path: Path) -> bool:
        """See `Remote`."""
        return path in self.weights and not path.exists()

    def read(self, path: Path, start: int, stop: int) -> bytes:
        """See `Remote`."""
        origin = self.weights[path]
        return origin.tree.read(origin.name, start, stop)

    def plan(self, readings: Mapping[Path, float], *, other_bytes: int) -> Fetching:
        """See `Remote`."""
        known = {path: self.weights[path] for path in readings if path in self.weights}
        far = frozenset(path for path in known if readings[path] and self.is_far(path))
        return plan_fetching(known, far, readings, max_disk=self._max_disk, other_bytes=other_bytes)

    def fetch(self, fetching: Fetching, on_bytes: OnBytes) -> None:
        """See `Remote`."""
        came: deque[int] = deque()
        over = threading.Event()

        def count(nbytes: int) -> None:
            if over.is_set():
                raise Stopped
            came.append(nbytes)

        def one(path: Path) -> None:
            origin = self.weights[path]
            place = origin.tree.fetch(origin.name, count)
            self._link(path, place)

        def tell() -> None:
            while came:
                on_bytes(came.popleft())

        try:
            at_once(one, fetching.whole, meanwhile=tell)
        finally:
            over.set()

    def check_unchanged(self) -> None:
        """See `Remote`."""
        for tree in self._trees:
            tree.check_unchanged()

    def release(self) -> None:
        """See `Remote`."""
        for tree in self._trees:
            tree.drop()

    def close(self) -> None:
        """Remove it. A thread that is still busy writes nothing more."""
        with self._writes:
            self._finalizer()

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        with self._writes:
            if not self._finalizer.alive:
                raise Stopped
            try:
                yield
            except OSError as error:
                raise ReadError(
                    f"{path} cannot be written: {error.strerror or error}.",
                    hint="It stands in for the run while that is read.",
                ) from error

    def _link(self, path: Path, target: Path | None) -> None:
        with self._writing(path):
            path.unlink(missing_ok=True)
            path.symlink_to(_NOT_HERE if target is None else target)


def _outside(path: Path, names: Mapping[Path, str]) -> str:
    for above in (path, *path.parents):
        if above in names:
            rest = path.relative_to(above).as_posix()
            return names[above] if rest == "." else f"{names[above]}/{rest}"
    return str(path)


def close_all() -> None:
    """Remove all mirrors, for a process that ends without the usual clean-up."""
    for mirror in list(_OPEN):
        mirror.close()


def _checked(name: str) -> str:
    """A path that stays within the directory it is taken to."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise ReadError(f"{name!r} is listed as a file of the run, and leads out of it.", hint="It is not trusted.")
    return name


def _tidy(home: Path) -> None:
    """Remove what processes have left that are no more."""
    for left in home.iterdir():
        if not _NAME.fullmatch(left.name):
            continue
        with suppress(OSError):
            check_own(left, directory=True)
            (left / _LOCK).lstat()  # one that has none yet is just being made
            with os.fdopen(open_own(left / _LOCK, os.O_RDWR), "r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)


def _end(directory: Path, lock: int) -> None:
    _remove(directory)
    os.close(lock)


def _remove(directory: Path) -> None:
    """All of it, the lock last: what a thread that is still busy adds meanwhile, the next process removes."""
    with suppress(OSError):
        for path in directory.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path, ignore_errors=True)
        if [path.name for path in directory.iterdir()] == [_LOCK]:
            shutil.rmtree(directory, ignore_errors=True)
