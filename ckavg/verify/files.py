"""Stage *verify*, second: is every file of a result there, and is each what it was? Reads whole files, as bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.errors import ReadError
from ckavg.output.hashing import sha256_of
from ckavg.output.owned import CARD
from ckavg.output.record import Output
from ckavg.storage.atomic import resolved
from ckavg.verify.findings import Finding

_AT_ONCE = 8
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Present:
    """The files of an output that can be read, with their sizes in bytes, and what is wrong with the others."""

    sizes: dict[str, int]
    findings: tuple[Finding, ...]


def find_files(directory: Path, output: Output, *, within: Path, shown: str = "") -> Present:
    """Look for the files of an output; opens none.

    Args:
        directory: of the output.
        output: its entry in the record.
        within: the directory of the result, out of which no link may lead.
        shown: what stands before the names of its files in messages.
    """
    sizes: dict[str, int] = {}
    found: list[Finding] = []
    inside = resolved(within)
    for name in output.files:
        path = directory / name
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            told = "is not there" if missing else f"cannot be looked at: {error}"
            found.append(Finding("files", f"{shown}{name} {told}."))
            continue
        if inside not in resolved(path).parents:
            found.append(Finding("files", f"{shown}{name} is a link that leads out of the result."))
        elif not stat.S_ISREG(status.st_mode):
            found.append(Finding("files", f"{shown}{name} is not a plain file."))
        else:
            sizes[name] = status.st_size
    return Present(sizes, tuple(found))


def check_digests(
    directory: Path,
    output: Output,
    names: Collection[str],
    *,
    on_done: Callable[[str], None],
    shown: str = "",
) -> list[Finding]:
    """Compare the SHA-256 of files with the record. A card that was edited is worth a warning, anything else is wrong.

    Args:
        directory, output, shown: as of `find_files`.
        names: the files to read.
        on_done: called with the name of each file that was read.
    """
    found: list[Finding] = []
    hashed = [name for name in output.files if name in names and name != RESULT_RECORD]
    for place in range(0, len(hashed), _AT_ONCE):
        some = hashed[place : place + _AT_ONCE]
        for name, digest in zip(some, _digests([directory / name for name in some]), strict=True):
            on_done(name)
            if isinstance(digest, ReadError):
                found.append(Finding("files", f"{shown}{name}: {digest.message}"))
            elif digest != output.sha256[name]:
                found.append(
                    Finding(
                        "files",
                        f"{shown}{name} was changed: its SHA-256 is {digest[:12]}…, "
                        f"it was {output.sha256[name][:12]}….",
                        is_problem=name != CARD,
                    )
                )
    return found


def check_others(directory: Path, output: Output, folders: Collection[str], *, shown: str = "") -> list[Finding]:
    """Name the files that are there but not in the record: somebody's notes, perhaps. Hidden ones are passed over.

    Args:
        directory, output, shown: as of `find_files`.
        folders: of the snapshots in it, which have records of their own.
    """
    others: list[str] = []
    for folder, inner, names in os.walk(directory):
        place = Path(folder).relative_to(directory)
        inner[:] = sorted(name for name in inner if not name.startswith(".") and str(place / name) not in folders)
        others += [str(place / name) for name in sorted(names) if not name.startswith(".")]
    others = [name for name in others if name not in output.files]
    if not others:
        return []
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    told = ", ".join(shown + name for name in others[:_SHOWN])
    return [Finding("files", f"Not in the record, and not checked: {told}{more}.", is_problem=False)]


def _digests(paths: list[Path]) -> list[str | ReadError]:
    """The SHA-256 of each file, or why it cannot be read."""
    try:
        return list(sha256_of(paths))
    except ReadError as error:
        if len(paths) == 1:
            return [error]
        return [digest for path in paths for digest in _digests([path])]
