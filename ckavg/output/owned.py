"""Which names in and beside a result are ckavg's own, and whether what has such a name is.

Nothing is filled, emptied, renamed or removed because of its name alone: a run from elsewhere may hold anything.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.errors import OutputExistsError, listed
from ckavg.storage.atomic import check_own
from ckavg.storage.local import parse_json, read_small

CARD, PLOT = "README.md", "ckavg.svg"
"""The model card, and the picture of the weights that it shows, beside it."""

LOCAL = ".ckavg-local.json"
"""What of a record is for this machine alone, beside it: where the run was. It is never uploaded."""

PARTIAL, REPLACED = ".ckavg-partial", ".ckavg-replaced"
"""How the names end under which a result is filled, and kept until another one has its place."""

JOURNAL = ".ckavg-journal-"
MARK = "." + "[0-9a-f]" * 32
_CACHE_FILES = (f"{JOURNAL}*", f"{PARTIAL}.*", LOCAL, MARK, ".DS_Store")
"""Names in a result that no record lists: our own, and what a desktop leaves wherever it looks."""

_LEAVE = "It is left alone. Remove it if you know what it is, or choose another place with --out."


def beside(out: Path, ending: str) -> Path:
    """The name, beside its own, under which a result is filled or kept."""
    return out.parent / f".{out.name}{ending}"


def check_names(out: Path) -> None:
    """Refuse a place beside which something has the names that its result would be filled and kept under.

    Raises:
        OutputExistsError: something does that is no directory of ours.
    """
    for ending in (PARTIAL, REPLACED):
        _check_own(beside(out, ending), directory=True)


def check_partial(directory: Path, files: Collection[str] = ()) -> None:
    """Refuse to fill or empty a directory, unless all of it is an unfinished result of ours.

    Args:
        directory: with a name of ours.
        files: those of the result that is to come.

    Raises:
        OutputExistsError: it is none.
        OSError: the system would not let us look.
    """
    _check_own(directory, directory=True)
    known = {*files, *_recorded(directory), RESULT_RECORD, PLOT}
    has_journal = any(path.is_file() for path in directory.glob(f"{JOURNAL}*"))
    strange = []
    for path, is_directory in _all_in(directory):
        name = path.relative_to(directory).as_posix()
        of_snapshot = name.partition("/")[2]
        is_ours = name in known or of_snapshot in known or _is_cache_file(path.name)
        _check_own(path, directory=is_directory and not is_ours)
        if not (is_ours or is_directory or (has_journal and path.suffix == ".safetensors")):
            strange.append(name)
    if strange:
        raise OutputExistsError(f"{directory} holds what is not ckavg's: {listed(sorted(strange))}.", hint=_LEAVE)


def empty(directory: Path, *, but: Path | None = None) -> None:
    """Remove what is in a directory of ours, but for one file; what tells that all of it is ours goes last.

    Raises:
        OSError: the system would not let us.
    """
    for path in sorted(directory.iterdir(), key=lambda path: path.name.startswith((JOURNAL, RESULT_RECORD))):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != but:
            path.unlink()


def remove(directory: Path) -> None:
    """Remove a directory of ours, as far as the system lets us."""
    with suppress(OSError):
        empty(directory)
        directory.rmdir()


def is_result(directory: Path) -> bool:
    """Whether there is a real directory with a record in it."""
    with suppress(OSError):
        return not directory.is_symlink() and is_record(directory / RESULT_RECORD)
    return False


def is_record(path: Path) -> bool:
    """Whether there is a plain file, and no link to one."""
    return path.is_file() and not path.is_symlink()


def unknown_files(directory: Path, written: Collection[str] = ()) -> list[str]:
    """What lies in a result without being of it, by relative path, sorted.

    Args:
        directory: with a record in it.
        written: the files of a result, for a record that cannot be understood.

    Raises:
        OSError: the system would not let us look.
    """
    known = _recorded(directory) or {*written, PLOT}
    files = (path.relative_to(directory) for path, is_directory in _all_in(directory) if not is_directory)
    return sorted(str(path) for path in files if path.as_posix() not in known and not _is_cache_file(path.name))


def restore(out: Path) -> bool:
    """Give an earlier result its name back that a killed process had moved aside; whether it had.

    This and `clear_replaced` are for whoever holds the lock on the result.

    Raises:
        OSError: the system would not let us.
    """
    aside = beside(out, REPLACED)
    if not is_result(aside) or (os.path.lexists(out) and any(out.iterdir())):
        return False
    aside.rename(out)
    return True


def clear_replaced(out: Path) -> None:
    """The same, and remove an earlier result that was replaced. What is not ours stays.

    Raises:
        OSError: the system would not let us.
    """
    aside = beside(out, REPLACED)
    if not restore(out) and is_result(out) and check_own(aside, directory=True) and not unknown_files(aside):
        remove(aside)


def _recorded(directory: Path) -> set[str]:
    """The files that the record of a result lists, those of its snapshots among them; empty where it cannot be read."""
    with suppress(OSError, ValueError, RecursionError, TypeError, KeyError, IndexError):
        outputs: list[Any] = parse_json(read_small(directory / RESULT_RECORD, follow=False))["outputs"]
        of_snapshots = {f"{each['name']}/{file}" for each in outputs[:-1] for file in each["files"]}
        return of_snapshots | {str(file) for file in outputs[-1]["files"]}
    return set()


def _all_in(directory: Path) -> Iterator[tuple[Path, bool]]:
    """Everything below a directory, and whether it is a real directory. No link is followed."""
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as entries:
            found = [(Path(entry), entry.is_dir(follow_symlinks=False)) for entry in entries]
        pending += [path for path, is_directory in found if is_directory]
        yield from found


def _is_cache_file(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, each) for each in _CACHE_FILES)


def _check_own(path: Path, *, directory: bool) -> None:
    try:
        check_own(path, directory=directory)
    except FileExistsError as error:
        raise OutputExistsError(f"{path}: {error.strerror}.", hint=_LEAVE) from error
