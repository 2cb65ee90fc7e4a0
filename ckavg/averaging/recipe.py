"""Whether an existing result is up to date: same recipe, same checkpoints, and its own files unchanged.

No weight is read for it: the recipe and the fingerprints of files (`checkpoints/fingerprints.py`) are kept beside the
record, on this machine only.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.fingerprints import Fingerprints, fingerprint_files
from ckavg.errors import CkavgError, listed
from ckavg.output.output_path import CARD, LOCAL, PLOT, is_result
from ckavg.output.published import Local, Made, parse_local, placed, read_local
from ckavg.output.record import Record, parse_record, read_record
from ckavg.output.weight_files import sha256
from ckavg.schemes import SCHEMES
from ckavg.storage.atomic import resolved
from ckavg.storage.base import RemotePath

if TYPE_CHECKING:
    from ckavg.averaging.plan import Plan

FORMAT = 1
"""Raised in a version that makes other bytes from the same recipe."""

_NO_BYTE = {"force", "allow_anchor", "plot"}
"""Options that make no result outdated: they change none of its weights."""

_PATH_OPTIONS = {"path_exclude", "zero_sigma", "sample"}
_SHOWN = 60


def recipe_of(plan: Plan) -> dict[str, Any]:
    """The settings that can change a byte of the result, as plain JSON values by name."""
    unused = _NO_BYTE | (set() if plan.scheme.needs_path else _PATH_OPTIONS)
    options = {each.name: getattr(plan.options, each.name) for each in dataclasses.fields(plan.options)}
    chosen: dict[str, Any] = dict(plan.run.selection.stated)
    init, card = plan.run.selection.init, plan.options.card
    if init is not None and not isinstance(init, RemotePath):
        place = str(resolved(init))
        chosen["init"] = place if plan.target is None else sha256(place.encode())  # private: the recipe is uploaded
    recipe = (
        {"format": FORMAT, "scheme": plan.scheme.name, "checkpoints": plan.run.steps}
        | plan.scheme.parameters()
        | {name: value for name, value in options.items() if name not in unused}
        | chosen
        | {"card": card and sha256(Path(card).read_bytes())}
        | _formulas(plan)
    )
    loaded: dict[str, Any] = json.loads(json.dumps(recipe))
    return loaded


def _formulas(plan: Plan) -> dict[str, Any]:
    """What identifies the formulas of a user's scheme: they may change while its name and fields stay the same."""
    if type(plan.scheme) in SCHEMES:
        return {}
    known = plan.known_coefficients
    return {"coefficients": secrets.token_hex() if known is None else sha256(repr(dataclasses.astuple(known)).encode())}


def made_of(plan: Plan, sources: Fingerprints, directory: Path) -> Made:
    """What to keep about making a result whose weight files are in a directory."""
    own = {name: fingerprint_files([directory / name]) for name in _own_files(plan)}
    return Made(recipe_of(plan), sources, _side_files(plan), own)


def _side_files(plan: Plan) -> dict[str, str]:
    return {name: sha256(data) for name, data in plan.side_files.items()}


def _own_files(plan: Plan) -> list[str]:
    """The files of all outputs that never change once written, by path in the result."""
    names = [name for name in plan.files if name not in (CARD, RESULT_RECORD)]
    return [(out / name).relative_to(plan.out).as_posix() for out in plan.outputs.values() for name in names]


def current_result(plan: Plan, sources: Fingerprints) -> Record | str:
    """The record of the result at a plan's output path if it is up to date; else what differs.

    Args:
        plan: of a result whose output path holds a record.
        sources: the current fingerprints of the files of the checkpoints.
    """
    data, beside = (b"" if plan.target is None else plan.target.read_small(name) for name in (RESULT_RECORD, LOCAL))
    try:
        if plan.target is None:
            return _current(plan, sources, read_record(plan.out), read_local(plan.out), partial(_changed_files, plan))
        record = parse_record(data, plan.shown() / RESULT_RECORD)
        return _current(plan, sources, record, parse_local(beside), partial(_changed_there, plan))
    except CkavgError:
        return "its record is damaged, or of another version"


def finished_result(plan: Plan, sources: Fingerprints) -> Record | None:
    """The record of a result that is formed already and waits for its upload; None if it must be formed."""
    with suppress(CkavgError):
        if is_result(plan.out):
            local = read_local(plan.out)
            found = _current(plan, sources, read_record(plan.out), local, partial(_changed_files, plan), is_here=True)
            return found if isinstance(found, Record) else None
    return None


