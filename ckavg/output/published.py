"""Stage *write*: a record as it may be uploaded, and what is kept of it for this machine alone."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckavg.output.record import BASE_MODEL, RUN, Averaged, as_json, is_address
from ckavg.storage.atomic import resolved
from ckavg.storage.redaction import HIDDEN, without_places, without_secrets

_COMMON = frozenset({"root", "user", "home", "ubuntu", "admin", "runner", "nobody", "localhost"})
_LEAST = 4
"""Characters of a name that is hidden wherever it stands."""


def published(record: Averaged) -> Averaged:
    """The record without places on this machine, and without what looks like a secret.

    Checkpoints are named as seen from the run; the run as seen from the result, where it holds that, else `RUN`; a base
    model that lies elsewhere is `BASE_MODEL`. Addresses stay.
    """
    places = dict(_places(record))

    def told(text: Any) -> Any:
        if isinstance(text, tuple):
            return tuple(map(told, text))
        return without_places(without_secrets(text), places.items()) if isinstance(text, str) else text

    selection = {name: told(value) for name, value in record.selection.items()}
    if "init" in selection:
        selection["init"] = str(_in_run(record, record.selection["init"]))
    evaluation = record.evaluation and dataclasses.replace(
        record.evaluation, command=told(record.evaluation.command), problem=told(record.evaluation.problem)
    )
    return dataclasses.replace(
        record,
        source=record.source if is_address(record.source) else _run_from(record),
        selection=selection,
        warnings=told(record.warnings),
        evaluation=evaluation,
        inputs=tuple(dataclasses.replace(each, directory=_in_run(record, each.directory)) for each in record.inputs),
        outputs=tuple(
            dataclasses.replace(each, directory=each.directory.relative_to(record.directory)) for each in record.outputs
        ),
    )


def kept_here(record: Averaged) -> bytes | None:
    """Where the run and its base model are, and the warnings with all paths; None where neither is here."""
    source = None if is_address(record.source) else str(Path(record.source).absolute())
    init = record.inputs[0].directory if "init" in record.selection else None
    init = None if init is None or is_address(init) else str(Path(init).absolute())
    if source is None and init is None:
        return None
    warnings = tuple(map(without_secrets, record.warnings))
    return as_json({"source": source, "init": init, "warnings": warnings}).encode() + b"\n"


def _in_run(record: Averaged, place: object) -> str:
    if is_address(place):
        return str(place)
    try:
        return Path(str(place)).relative_to(record.source).as_posix()
    except ValueError:
        return BASE_MODEL


def _run_from(record: Averaged) -> str:
    """The way from the result to the run, where it leads upwards and so tells no name."""
    way = os.path.relpath(resolved(Path(record.source)), resolved(record.directory))
    return way if set(Path(way).parts) == {os.pardir} else RUN


def _places(record: Averaged) -> Iterator[tuple[str, str]]:
    """Texts that name something on this machine, and what stands for each; the more telling ones last."""
    home, here = Path("~").expanduser() if "HOME" in os.environ else Path(), Path.cwd()
    known: list[tuple[object, str]] = [(home, "~"), (here, "."), (record.directory, "RESULT")]
    known += [(record.selection["init"], BASE_MODEL)] if "init" in record.selection else []
    known.append((record.source, RUN))
    local = [(Path(str(place)), name) for place, name in known if not is_address(place)]
    for name in (socket.gethostname(), os.environ.get("USER", ""), os.environ.get("LOGNAME", ""), home.name):
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
