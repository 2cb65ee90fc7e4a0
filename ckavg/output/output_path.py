"""Where a result may go, which names in and beside it are ckavg's own, and whether what has such a name is.

Nothing is filled, emptied, renamed or removed because of its name alone: a run from elsewhere may hold anything.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.run import Checkpoint, Run
from ckavg.engine.distributed import JOURNAL, NAMES_OF_A_JOB
from ckavg.errors import CkavgError, OutputError, OutputExistsError, WriteError, listed
from ckavg.storage.address import AddressPath, is_meant_for_address
from ckavg.storage.atomic import check_own, resolved
from ckavg.storage.base import AnyPath
from ckavg.storage.local import parse_json, read_small

CARD, PLOT = "README.md", "ckavg.svg"
"""The model card, and the picture of the weights that it shows, beside it."""

LOCAL = ".ckavg-local.json"
"""What of a record is for this machine alone, beside it: where the run was. It is never uploaded."""

PARTIAL, REPLACED = ".ckavg-partial", ".ckavg-replaced"
"""How the names end under which a result is filled, and kept until another one has its place."""

JOB = ".ckavg-job.json"
"""What parts that are done by themselves belong to, where one is filled by several of them."""

_WORK_FILES = (*NAMES_OF_A_JOB, JOB, f"{PARTIAL}.*")
"""Names of files by which processes exchange while a result is filled."""

_CACHE_FILES = (*_WORK_FILES, LOCAL, ".DS_Store")
"""Names in a result that no record lists: our own, and what a desktop leaves wherever it looks."""

_MARGIN_BYTES = 16 << 20
_CHOOSE = "Choose another place with --out."
_LEAVE = "It is left alone. Remove it if you know what it is, or choose another place with --out."


# --- where a result may go: looks, and refuses; creates nothing ---


def path_within(directory: Path, *names: str) -> Path:
    """A place in a directory that was named, by names of ours; none may be a link: nobody named where it leads."""
    place = directory
    for name in names:
        place /= name
        if os.path.islink(place):  # noqa: PTH114 - never raises
            raise OutputError(
                f"{place} is a link to {resolved(place)}; links are followed only where they are named.",
                hint="Name the place with --out, if you trust where the link came from.",
            )
    return place


def output_path_problems(
    out: Path,
    source: AnyPath,
    checkpoints: Iterable[Checkpoint],
    *,
    force: bool,
    files: Collection[str] = (),
    differs: str = "",
) -> list[CkavgError]:
    """Everything that speaks against putting a result with `files` at a place; what is there may go with `force`.

    `differs` says why a result that is there is not the one that would be put there.

    Returns:
        OutputExistsError: something is there, and it is not a result that `force` may replace; or something that is
            not ours has a name beside it that is needed.
        OutputError: it would lie inside a checkpoint, or over the run.
        WriteError: it could not be made there.
    """
    place, run = resolved(out), resolved(source)
    try:
        _check_outside(out, checkpoints, _CHOOSE)
        if place == run or place in run.parents:
            raise OutputError(f"{out} holds the run itself.", hint=_CHOOSE)
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            check_replaceable(out, force=force, files=files, differs=differs)
        with suppress(OSError):  # what the system says against the place is told below
            check_names(place)
    except OSError as error:
        return [WriteError(f"{out} cannot be written: {error.strerror}.", hint=_CHOOSE)]
    except OutputError as error:
        return [error]
    why = _why_not_made(place)
    return [WriteError(f"{out} cannot be written: {why}.", hint=_CHOOSE)] if why else []


def check_file(file: Path, run: Run) -> None:
    """Refuse to put a file into a checkpoint, over one, or to an address, with an `OutputError`."""
    if is_meant_for_address(file):
        raise OutputError(
            f"{AddressPath(file)} is an address; this file goes to a disk.",
            hint="Name a path on this machine, and copy the file from there.",
        )
    _check_outside(file, run.checkpoints, "Choose another place.")


def check_parent(file: Path, option: str) -> None:
    """Refuse a file that could not be written because of the directory that it goes to, or that it is.

    Raises:
        WriteError: it names `option`, with which another place is chosen.
    """
    for is_wrong, why in (
        (not file.parent.is_dir(), f"{file.parent} is not a directory"),
        (not os.access(file.parent, os.W_OK | os.X_OK), f"{file.parent} may not be written to"),
        (file.is_dir(), f"{file} is a directory"),
    ):
        if is_wrong:
            raise WriteError(f"{why}.", hint=f"Choose another place with {option}.")


def _check_outside(out: Path, checkpoints: Iterable[Checkpoint], hint: str) -> None:
    place = resolved(out)
    for checkpoint in checkpoints:
        if resolved(checkpoint.path) in (place, *place.parents):
            raise OutputError(f"{out} lies inside the checkpoint {checkpoint.path}.", hint=hint)


def _existing(place: Path) -> Path:
    """The place, or the nearest of the directories above it that is there."""
    for each in (place, *place.parents):
        with suppress(OSError):  # a name that is too long, a directory that may not be read
            each.stat()
            return each
    return Path(place.anchor)


def _why_not_made(place: Path) -> str:
    """What would keep us from making a directory at a place; the system is asked, and nothing is made."""
    parent = _existing(place.parent)
    if not parent.is_dir():
        return f"{parent} is not a directory"
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return f"you may not write to {parent}"
    with suppress(OSError, ValueError):  # not every file system tells; whoever writes says what is wrong
        if max(len(os.fsencode(part)) for part in place.parts) > os.pathconf(parent, "PC_NAME_MAX"):
            return "File name too long"
    return ""


def space_problems(
    places: Sequence[tuple[Path, int]], *, hint: str = "Free some space, or choose another disk with --out."
) -> list[CkavgError]:
    """One error for each disk that has too few bytes left for the results of these sizes which go there."""
    needed: dict[int, tuple[Path, int]] = {}
    for out, nbytes in places:
        existing = _existing(resolved(out))
        first, before = needed.get(existing.stat().st_dev, (existing, 0))
        needed[existing.stat().st_dev] = first, before + nbytes
    return [
        WriteError(
            f"{existing} has {free / 1e9:.2f} GB free; the result needs {nbytes / 1e9:.2f} GB.",
            hint=hint,
        )
        for existing, nbytes in needed.values()
        if (free := shutil.disk_usage(existing).free) < nbytes + _MARGIN_BYTES
    ]


def check_replaceable(out: Path, *, force: bool, files: Collection[str] = (), differs: str = "") -> None:
    """Refuse to replace what is at `out`, unless it is a result and nothing else, and `force` says so.

    `files` are the names of a result's files, for one whose record was damaged; `differs` says why it is another one.

    Raises:
        OutputExistsError: it is not, or `force` does not.
        OSError: the system would not let us look.
    """
    if not _is_record(out / RESULT_RECORD):
        raise OutputExistsError(f"{out} exists and is not a result of ckavg.", hint=f"It is left alone. {_CHOOSE}")
    if not force:
        raise OutputExistsError(
            f"{out} already holds a result{f'; {differs}' if differs else ''}.",
            hint="Replace it with --force, or choose another place with --out.",
        )
    if unknown := unknown_files(out, files):
        raise OutputExistsError(
            f"{out} holds what is not of the result, and would be lost: {listed(unknown)}.",
            hint="It is left alone. Move what is yours away, or choose another place with --out.",
        )


# --- names of ours, and whether what has one is ours ---


def beside(out: Path, ending: str) -> Path:
    """The name, beside its own, under which a result is filled or kept."""
    return out.parent / f".{out.name}{ending}"


def check_names(out: Path) -> None:
    """Refuse a place beside which something that is no directory of ours has one of the names that it needs."""
    for ending in (PARTIAL, REPLACED):
        _check_own(beside(out, ending), directory=True)


def check_partial(directory: Path, files: Collection[str] = ()) -> None:
    """Refuse to fill or empty a directory, unless all of it is an unfinished result of ours, which is to have `files`.

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
        is_ours = name in known or name.partition("/")[2] in known or is_cache_file(path.name)  # or of a snapshot
        _check_own(path, directory=is_directory and not is_ours)
        if not (is_ours or is_directory or (has_journal and path.suffix == ".safetensors")):
            strange.append(name)
    if strange:
        raise OutputExistsError(f"{directory} holds what is not ckavg's: {listed(sorted(strange))}.", hint=_LEAVE)


