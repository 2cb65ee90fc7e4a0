"""A record as it may be uploaded, and what is kept of it for this machine alone."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ckavg.errors import RecordError
from ckavg.output.output_path import LOCAL
from ckavg.output.record import BASE_MODEL, RUN, Record, Text, Texts, as_json, is_address, parse_fields
from ckavg.storage.atomic import resolved
from ckavg.storage.local import read_small
from ckavg.storage.redaction import HIDDEN, without_paths, without_secrets

_COMMON = frozenset({"root", "user", "home", "ubuntu", "admin", "runner", "nobody", "localhost"})
_MOST_BYTES_OF_LOCAL = 10_000_000
_LEAST = 4
"""Characters of a name that is hidden wherever it stands."""


def published(record: Record) -> Record:
    """The record without places on this machine, and without what looks like a secret.

    Checkpoints are named as seen from the run; the run as seen from the result, where it holds that, else `RUN`; a base
    model that lies elsewhere is `BASE_MODEL`. Addresses stay.
    """
    places = dict(_paths(record))

    def told(text: Any) -> Any:
        if isinstance(text, tuple):
            return tuple(map(told, text))
        return without_paths(without_secrets(text), places.items()) if isinstance(text, str) else text

    selection = {name: told(value) for name, value in record.selection.items()}
    if record.anchor_is_init:
        selection["init"] = str(_in_run(record, record.selection["init"]))
    return replace(
        record,
        source=record.source if is_address(record.source) else _run_from(record),
        selection=selection,
        warnings=told(record.warnings),
        evaluation=(said := record.evaluation)
        and replace(said, command=told(said.command), problem=told(said.problem), metric=told(said.metric)),
        inputs=tuple(replace(each, directory=_in_run(record, each.directory)) for each in record.inputs),
        outputs=tuple(replace(each, directory=each.directory.relative_to(record.directory)) for each in record.outputs),
    )


@dataclass(frozen=True, slots=True)
class Local:
    """What is kept of a record for this machine alone.

    Attributes:
        source: where the run is; None where it is not on this machine.
        init: where the model is that was given with `--init`; None likewise.
        warnings: those of the record with all their paths.
    """

    source: Text | None = None
    init: Text | None = None
    warnings: Texts = ()

    def to_bytes(self) -> bytes:
        """The same as a file: `.ckavg-local.json`."""
        return as_json(asdict(self)).encode() + b"\n"


def local_of(record: Record) -> Local:
    """What is to be kept beside a record that is published."""
    places = (record.source, record.inputs[0].directory if record.anchor_is_init else None)
    source, init = (None if each is None or is_address(each) else str(Path(each).absolute()) for each in places)
    return Local(source, init, tuple(map(without_secrets, record.warnings)))


def read_local(directory: Path) -> Local:
    """What is kept beside a record, or beside that of the result which this is a snapshot of; anything may be there."""
    from pydantic import TypeAdapter

    for place in (directory, directory.parent):
        with contextlib.suppress(OSError, ValueError, RecordError):
            return TypeAdapter(Local).validate_python(parse_fields(read_small(place / LOCAL, _MOST_BYTES_OF_LOCAL)))
    return Local()


def _in_run(record: Record, place: object) -> str:
    if is_address(place):
        return str(place)
    try:
        return Path(str(place)).relative_to(record.source).as_posix()
    except ValueError:
        return BASE_MODEL


def _run_from(record: Record) -> str:
    """The way from the result to the run, where it leads upwards and so tells no name."""
    way = os.path.relpath(resolved(Path(record.source)), resolved(record.directory))
    return way if set(Path(way).parts) == {os.pardir} else RUN


def _paths(record: Record) -> Iterator[tuple[str, str]]:
    """Texts that name something on this machine, and what stands for each; the more telling ones last."""
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
            for part in place.absolute().parts:  # a word such as `run` is no name
                if len(part) >= _LEAST and not part.isdigit() and not (part.isalpha() and part.islower()):
                    yield part, HIDDEN
    for place, name in local:
        for text in (str(place), str(place.absolute()), str(resolved(place))):
            if "/" in text.strip("/") or (len(text) > 1 and text.startswith("/")):
                yield text, name
