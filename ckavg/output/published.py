"""A record as it may be uploaded, and the local file with what only concerns this machine."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.checkpoints.run import Run
from ckavg.errors import RecordError
from ckavg.output.output_path import LOCAL
from ckavg.output.record import BASE_MODEL, RUN, FileName, Record, Text, Texts, as_json, is_address, parse_fields
from ckavg.storage.atomic import cache_directory, resolved
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.local import read_small
from ckavg.storage.redaction import HIDDEN, without_paths, without_secrets

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_COMMON = frozenset({"root", "user", "home", "ubuntu", "admin", "runner", "nobody", "localhost"})
_MOST_BYTES_OF_LOCAL = 10_000_000
_LEAST = 4
"""Shortest name, in characters, that is hidden wherever it appears."""


def published(record: Record) -> Record:
    """The record without paths of this machine and without anything that looks like a secret.

    Checkpoints are named relative to the run; the run relative to the result if it contains it, else `RUN`; a base
    model elsewhere is `BASE_MODEL`. Addresses stay.
    """
    places = dict(_paths(record))

    def hidden(text: Any) -> Any:
        if isinstance(text, tuple):
            return tuple(map(hidden, text))
        return without_paths(without_secrets(text), places.items()) if isinstance(text, str) else text

    selection = {name: hidden(value) for name, value in record.selection.items()}
    if record.anchor_is_init:
        selection["init"] = str(_in_run(record, record.selection["init"]))
    return replace(
        record,
        source=record.source if is_address(record.source) else _run_from(record),
        selection=selection,
        warnings=hidden(record.warnings),
        evaluation=(said := record.evaluation)
        and replace(said, command=hidden(said.command), problem=hidden(said.problem), metric=hidden(said.metric)),
        inputs=tuple(replace(each, directory=_in_run(record, each.directory)) for each in record.inputs),
        outputs=tuple(replace(each, directory=each.directory.relative_to(record.directory)) for each in record.outputs),
    )


@dataclass(frozen=True, slots=True)
class Made:
    """What a result was made from, so that an unchanged one is not made again.

    Attributes:
        recipe: what was asked for; see `averaging/recipe.py`.
        source_fingerprints: of the files of each checkpoint; None if a later change could go unnoticed.
        side_files: SHA-256 of the files copied beside the weights, before they are adapted.
        own_fingerprints: of each file of the result by path, except the record, the card and its plot.
    """

    recipe: dict[Text, Any]
    source_fingerprints: tuple[Text | None, ...]
    side_files: dict[FileName, Text]
    own_fingerprints: dict[FileName, Text]


@dataclass(frozen=True, slots=True)
class Local:
    """The part of a record that stays on this machine.

    Attributes:
        source: path of the run; None if it is not on this machine.
        init: path of the model given with `--init`; None if it is not on this machine.
        warnings: those of the record, with full paths.
        made: what the result was made from; None in results of earlier versions.
    """

    source: Text | None = None
    init: Text | None = None
    warnings: Texts = ()
    made: Made | None = None

    def to_bytes(self) -> bytes:
        """The content of `.ckavg-local.json`."""
        return as_json(asdict(self)).encode() + b"\n"


def local_of(record: Record, made: Made | None = None) -> Local:
    """The local part of a record."""
    places = (record.source, record.inputs[0].directory if record.anchor_is_init else None)
    source, init = (None if each is None or is_address(each) else str(Path(each).absolute()) for each in places)
    return Local(source, init, tuple(map(without_secrets, record.warnings)), made)


@functools.cache
def _adapter() -> TypeAdapter[Local]:
    """The validator, made once."""
    from pydantic import TypeAdapter

    return TypeAdapter(Local)


def read_local(directory: Path) -> Local:
    """The local part of a record; of a snapshot, that of its result. Empty if the file is missing or invalid."""
    for place in (directory, directory.parent):
        with contextlib.suppress(OSError, ValueError):
            if (found := parse_local(read_small(place / LOCAL, _MOST_BYTES_OF_LOCAL))) != Local():
                return found
    return Local()


def parse_local(data: bytes) -> Local:
    """The local part of a record from the content of its file; empty if that is invalid."""
    with contextlib.suppress(ValueError, RecordError):
        return _adapter().validate_python(parse_fields(data))
    return Local()


def placed(record: Record, local: Local, run: Run, outputs: Sequence[Path]) -> Record:
    """A published record with its local paths put back: of the run, and of each output."""
    return replace(
        record,
        source=run.address,
        selection=run.selection.stated,
        warnings=local.warnings or record.warnings,
        inputs=tuple(
            replace(each, directory=pinned(checkpoint.directory))
            for each, checkpoint in zip(record.inputs, run.checkpoints, strict=True)
        ),
        outputs=tuple(replace(each, directory=out) for each, out in zip(record.outputs, outputs, strict=True)),
    )


def pinned(path: AnyPath) -> str:
    """A path or address that keeps its meaning: an address is pinned to a version."""
    return path.storage.address(path, is_pinned=True) if isinstance(path, RemotePath) else str(path)


def _in_run(record: Record, place: object) -> str:
    if is_address(place):
        return str(place)
    try:
        return Path(str(place)).relative_to(record.source).as_posix()
    except ValueError:
        return BASE_MODEL


def _run_from(record: Record) -> str:
    """The relative path from the result to the run, if it only leads upwards and so reveals no name; else `RUN`."""
    if cache_directory() in record.directory.parents:  # on its way to an address
        return RUN
    way = os.path.relpath(resolved(Path(record.source)), resolved(record.directory))
    return way if set(Path(way).parts) == {os.pardir} else RUN


def _paths(record: Record) -> Iterator[tuple[str, str]]:
    """Texts that name something on this machine, and the replacement of each; the more specific ones last."""
    home, here = Path("~").expanduser() if "HOME" in os.environ else Path(), Path.cwd()
    known: list[tuple[object, str]] = [(home, "~"), (here, "."), (record.directory, "RESULT")]
    known += [(record.selection["init"], BASE_MODEL)] if "init" in record.selection else []
    known.append((record.source, RUN))
    local = [(Path(str(place)), name) for place, name in known if not is_address(place)]
    for name in (platform.node(), os.environ.get("USER", ""), os.environ.get("LOGNAME", ""), home.name):
        if len(name) >= _LEAST and name not in _COMMON:
            yield name, HIDDEN
    for place, name in local:
        if name not in ("RESULT", "~"):
            for part in place.absolute().parts:  # a plain word such as `run` reveals nothing
                if len(part) >= _LEAST and not part.isdigit() and not (part.isalpha() and part.islower()):
                    yield part, HIDDEN
    for place, name in local:
        for text in (str(place), str(place.absolute()), str(resolved(place))):
            if "/" in text.strip("/") or (len(text) > 1 and text.startswith("/")):
                yield text, name