def _current(
    plan: Plan,
    sources: Fingerprints,
    record: Record,
    local: Local,
    changed: Callable[[Made], list[str]],
    *,
    is_here: bool = False,
) -> Record | str:
    """The record if its result is up to date; else what differs."""
    if local.made is None:
        return "the state of the checkpoints it was made from is not recorded"
    asked = recipe_of(plan)
    outputs = [out if is_here else plan.shown(out) for out in plan.outputs.values()]
    if differing := differences(local.made.recipe, asked):
        own = [each for each in differing if each[0] == "scheme"] or differing  # another scheme has other parameters
        return "; ".join(
            f"{name.replace('_', '-')} {setting_shown(name, there)} there, {setting_shown(name, instead)} asked"
            for name, there, instead in own
        )
    if not _tells(record, plan):
        return "its record was edited"
    if local.made.source_fingerprints != sources or None in sources:
        return _changed_sources(plan, local.made.source_fingerprints, sources)
    beside = _side_files(plan)
    if other := [name for name, digest in beside.items() if local.made.side_files.get(name) != digest]:
        return f"the last checkpoint has another {listed(other)} now"
    if other := changed(local.made):
        return f"its own files have changed since: {listed(other)}"
    return placed(record, local, plan.run, outputs)


def _changed_sources(plan: Plan, before: Fingerprints, now: Fingerprints) -> str:
    if len(before) != len(now):
        return "it has fingerprints of other checkpoints"
    pairs = list(zip(plan.run.steps, before, now, strict=True))
    if changed := [str(step) for step, *pair in pairs if None not in pair and len({*pair}) > 1]:
        return f"the checkpoints of step {listed(changed)} have changed since"
    unknown = [str(step) for step, *pair in pairs if None in pair]
    return f"it is unknown whether step {listed(unknown)} has changed since"


def recorded_recipe(record: Record) -> dict[str, Any]:
    """The recipe of a result as far as its record states it."""
    names = ("dtype", "accumulate", "allow_nonfinite", "zero_sigma", "sample", "path_exclude", "lora", "rank")
    unused = set() if record.path_length is not None else _PATH_OPTIONS
    recipe = (
        {"scheme": record.scheme, "checkpoints": record.steps}
        | record.parameters
        | {name: getattr(record, name) or None for name in names if name not in unused}
        | record.selection
    )
    loaded: dict[str, Any] = json.loads(json.dumps(recipe))
    return loaded


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The settings that differ between two recipes: name, value in the one, value in the other; None if absent.

    >>> differences({"gamma": 0.1, "last": 5}, {"gamma": 0.15, "last": 5, "every": 10})
    [('gamma', 0.1, 0.15), ('every', None, 10)]
    """
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [(name, one.get(name), other.get(name)) for name in names]


def setting_shown(name: str, value: object, *, absent: str = "none") -> str:
    """The value of a setting in a recipe, shortened for a message."""
    if value is None:
        return absent
    if name == "card":
        return f"of SHA-256 {str(value)[:12]}…"
    if name == "checkpoints" and isinstance(value, list):
        return f"{len(value)} of steps {value[0]} to {value[-1]}"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _tells(record: Record, plan: Plan) -> bool:
    """Whether a record is one that a plan would make, as far as that is known beforehand."""
    options, files = plan.options, {*plan.files}
    said = (record.scheme, record.parameters, record.steps, record.dtype, record.allow_nonfinite)
    steps = tuple(plan.run.steps[index] for index in plan.outputs)
    return (
        said == (plan.scheme.name, plan.scheme.parameters(), plan.run.steps, options.dtype, options.allow_nonfinite)
        and tuple(output.step for output in record.outputs) == steps
        and all({*output.files} - {PLOT} == files for output in record.outputs)
    )


def _changed_files(plan: Plan, made: Made) -> list[str]:
    """Files of any output that are missing or were changed after writing."""
    sizes = {} if plan.products else plan.weight_files  # the sizes of products are known only once they are made
    changed = [str(name) for name, nbytes in sizes.items() if _size(plan.out / name) != nbytes]
    for name in _own_files(plan):
        if _size(plan.out / name) is None or made.own_fingerprints.get(name) != fingerprint_files([plan.out / name]):
            changed.append(name)
    for out in plan.outputs.values():
        changed += [
            str((out / name).relative_to(plan.out)) for name in (CARD, RESULT_RECORD) if _size(out / name) is None
        ]
    return list(dict.fromkeys(changed))


def _changed_there(plan: Plan, made: Made) -> list[str]:
    """The same for a result at an address."""
    files = {} if plan.target is None else plan.target.files
    there = {name: info.identity for name, info in files.items()}
    changed = [
        name
        for name in _own_files(plan)
        if there.get(name) in (None, "") or there[name] != made.own_fingerprints.get(name)
    ]
    return changed + [name for name in plan.all_files if name not in there and name not in changed]


def _size(path: Path) -> int | None:
    """The size of a plain file; None if there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
