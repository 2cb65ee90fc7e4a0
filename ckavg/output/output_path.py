"""Where a result may go. Looks, and refuses; creates nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.run import Checkpoint, Run
from ckavg.errors import CkavgError, OutputError, OutputExistsError, WriteError, listed
from ckavg.output.owned import check_names, is_record, unknown_files
from ckavg.storage.atomic import resolved
from ckavg.storage.base import AnyPath

_MARGIN_BYTES = 16 << 20
_CHOOSE = "Choose another place with --out."


def path_within(directory: Path, *names: str) -> Path:
    """A place in a directory that was named, by names of ours; none may be a link, for nobody named where that leads.

    Raises:
        OutputError: one is.
    """
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
    out: Path, source: AnyPath, checkpoints: Iterable[Checkpoint], *, force: bool, files: Collection[str] = ()
) -> list[CkavgError]:
    """Everything that speaks against putting a result at a place.

    Args:
        out: where it would go.
        source: the directory of the checkpoints.
        checkpoints: those that were found.
        force: whether a result that is there may be replaced.
        files: the names of its files.

    Returns:
        OutputExistsError: something is there, and it is not a result that `force` may replace; or something that is
            not ours has a name beside it that is needed.
        OutputError: it would lie inside a checkpoint, or over the run.
        WriteError: it could not be made there.
    """
    place, run = resolved(out), resolved(source)
    for checkpoint in checkpoints:
        directory = resolved(checkpoint.path)
        if directory == place or directory in place.parents:
            return [OutputError(f"{out} lies inside the checkpoint {checkpoint.path}.", hint=_CHOOSE)]
    if place == run or place in run.parents:
        return [OutputError(f"{out} holds the run itself.", hint=_CHOOSE)]
    try:
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            check_replaceable(out, force=force, files=files)
        with contextlib.suppress(OSError):  # what the system says against the place is told below
            check_names(place)
    except OSError as error:
        return [WriteError(f"{out} cannot be written: {error.strerror}.", hint=_CHOOSE)]
    except OutputExistsError as error:
        return [error]
    return _cannot_be_made(out)


def _existing(place: Path) -> Path:
    """The place, or the nearest of the directories above it that is there."""
    for each in (place, *place.parents):
        with contextlib.suppress(OSError):  # a name that is too long, a directory that may not be read
            each.stat()
            return each
    return Path(place.anchor)


def _cannot_be_made(out: Path) -> list[CkavgError]:
    """Whether the system would let us make a directory at a place; it is asked, and nothing is made."""
    place = resolved(out)
    parent = _existing(place.parent)
    try:
        read_only = bool(os.statvfs(parent).f_flag & os.ST_RDONLY)
        longest = os.pathconf(parent, "PC_NAME_MAX")
    except (OSError, ValueError):
        return []  # not every file system tells; whoever writes says what is wrong
    if not parent.is_dir():
        why = f"{parent} is not a directory"
    elif read_only:
        why = f"the file system of {parent} is read-only"
    elif not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        why = f"you may not write to {parent}"
    elif any(len(os.fsencode(part)) > longest for part in place.parts):
        why = "File name too long"
    else:
        return []
    return [WriteError(f"{out} cannot be written: {why}.", hint=_CHOOSE)]


def check_file(file: Path, run: Run) -> None:
    """Refuse to put a file into a checkpoint, or over one.

    Raises:
        OutputError: it would lie inside one, or be one.
    """
    place = resolved(file)
    for checkpoint in run.checkpoints:
        if resolved(checkpoint.path) in (place, *place.parents):
            raise OutputError(f"{file} lies inside the checkpoint {checkpoint.path}.", hint="Choose another place.")


def space_problems(places: Sequence[tuple[Path, int]]) -> list[CkavgError]:
    """One error for each disk that has fewer bytes left than the results which go there need.

    Args:
        places: of each result, where it goes and how many bytes it has.
    """
    needed: dict[int, tuple[Path, int]] = {}
    for out, nbytes in places:
        existing = _existing(resolved(out))
        first, before = needed.get(existing.stat().st_dev, (existing, 0))
        needed[existing.stat().st_dev] = first, before + nbytes
    return [
        WriteError(
            f"{existing} has {free / 1e9:.2f} GB free; the result needs {nbytes / 1e9:.2f} GB.",
            hint="Free some space, or choose another disk with --out.",
        )
        for existing, nbytes in needed.values()
        if (free := shutil.disk_usage(existing).free) < nbytes + _MARGIN_BYTES
    ]


def check_replaceable(out: Path, *, force: bool, files: Collection[str] = ()) -> None:
    """Refuse to replace what is at `out`, unless it is a result and nothing else, and `force` says so.

    Args:
        out: where something is.
        force: whether a result may be replaced.
        files: the names of a result's files, for one whose record was damaged.

    Raises:
        OutputExistsError: it is not, or `force` does not.
        OSError: the system would not let us look.
    """
    if not is_record(out / RESULT_RECORD):
        raise OutputExistsError(
            f"{out} exists and is not a result of ckavg.", hint="It is left alone. Choose another place with --out."
        )
    if not force:
        raise OutputExistsError(
            f"{out} already holds a result.", hint="Replace it with --force, or choose another place with --out."
        )
    if foreign := unknown_files(out, files):
        raise OutputExistsError(
            f"{out} holds what is not of the result, and would be lost: {listed(foreign)}.",
            hint="It is left alone. Move what is yours away, or choose another place with --out.",
        )
