"""Stage *write*: what killed processes have left beside results; found, told and, where it is worthless, removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ckavg.errors import OutputExistsError
from ckavg.output.owned import JOURNAL, PARTIAL, REPLACED, beside, check_unfinished, remove, restore, settle
from ckavg.storage.atomic import resolved
from ckavg.storage.untrusted import open_regular

_SECONDS_LEFT_ALONE = 3600
"""Some network file systems keep locks to one machine: what another one has begun just now is not taken for left."""


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
    """Interrupted averages in a directory that nobody works on now. Changes nothing.

    Args:
        directory: where results are.
        but: results whose own leftovers are not meant.
    """
    spared = {beside(resolved(out), PARTIAL).name for out in but}
    found = []
    for path in _named(directory, PARTIAL):
        with _held(path) as free:
            if free and path.name not in spared and _is_worth_continuing(path):
                found.append(Leftover(path, _bytes_in(path)))
    return tuple(found)


def tidy(directory: Path) -> None:
    """Remove what cannot be continued, and bring back results that were moved aside and never replaced."""
    for path in _named(directory, PARTIAL):
        with _held(path) as free, contextlib.suppress(OSError, OutputExistsError):
            if free and not _is_worth_continuing(path) and _age(path) > _SECONDS_LEFT_ALONE:
                check_unfinished(path)
                remove(path)
    for out in _moved_aside(directory):
        _while_held(settle, out)


def bring_back(out: Path) -> None:
    """Give an earlier result its name back, if a process was killed between moving it aside and replacing it."""
    with contextlib.suppress(ValueError):  # no file can have this name
        out = resolved(out)
        if os.path.lexists(beside(out, REPLACED)):
            _while_held(restore, out)


def bring_back_all(directory: Path) -> None:
    """The same of all results in a directory, unless that is a link."""
    if not os.path.islink(directory):  # noqa: PTH114 - never raises
        for out in _moved_aside(directory):
            bring_back(out)


def _while_held(do: Callable[[Path], object], out: Path) -> None:
    with _held(beside(out, PARTIAL)) as free, contextlib.suppress(OSError):
        if free:
            do(out)


def _moved_aside(directory: Path) -> list[Path]:
    return [directory / path.name.removeprefix(".").removesuffix(REPLACED) for path in _named(directory, REPLACED)]


def _named(directory: Path, ending: str) -> list[Path]:
    """The real directories with a name of ours."""
    try:
        return sorted(
            path
            for path in directory.iterdir()
            if path.name.startswith(".") and path.name.endswith(ending) and path.is_dir() and not path.is_symlink()
        )
    except (OSError, ValueError):
        return []


def _is_worth_continuing(path: Path) -> bool:
    """Whether any block is noted as finished: a journal holds more than the line of its key."""
    for journal in path.glob(f"{JOURNAL}*"):
        with contextlib.suppress(OSError), open_regular(journal, follow=False) as file:
            if sum(line != b"\n" for line, _ in zip(file, range(9), strict=False)) > 1:
                return True
    return False


def _age(path: Path) -> float:
    """Seconds since anything in a directory was last written; 0 where that cannot be told."""
    try:
        return time.time() - max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:
        return 0.0


def _bytes_in(path: Path) -> int:
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                total += (Path(folder) / name).lstat().st_blocks * 512
    return total


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Whether nobody works on a directory; nobody can while this is entered. True where there is no such directory."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(handle)
