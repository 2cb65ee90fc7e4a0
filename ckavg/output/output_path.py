"""Where a result may go, and which files in and beside it belong to ckavg.

A name alone proves nothing: a run from elsewhere may hold files of any name. So nothing is filled, emptied, renamed or
removed before it has been checked.
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
"""The model card, and beside it the plot that the card shows."""

LOCAL = ".ckavg-local.json"
"""The part of a record that is only for this machine, such as where the run is. It is never uploaded."""

PARTIAL, REPLACED = ".ckavg-partial", ".ckavg-replaced"
"""Name endings of a result in progress, and of an earlier result until it has been replaced."""

JOB = ".ckavg-job.json"
"""Identifies the job of a result that independent parts fill."""

_WORK_FILES = (*NAMES_OF_A_JOB, JOB, f"{PARTIAL}.*")
"""Files through which processes exchange while a result is filled."""

_CACHE_FILES = (*_WORK_FILES, LOCAL, ".DS_Store")
"""Files in a result that no record lists: ckavg's own, and the one that macOS leaves."""

_MARGIN_BYTES = 16 << 20
_CHOOSE = "Choose another place with --out."
_LEAVE = "It was not touched. Remove it if you know what it is, or choose another place with --out."


# --- where a result may go: checks only ---


def path_within(directory: Path, *names: str) -> Path:
    """A path below a directory that the user named. None of `names` may be a link: the user did not name its target."""
    place = directory
    for name in names:
        place /= name
        if os.path.islink(place):  # noqa: PTH114 - never raises
            raise OutputError(
                f"{place} is a link to {resolved(place)}; only links that you name are followed.",
                hint="If you trust the link, name it with --out.",
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
    """All problems of writing a result with `files` to `out`.

    Args:
        out: where the result would go.
        source: the run.
        checkpoints: of the run.
        force: whether an earlier result may be replaced.
        files: the files of the result.
        differs: why an existing result is not the one asked for.

    Returns:
        OutputExistsError: something else is there, or has a name beside it that ckavg needs.
        OutputError: `out` is inside a checkpoint, or holds the run.
        WriteError: the directory cannot be created.
    """
    place, run = resolved(out), resolved(source)
    try:
        _check_outside(out, checkpoints, _CHOOSE)
        if place == run or place in run.parents:
            raise OutputError(f"{out} holds the run itself.", hint=_CHOOSE)
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            check_replaceable(out, force=force, files=files, differs=differs)
        with suppress(OSError):  # reported below
            check_names(place)
    except OSError as error:
        return [WriteError(f"{out} cannot be written: {error.strerror}.", hint=_CHOOSE)]
    except OutputError as error:
        return [error]
    why = _why_not_made(place)
    return [WriteError(f"{out} cannot be written: {why}.", hint=_CHOOSE)] if why else []


def check_file(file: Path, run: Run) -> None:
    """Refuse a file inside a checkpoint, in place of one, or at an address.

    Raises:
        OutputError: it is.
    """
    if is_meant_for_address(file):
        raise OutputError(
            f"{AddressPath(file)} is an address; this file must go to a local path.",
            hint="Name a path on this machine, then copy the file from there.",
        )
    _check_outside(file, run.checkpoints, "Choose another place.")


def check_parent(file: Path, option: str) -> None:
    """Refuse a file that is a directory, or whose directory is missing or not writable.

    Raises:
        WriteError: it is; the hint names `option`.
    """
    for is_wrong, why in (
        (not file.parent.is_dir(), f"{file.parent} is not a directory"),
        (not os.access(file.parent, os.W_OK | os.X_OK), f"you may not write to {file.parent}"),
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
    """The path itself, or the nearest parent that exists."""
    for each in (place, *place.parents):
        with suppress(OSError):  # such as a name that is too long, or a directory without permission
            each.stat()
            return each
    return Path(place.anchor)


def _why_not_made(place: Path) -> str:
    """Why a directory cannot be created at a place; empty where it can. Creates nothing."""
    parent = _existing(place.parent)
    if not parent.is_dir():
        return f"{parent} is not a directory"
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return f"you may not write to {parent}"
    with suppress(OSError, ValueError):  # not every file system says; writing reports it then
        if max(len(os.fsencode(part)) for part in place.parts) > os.pathconf(parent, "PC_NAME_MAX"):
            return "File name too long"
    return ""


def space_problems(
    places: Sequence[tuple[Path, int]], *, hint: str = "Free some space, or choose another disk with --out."
) -> list[CkavgError]:
    """One error for each disk that is too full for the results that go there."""
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
    """Refuse to replace `out`, unless `force` is set and `out` is a result that holds no other files.

    Args:
        out: an existing path.
        force: whether a result may be replaced.
        files: names of a result's files, in case its record is damaged.
        differs: why the existing result is not the one asked for.

    Raises:
        OutputExistsError: it must not be replaced.
        OSError: it cannot be read.
    """
    if not _is_record(out / RESULT_RECORD):
        raise OutputExistsError(f"{out} exists and is not a result of ckavg.", hint=f"It was not touched. {_CHOOSE}")
    if not force:
        raise OutputExistsError(
            f"{out} already holds a result{f'; {differs}' if differs else ''}.",
            hint="Replace it with --force, or choose another place with --out.",
        )
    if unknown := unknown_files(out, files):
        raise OutputExistsError(
            f"{out} holds files that are not part of the result and would be lost: {listed(unknown)}.",
            hint="Nothing was removed. Move your files away, or choose another place with --out.",
        )


# --- files of ckavg, checked before they are used ---


def beside(out: Path, ending: str) -> Path:
    """The hidden path beside a result under which it is filled or kept."""
    return out.parent / f".{out.name}{ending}"


def check_names(out: Path) -> None:
    """Refuse a place if something foreign has a name beside it that ckavg needs."""
    for ending in (PARTIAL, REPLACED):
        _check_own(beside(out, ending), directory=True)


def check_partial(directory: Path, files: Collection[str] = ()) -> None:
    """Refuse to fill or empty a directory unless everything in it belongs to an unfinished result with `files`.

    Raises:
        OutputExistsError: something does not.
        OSError: it cannot be read.
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
        raise OutputExistsError(
            f"{directory} holds files that are not ckavg's: {listed(sorted(strange))}.", hint=_LEAVE
        )


def is_work_file(name: str) -> bool:
    """Whether processes exchange through a file of this name. A finished result has none."""
    return any(fnmatch.fnmatchcase(name, each) for each in _WORK_FILES)


def empty(directory: Path, *, but: tuple[str, ...] = ()) -> None:
    """Empty a directory of ckavg's, except for files whose names begin with `but`.

    The files that prove it is ckavg's go last.
    """
    for path in sorted(directory.iterdir(), key=lambda path: path.name.startswith((JOURNAL, RESULT_RECORD))):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not path.name.startswith(but):
            path.unlink()


def remove(directory: Path) -> None:
    """Remove a directory of ckavg's; errors are ignored."""
    with suppress(OSError):
        empty(directory)
        directory.rmdir()


def unknown_files(directory: Path, written: Collection[str] = ()) -> list[str]:
    """Files in a result that are not part of it, by relative path, sorted.

    `written` are the files of the result, in case its record is invalid.
    """
    known = _recorded(directory) or {*written, PLOT}
    files = (path.relative_to(directory) for path, is_directory in _all_in(directory) if not is_directory)
    return sorted(str(path) for path in files if path.as_posix() not in known and not is_cache_file(path.name))


def restore(out: Path) -> bool:
    """Move an earlier result back that a killed process had moved aside. Returns whether there was one.

    The caller of this and of `clear_replaced` holds the lock on the result.
    """
    aside = beside(out, REPLACED)
    if not is_result(aside) or (os.path.lexists(out) and any(out.iterdir())):
        return False
    aside.rename(out)
    return True


def clear_replaced(out: Path) -> None:
    """Do the same, then remove an earlier result that has been replaced. Foreign files stay."""
    aside = beside(out, REPLACED)
    if not restore(out) and is_result(out) and check_own(aside, directory=True) and not unknown_files(aside):
        remove(aside)


def is_result(directory: Path) -> bool:
    """Whether this is a directory, not a link, with a record in it."""
    with suppress(OSError):
        return not directory.is_symlink() and _is_record(directory / RESULT_RECORD)
    return False


def _is_record(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _recorded(directory: Path) -> set[str]:
    """The files that the record of a result lists, with those of its snapshots; empty if it cannot be read."""
    with suppress(OSError, ValueError):
        return recorded_files(read_small(directory / RESULT_RECORD, follow=False))
    return set()


def recorded_files(record: bytes) -> set[str]:
    """The files that a record lists, with those of its snapshots, by path in the result; empty if it is invalid."""
    with suppress(ValueError, RecursionError, TypeError, KeyError, IndexError):
        outputs: list[Any] = parse_json(record)["outputs"]
        of_snapshots = {f"{each['name']}/{file}" for each in outputs[:-1] for file in each["files"]}
        return of_snapshots | {str(file) for file in outputs[-1]["files"]}
    return set()


def _all_in(directory: Path) -> Iterator[tuple[Path, bool]]:
    """Every path below a directory, and whether it is a directory. No link is followed."""
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as entries:
            found = [(Path(entry), entry.is_dir(follow_symlinks=False)) for entry in entries]
        pending += [path for path, is_directory in found if is_directory]
        yield from found


def is_cache_file(name: str) -> bool:
    """Whether a file of this name may be in a result without being part of it."""
    return any(fnmatch.fnmatchcase(name, each) for each in _CACHE_FILES)


def _check_own(path: Path, *, directory: bool) -> None:
    try:
        check_own(path, directory=directory)
    except FileExistsError as error:
        raise OutputExistsError(f"{path}: {error.strerror}.", hint=_LEAVE) from error