def is_work_file(name: str) -> bool:
    """Whether processes exchange through a file of this name, and a finished result has none."""
    return any(fnmatch.fnmatchcase(name, each) for each in _WORK_FILES)


def empty(directory: Path, *, but: tuple[str, ...] = ()) -> None:
    """Remove what is in a directory of ours, but for files whose names begin so; what tells that all of it is ours goes
    last.
    """
    for path in sorted(directory.iterdir(), key=lambda path: path.name.startswith((JOURNAL, RESULT_RECORD))):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not path.name.startswith(but):
            path.unlink()


def remove(directory: Path) -> None:
    """Remove a directory of ours, as far as the system lets us."""
    with suppress(OSError):
        empty(directory)
        directory.rmdir()


def unknown_files(directory: Path, written: Collection[str] = ()) -> list[str]:
    """What lies in a result without being of it, by relative path, sorted.

    `written` are the files of a result, for a record that cannot be understood.
    """
    known = _recorded(directory) or {*written, PLOT}
    files = (path.relative_to(directory) for path, is_directory in _all_in(directory) if not is_directory)
    return sorted(str(path) for path in files if path.as_posix() not in known and not is_cache_file(path.name))


def restore(out: Path) -> bool:
    """Give an earlier result its name back that a killed process had moved aside; whether it had.

    This and `clear_replaced` are for whoever holds the lock on the result.
    """
    aside = beside(out, REPLACED)
    if not is_result(aside) or (os.path.lexists(out) and any(out.iterdir())):
        return False
    aside.rename(out)
    return True


def clear_replaced(out: Path) -> None:
    """The same, and remove an earlier result that was replaced. What is not ours stays."""
    aside = beside(out, REPLACED)
    if not restore(out) and is_result(out) and check_own(aside, directory=True) and not unknown_files(aside):
        remove(aside)


def is_result(directory: Path) -> bool:
    """Whether there is a real directory with a record in it."""
    with suppress(OSError):
        return not directory.is_symlink() and _is_record(directory / RESULT_RECORD)
    return False


def _is_record(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _recorded(directory: Path) -> set[str]:
    """The files that the record of a result lists, those of its snapshots among them; empty where it cannot be read."""
    with suppress(OSError, ValueError):
        return recorded_files(read_small(directory / RESULT_RECORD, follow=False))
    return set()


def recorded_files(record: bytes) -> set[str]:
    """The files that a record lists, those of snapshots among them, by path in the result; empty where it is none."""
    with suppress(ValueError, RecursionError, TypeError, KeyError, IndexError):
        outputs: list[Any] = parse_json(record)["outputs"]
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


def is_cache_file(name: str) -> bool:
    """Whether a file of this name may lie in a result without being of it."""
    return any(fnmatch.fnmatchcase(name, each) for each in _CACHE_FILES)


def _check_own(path: Path, *, directory: bool) -> None:
    try:
        check_own(path, directory=directory)
    except FileExistsError as error:
        raise OutputExistsError(f"{path}: {error.strerror}.", hint=_LEAVE) from error
