"""Stage *write*: where a result may go. Looks, and refuses; creates nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

from ckavg.atomic import resolved
from ckavg.errors import OutputError, OutputExistsError, WriteError
from ckavg.run.checkpoint import RESULT_RECORD
from ckavg.run.values import Run

_MARGIN_BYTES = 16 << 20


def check_place(out: Path, run: Run, *, force: bool) -> None:
    """Refuse to put a result where it would harm something.

    Raises:
        OutputExistsError: something is there, and it is not a result that `force` may replace.
        OutputError: it would lie inside a checkpoint, or over the run.
    """
    place, source = resolved(out), resolved(run.source)
    for checkpoint in run.checkpoints:
        directory = resolved(checkpoint.path)
        if directory == place or directory in place.parents:
            raise OutputError(
                f"{out} lies inside the checkpoint {checkpoint.path}.", hint="Choose another place with --out."
            )
    if place == source or place in source.parents:
        raise OutputError(f"{out} holds the run itself.", hint="Choose another place with --out.")
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        check_replaceable(out, force=force)


def check_file(file: Path, run: Run) -> None:
    """Refuse to put a file into a checkpoint, or over one.

    Raises:
        OutputError: it would lie inside one, or be one.
    """
    place = resolved(file)
    for checkpoint in run.checkpoints:
        if resolved(checkpoint.path) in (place, *place.parents):
            raise OutputError(f"{file} lies inside the checkpoint {checkpoint.path}.", hint="Choose another place.")


def check_space(out: Path, needed: int) -> None:
    """Refuse when the disk has fewer than `needed` bytes left.

    Raises:
        WriteError: it has.
    """
    existing = next(parent for parent in (resolved(out), *resolved(out).parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + _MARGIN_BYTES:
        raise WriteError(
            f"{existing} has {free / 1e9:.2f} GB free; the result needs {needed / 1e9:.2f} GB.",
            hint="Free some space, or choose another disk with --out.",
        )


def check_replaceable(out: Path, *, force: bool) -> None:
    """Refuse to replace what is at `out`, unless it is a result and `force` says so.

    Raises:
        OutputExistsError: it is not, or `force` does not.
    """
    if not (out / RESULT_RECORD).is_file():
        raise OutputExistsError(
            f"{out} exists and is not a result of ckavg.", hint="It is left alone. Choose another place with --out."
        )
    if not force:
        raise OutputExistsError(
            f"{out} already holds a result.", hint="Replace it with --force, or choose another place with --out."
        )
