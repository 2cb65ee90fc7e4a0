"""Fills a result under a temporary name, so that it appears complete or not at all.

Of what killed processes left, work that can continue is reported, the rest is removed, and an earlier result that was
moved aside is moved back.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ckavg.engine.distributed import AGREED, JOURNAL
from ckavg.engine.job import RANK_FILE
from ckavg.engine.members import look_at
from ckavg.errors import MissingPartsError, OutputError, OutputExistsError, is_passing
from ckavg.output.output_path import (
    PARTIAL,
    REPLACED,
    beside,
    check_names,
    check_partial,
    check_replaceable,
    clear_replaced,
    empty,
    is_work_file,
    remove,
    restore,
)
from ckavg.output.weight_files import write_errors
from ckavg.storage.atomic import open_own, resolved
from ckavg.storage.journal import Journal, is_of
from ckavg.storage.local import open_regular

_KEY = f"{JOURNAL}0"
"""The file that identifies the work that the weight files belong to."""

_SECONDS_TO_ENTER = 10.0
_SECONDS_LEFT_ALONE = 3600
"""Some network file systems keep locks to one machine, so recent files may belong to a process on another machine."""


class Staging:
    """A directory `.<name>.ckavg-partial` beside `out`, which `commit` renames to `out`.

    A context manager. Leaving it without a commit removes what was written, unless enough is finished to continue
    later: then it stays, with a journal of finished blocks. In a job of several processes, the first does all of this.

    Args:
        out: the final directory.
        force: replace an existing result. Anything else that exists is never touched.
        files: names of the files of one output, to recognize a result whose record was damaged.

    Attributes:
        path: the directory that is filled.
        begin_part: for an independent part, which shares the directory with other parts: called with the directory, and
            whether this process is alone in it.

    Raises:
        OutputError: another process is writing the same result.
        OutputExistsError: something foreign has a name that ckavg needs.
        WriteError: the directory cannot be written.
    """

    def __init__(self, out: Path, *, force: bool = False, files: Collection[str] = ()) -> None:
        self._out = resolved(out)
        self._force = force
        self._files = files
        self.path = beside(self._out, PARTIAL)
        self._replaced = beside(self._out, REPLACED)
        self._made: list[Path] = []
        self._lock: int | None = None
        self._committed = False
        self.begin_part: Callable[[Path, bool], None] | None = None
        self._keeps = False

    def __enter__(self) -> Staging:
        with write_errors(self._out.parent):
            try:
                check_names(self._out)
                self._make_parents()
                self.path.mkdir(exist_ok=True)
                begin = self.begin_part
                self._lock = _lock(self.path, self._files) if begin is None else self._enter_part(begin)
                if self._lock is None:
                    raise OutputError(
                        f"Another ckavg is writing {self._out.name}.",
                        hint="Wait for it, or choose another place with --out.",
                    )
                if begin is None:
                    clear_replaced(self._out)
                self._check_out()
            except BaseException:
                self._clean_up()
                raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.begin_part is not None:
            self._leave_part(failed=error is not None)
        elif error is not None and self._keeps and not self._committed and is_passing(error):
            if not isinstance(error, MissingPartsError):
                error.add_note(
                    f"Finished work is kept in {self.path}: the same command continues from there. "
                    "Delete that directory to start over."
                )
            self._close()
        else:
            self._clean_up()

    def holds(self, key: str, sizes: Mapping[Path, int]) -> bool:
        """Whether an interrupted attempt with this key has left its weight files here, with these sizes."""
        return is_of(self.path / _KEY, key) and self.has_files(sizes)

    def has_files(self, sizes: Mapping[Path, int]) -> bool:
        """Whether these files are here, with these sizes."""
        try:
            states = [((self.path / name).lstat(), size) for name, size in sizes.items()]
        except OSError:
            return False
        return all(stat.S_ISREG(state.st_mode) and state.st_size == size for state, size in states)

    def begin(self, key: str, *, but: tuple[str, ...] = ()) -> None:
        """Remove everything here except files whose names begin with `but`, and note the key of the new work."""
        with write_errors(self.path):
            empty(self.path, but=but)
        self.say(key)

    def say(self, key: str) -> None:
        """Note the key of the work that the weight files here belong to."""
        with write_errors(self.path):
            Journal(self.path / _KEY, key).close()

    def forget_processes(self) -> None:
        """Remove the files by which the processes of an earlier job knew of each other."""
        with write_errors(self.path):
            for path in [path for path in self.path.iterdir() if path.name.startswith((RANK_FILE, AGREED))]:
                path.unlink()

    def keep(self) -> None:
        """Keep the directory after an interrupt: enough is finished to continue."""
        self._keeps = True

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with write_errors(self.path / name):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(open_own(target, os.O_WRONLY | os.O_TRUNC), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def commit(self) -> None:
        """Rename it to its final name, after all files have been synced.

        Raises:
            OutputExistsError: something has appeared there since the work began.
            WriteError: it cannot be renamed; what has the final name is unchanged.
        """
        with write_errors(self._out):
            for ours in [path for path in self.path.iterdir() if is_work_file(path.name)]:
                ours.unlink()
            for directory, _, _ in os.walk(self.path):
                _sync(Path(directory))
            replaces = self._check_out()
            if replaces:
                self._out.rename(self._replaced)
            try:
                self.path.rename(self._out)
            except BaseException:  # also an interrupt
                if replaces and not self._out.exists():
                    self._replaced.rename(self._out)
                raise
            self._committed = True
            with suppress(OSError):  # the result is complete; only a power cut within seconds could undo the rename
                _sync(self._out.parent)
            if replaces:
                remove(self._replaced)

    def _check_out(self) -> bool:
        """Whether there is a result to replace. Refuses anything that must not be replaced or is in the way."""
        if not (self._out.exists() and any(self._out.iterdir())):
            return False
        check_replaceable(self._out, force=self._force, files=self._files)
        if os.path.lexists(self._replaced):
            raise OutputExistsError(
                f"{self._replaced} exists and is not an intact earlier result of ckavg.",
                hint="It was not touched. Move it away, or choose another place with --out.",
            )
        return True

    def _enter_part(self, begin: Callable[[Path, bool], None]) -> int | None:
        """A lock that parts share; None if a process that is not a part holds the lock."""
        end = time.monotonic() + _SECONDS_TO_ENTER  # a process that only checks the lock holds it for a moment
        while time.monotonic() < end:
            is_alone = (handle := _lock(self.path, self._files)) is not None
            if handle is None and (handle := _lock(self.path, is_shared=True)) is None:
                time.sleep(0.05)
                continue
            try:
                begin(self.path, is_alone)
                fcntl.flock(handle, fcntl.LOCK_SH)
            except BaseException:
                os.close(handle)
                raise
            return handle
        return None

    def _leave_part(self, *, failed: bool) -> None:
        """Keep what parts have finished; remove the directory if that is nothing and no part is running."""
        if failed and self._lock is not None:
            with suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not is_worth_continuing(self.path):
                    self._clean_up()
        self._close()

    def _make_parents(self) -> None:
        for parent in reversed([parent for parent in self._out.parents if not parent.exists()]):
            parent.mkdir()
            self._made.append(parent)

    def _clean_up(self) -> None:
        if not self._committed:
            if self._lock is not None:
                remove(self.path)
            with suppress(OSError):
                for parent in reversed(self._made):
                    parent.rmdir()
        self._close()

    def _close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Whether no process works on a directory; none can begin inside this context. True if there is no directory."""
    try:
        handle = _lock(path)
    except OSError as error:
        yield isinstance(error, FileNotFoundError)
        return
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _lock(path: Path, files: Collection[str] | None = None, *, is_shared: bool = False) -> int | None:
    """Lock a directory until the handle is closed; None if another process holds the lock.

    The lock is on the directory itself. A lock file beside it could be planted, would stay behind, and would lock
    nothing once the directory has been renamed.

    Raises:
        OutputExistsError: given `files`, those of the future result: the directory has foreign files.
        OSError: it is not a directory, or cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if not is_shared and any((seen := look_at(each)) and seen[1] for each in path.glob(f"{RANK_FILE}*")):
            raise BlockingIOError
        if (files is not None or is_shared) and os.fstat(handle).st_ino != path.lstat().st_ino:
            raise BlockingIOError
        if files is not None:
            check_partial(path, files)
        return handle
    except BaseException as error:
        os.close(handle)
        if isinstance(error, BlockingIOError | FileNotFoundError):  # or renamed, or removed
            return None
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class Leftover:
    """An interrupted average that its command would continue: its directory, and its size in bytes."""

    path: Path
    nbytes: int

    def __str__(self) -> str:
        return (
            f"{self.path} holds {self.nbytes / 1e6:,.0f} MB of an interrupted average. "
            "Its command continues it; otherwise delete the directory."
        )


def find_leftovers(directory: Path, *, but: Iterable[Path] = ()) -> tuple[Leftover, ...]:
    """Interrupted averages in a directory that no process works on, except those of given results. Changes nothing."""
    spared = {beside(resolved(out), PARTIAL).name for out in but}
    found = []
    for path in _named(directory, PARTIAL):
        with _held(path) as free, suppress(OSError):
            if free and path.name not in spared and is_worth_continuing(path):
                nbytes = sum(each.lstat().st_blocks * 512 for each in path.rglob("*"))
                found.append(Leftover(path, nbytes))
    return tuple(found)


def remove_stale(directory: Path) -> None:
    """Remove remains that cannot continue, and move results back that were moved aside and never replaced."""
    for path in _named(directory, PARTIAL):
        with _held(path) as free, suppress(OSError, OutputExistsError):
            if free and not is_worth_continuing(path) and _age(path) > _SECONDS_LEFT_ALONE:
                check_partial(path)
                remove(path)
    for out in _moved_aside(directory):
        _while_held(clear_replaced, out)


def bring_back(out: Path) -> None:
    """Move an earlier result back, if a process was killed between moving it aside and replacing it."""
    with suppress(ValueError):  # no file can have this name
        out = resolved(out)
        if os.path.lexists(beside(out, REPLACED)):
            _while_held(restore, out)


def bring_back_all(directory: Path) -> None:
    """Do the same for all results in a directory, unless that is a link."""
    for out in [] if os.path.islink(directory) else _moved_aside(directory):  # noqa: PTH114 - never raises
        bring_back(out)


def _while_held(do: Callable[[Path], object], out: Path) -> None:
    with _held(beside(out, PARTIAL)) as free, suppress(OSError):
        if free:
            do(out)


def _moved_aside(directory: Path) -> list[Path]:
    return [directory / path.name.removeprefix(".").removesuffix(REPLACED) for path in _named(directory, REPLACED)]


def _named(directory: Path, ending: str) -> list[Path]:
    """The directories, not links, that have one of ckavg's names."""
    with suppress(OSError, ValueError):
        return sorted(path for path in directory.glob(f".*{ending}") if path.is_dir() and not path.is_symlink())
    return []


def is_worth_continuing(path: Path) -> bool:
    """Whether any block is finished: then a journal has more than the line of its key."""
    for journal in path.glob(f"{JOURNAL}*"):
        with suppress(OSError), open_regular(journal, follow=False) as file:
            if sum(line != b"\n" for line, _ in zip(file, range(9), strict=False)) > 1:
                return True
    return False


def _age(path: Path) -> float:
    """Seconds since anything in a directory was last written; 0 if unknown."""
    try:
        return time.time() - max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:
        return 0.0
