"""Stage *write*: what killed processes have left beside results; found, told and, where it is worthless, removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ckavg.atomic import resolved
from ckavg.result.staging import JOURNAL, PARTIAL, REPLACED

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
    spared = {_name(out, PARTIAL) for out in but}
    found = []
    for path in _ours(directory, PARTIAL):
        with _held(path) as free:
            if free and path.name not in spared and _is_worth_continuing(path):
                found.append(Leftover(path, _bytes_in(path)))
    return tuple(found)


def tidy(directory: Path) -> None:
    """Remove what cannot be continued, and bring back a result that was moved aside and never replaced."""
    for path in _ours(directory, PARTIAL):
        with _held(path) as free:
            if free and not _is_worth_continuing(path) and _age(path) > _SECONDS_LEFT_ALONE:
                shutil.rmtree(path, ignore_errors=True)
    for path in _ours(directory, REPLACED):
        out = directory / path.name.removeprefix(".").removesuffix(REPLACED)
        with _held(directory / _name(out, PARTIAL)) as free, contextlib.suppress(OSError):
            if free and out.exists():
                shutil.rmtree(path)
            elif free:
                path.rename(out)


def _name(out: Path, ending: str) -> str:
    return f".{resolved(out).name}{ending}"


def _ours(directory: Path, ending: str) -> list[Path]:
    try:
        return sorted(
            path
            for path in directory.iterdir()
            if path.name.startswith(".") and path.name.endswith(ending) and path.is_dir() and not path.is_symlink()
        )
    except OSError:
        return []


def _is_worth_continuing(path: Path) -> bool:
    """Whether any block is noted as finished: a journal holds more than the line of its key."""
    for journal in path.glob(f"{JOURNAL}*"):
        with contextlib.suppress(OSError), journal.open("rb") as file:
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
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
