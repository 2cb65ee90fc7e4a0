"""A result is filled under another name and appears complete or not at all; what killed processes leave is found.

What can be continued is told of; what is worthless is removed; an earlier result that was moved aside comes back.
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
"""The file that says of which work the weight files are."""

_SECONDS_TO_ENTER = 10.0
_SECONDS_LEFT_ALONE = 3600
"""Some network file systems keep locks to one machine: what another one has begun just now is not taken for left."""


class Staging:
    """Fills `.<name>.ckavg-partial` beside `out`; `commit` renames it to `out`.

    Used as a context. On leaving it without a commit, whatever was written is removed, unless it is worth continuing:
    then it stays, with a journal of what is finished. Where the processes of a job fill it, the first does all of this.

    Args:
        out: the final directory.
        force: replace a result that is there. Anything else that is there is left alone in any case.
        files: the names of the files of one output, by which a result is known whose record was damaged.

    Attributes:
        path: the directory that is filled.
        begin_part: of a part that is done by itself, which shares the directory with other parts: called with the
            directory, and whether this process is alone in it.

    Raises:
        OutputError: another process is writing the same result.
        OutputExistsError: something that is not ours has one of the names that are needed.
        WriteError: the system would not let us write.
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
                        f"Another ckavg is writing {self._out.name} right now.",
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
                    f"What was finished is kept in {self.path}: the same command continues from there. "
                    "Delete that directory to start afresh."
                )
            self._close()
        else:
            self._clean_up()

    def holds(self, key: str, sizes: Mapping[Path, int]) -> bool:
        """Whether an interrupted attempt at the work of this key has left its weight files here, of these bytes."""
        return is_of(self.path / _KEY, key) and self.has_files(sizes)

    def has_files(self, sizes: Mapping[Path, int]) -> bool:
        """Whether these files are here, of these bytes."""
        try:
            states = [((self.path / name).lstat(), size) for name, size in sizes.items()]
        except OSError:
            return False
        return all(stat.S_ISREG(state.st_mode) and state.st_size == size for state, size in states)

    def begin(self, key: str, *, but: tuple[str, ...] = ()) -> None:
        """Remove whatever is here, but for files whose names begin so, and say which work this is now."""
        with write_errors(self.path):
            empty(self.path, but=but)
        self.say(key)

    def say(self, key: str) -> None:
        """Say of which work the weight files here are."""
        with write_errors(self.path):
            Journal(self.path / _KEY, key).close()

    def forget_processes(self) -> None:
        """Remove what the processes of an earlier job have left by which they knew of each other."""
        with write_errors(self.path):
            for path in [path for path in self.path.iterdir() if path.name.startswith((RANK_FILE, AGREED))]:
                path.unlink()

    def keep(self) -> None:
        """Say that enough is finished to be worth continuing."""
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
        """Give it its final name. All files are on the disk by then.

        Raises:
            OutputExistsError: something came to be there since the work began.
            WriteError: the system would not let us; the final name is as it was.
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
            except BaseException:  # an interrupt, too
                if replaces and not self._out.exists():
                    self._replaced.rename(self._out)
                raise
            self._committed = True
            with suppress(OSError):  # it is there, and whole; only a power cut within seconds could undo the renaming
                _sync(self._out.parent)
            if replaces:
                remove(self._replaced)

    def _check_out(self) -> bool:
        """Whether there is a result to be replaced; what may not be is refused, and what is in the way of it."""
        if not (self._out.exists() and any(self._out.iterdir())):
            return False
        check_replaceable(self._out, force=self._force, files=self._files)
        if os.path.lexists(self._replaced):
            raise OutputExistsError(
                f"{self._replaced} is there, and is no earlier result of ckavg as it was written.",
                hint="It is left alone. Move it away, or choose another place with --out.",
            )
        return True

    def _enter_part(self, begin: Callable[[Path, bool], None]) -> int | None:
        """A lock that other parts may have, too; None where somebody who is no part has one."""
        end = time.monotonic() + _SECONDS_TO_ENTER  # who only looks whether it is free has it for a moment
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
        """Leave what parts have finished, and remove it where that is nothing, and nobody is at work."""
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
    """Whether nobody works on a directory; nobody can while this is entered. True where there is no such directory."""
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
    """A handle of a directory that keeps others from it until it is closed; None where somebody has one.

    The lock is on the directory itself. A lock file beside it would have to be opened under a name that something may
    have been planted under, would stay behind, and would lock nothing once the directory has been renamed.

    Raises:
        OutputExistsError: with `files`, those of the result that is to come: not all of it is ours.
        OSError: there is no real directory, or the system would not let us open it.
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
    """An average that was interrupted, and that its command would continue: its directory, and its size in bytes."""

    path: Path
    nbytes: int

    def __str__(self) -> str:
        return (
            f"{self.path} holds {self.nbytes / 1e6:,.0f} MB of an average that was interrupted. "
            "Its command continues it; delete the directory otherwise."
        )


def find_leftovers(directory: Path, *, but: Iterable[Path] = ()) -> tuple[Leftover, ...]:
    """Interrupted averages in a directory that nobody works on now, but those of some results. Changes nothing."""
    spared = {beside(resolved(out), PARTIAL).name for out in but}
    found = []
    for path in _named(directory, PARTIAL):
        with _held(path) as free, suppress(OSError):
            if free and path.name not in spared and is_worth_continuing(path):
                nbytes = sum(each.lstat().st_blocks * 512 for each in path.rglob("*"))
                found.append(Leftover(path, nbytes))
    return tuple(found)


def remove_stale(directory: Path) -> None:
    """Remove what cannot be continued, and bring back results that were moved aside and never replaced."""
    for path in _named(directory, PARTIAL):
        with _held(path) as free, suppress(OSError, OutputExistsError):
            if free and not is_worth_continuing(path) and _age(path) > _SECONDS_LEFT_ALONE:
                check_partial(path)
                remove(path)
    for out in _moved_aside(directory):
        _while_held(clear_replaced, out)


def bring_back(out: Path) -> None:
    """Give an earlier result its name back, if a process was killed between moving it aside and replacing it."""
    with suppress(ValueError):  # no file can have this name
        out = resolved(out)
        if os.path.lexists(beside(out, REPLACED)):
            _while_held(restore, out)


def bring_back_all(directory: Path) -> None:
    """The same of all results in a directory, unless that is a link."""
    for out in [] if os.path.islink(directory) else _moved_aside(directory):  # noqa: PTH114 - never raises
        bring_back(out)


def _while_held(do: Callable[[Path], object], out: Path) -> None:
    with _held(beside(out, PARTIAL)) as free, suppress(OSError):
        if free:
            do(out)


def _moved_aside(directory: Path) -> list[Path]:
    return [directory / path.name.removeprefix(".").removesuffix(REPLACED) for path in _named(directory, REPLACED)]


def _named(directory: Path, ending: str) -> list[Path]:
    """The real directories with a name of ours."""
    with suppress(OSError, ValueError):
        return sorted(path for path in directory.glob(f".*{ending}") if path.is_dir() and not path.is_symlink())
    return []


def is_worth_continuing(path: Path) -> bool:
    """Whether any block is noted as finished: a journal holds more than the line of its key."""
    for journal in path.glob(f"{JOURNAL}*"):
        with suppress(OSError), open_regular(journal, follow=False) as file:
            if sum(line != b"\n" for line, _ in zip(file, range(9), strict=False)) > 1:
                return True
    return False


def _age(path: Path) -> float:
    """Seconds since anything in a directory was last written; 0 where that cannot be told."""
    try:
        return time.time() - max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:
        return 0.0
