"""A result made in parts, each by a process of its own: the description they share, and the plan that joins them.

The first part to begin leaves a description beside the weights. It holds values, nothing that is executed. It is not
trusted: every value is validated, and the plan made from it must have the same recipe.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg import __version__
from ckavg.averaging.plan import Options, Plan, checked, plan_averages
from ckavg.averaging.recipe import differences, recipe_of, setting_shown
from ckavg.averaging.sources import inspect_source
from ckavg.checkpoints.fingerprints import file_fingerprints
from ckavg.checkpoints.run import Selection
from ckavg.engine.job import RANK_FILE
from ckavg.engine.members import look_at
from ckavg.errors import OutputError, RecordError
from ckavg.output.output_path import JOB, PARTIAL, beside, empty, is_result
from ckavg.output.record import Count, Digest, Parameter, Text, parse_fields, scheme_from
from ckavg.storage.atomic import create_whole, resolved
from ckavg.storage.local import read_small

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_MOST_BYTES = 10_000_000
_AFRESH = "Use the same command for all parts, or delete that directory to start again."


@dataclass(frozen=True, slots=True)
class Parts:
    """The average that parts belong to.

    Attributes:
        version: of ckavg.
        count: how many parts there are.
        source, out: where the checkpoints are, and where the result goes.
        scheme, parameters, selection, options: the request; the fields of `Selection` and `Options`.
        device: the device that computes.
        recipe: the settings that can change a byte.
        checkpoints: hash of the checkpoints, the same on every machine; see `hash_run`.
        host, state: a machine, and the fingerprints of the checkpoints as it sees them.
    """

    version: Text
    count: Count
    source: Text
    out: Text
    scheme: Text
    parameters: dict[Text, Parameter | None]
    selection: dict[Text, Any]
    options: dict[Text, Any]
    device: Text
    recipe: dict[Text, Any]
    checkpoints: Digest
    host: Text
    state: list[Text | None]


def parts_of(plan: Plan, count: int, device: str, checkpoints: str) -> Parts:
    """The description of an average for its parts."""
    run = plan.run
    source = run.address if "://" in run.address else str(resolved(Path(run.address)))
    selection = {each.name: getattr(run.selection, each.name) for each in dataclasses.fields(run.selection)}
    if selection["init"] is not None and "://" not in str(selection["init"]):
        selection["init"] = resolved(selection["init"])
    options = {each.name: getattr(plan.options, each.name) for each in dataclasses.fields(plan.options)}
    if options["card"] is not None:
        options["card"] = resolved(Path(options["card"]))
    return Parts(
        version=__version__,
        count=count,
        source=source,
        out=str(resolved(plan.out)),
        scheme=plan.scheme.name,
        parameters=dict(plan.scheme.parameters()),
        selection=selection,
        options=options,
        device=device,
        recipe=recipe_of(plan),
        checkpoints=checkpoints,
        host=platform.node(),
        state=list(file_fingerprints(run)),
    )


def begin_part(plan: Plan, parts: Parts, *, holds_files: Callable[[], bool]) -> Callable[[Path, bool], None]:
    """The function that a part calls on entering the directory that all parts fill.

    Args:
        plan: of the average.
        parts: its description.
        holds_files: whether the directory has the weight files of the plan.

    Raises:
        OutputError: the parts there belong to another average.
    """

    def begin(directory: Path, is_alone: bool) -> None:
        if not (directory / JOB).exists() and is_alone:
            if not holds_files():
                empty(directory)
            if create_whole(directory / JOB, json.dumps(dataclasses.asdict(parts), default=str).encode()):
                return
        if why := _differing(read_parts(directory), parts, plan):
            raise OutputError(f"{directory} holds parts of another average: {why}.", hint=_AFRESH)

    return begin


def _differing(there: Parts, own: Parts, plan: Plan) -> str:
    """How the parts that are there differ from those asked for; empty if they do not."""
    recipes = differences(there.recipe, own.recipe)
    texts = [
        f"{name.replace('_', '-')} {setting_shown(name, before)} there, {setting_shown(name, now)} asked"
        for name, before, now in recipes
    ]
    for name in ("count", "version", "device"):
        if (before := getattr(there, name)) != (now := getattr(own, name)):
            texts.append(f"{'parts' if name == 'count' else name} {before} there, {now} asked")
    if not texts and there.checkpoints != own.checkpoints:
        texts.append("other checkpoints")
    if not texts and there.host == own.host and there.state != own.state:
        texts.append("the checkpoints have changed since")
    return "; ".join(texts)


def find_parts(result: Path) -> tuple[Path, Parts]:
    """The directory that holds parts of a result, and their description.

    Raises:
        OutputError: there are no parts.
        RecordError: their description is not valid.
    """
    result = resolved(result)
    is_partial = result.name.startswith(".") and result.name.endswith(PARTIAL)
    directory = result if is_partial else beside(result, PARTIAL)
    if not (directory / JOB).exists():
        if is_result(result):
            raise OutputError(f"{result} is complete already.", hint=f"Look at it with: ckavg verify {result}")
        raise OutputError(
            f"{directory} holds no parts of an average.", hint="Begin with: ckavg pema SOURCE --out RESULT --part 0/2"
        )
    parts = read_parts(directory)
    if beside(resolved(Path(parts.out)), PARTIAL) != directory:
        raise RecordError(f"{directory / JOB} describes another result: {parts.out}.", hint=_AFRESH)
    return directory, parts


def parts_at_work(directory: Path, count: int) -> list[int]:
    """The parts that a process is working on, as far as locks show."""
    seen = {part: look_at(directory / f"{RANK_FILE}{part}") for part in range(count)}
    return [part for part, found in seen.items() if found is not None and found[1]]


def read_parts(directory: Path) -> Parts:
    """The description of the parts in a directory.

    Raises:
        RecordError: it is not valid.
    """
    file = directory / JOB
    try:
        fields = parse_fields(read_small(file, _MOST_BYTES, follow=False))
        return _adapter().validate_python(fields)
    except (OSError, ValueError, RecordError) as error:
        raise RecordError(f"{file} is not valid: {_reason(error)}.", hint=_AFRESH) from error


def _reason(error: Exception) -> str:
    """The first line of an error, as the end of a sentence."""
    why = getattr(error, "strerror", None) or getattr(error, "message", str(error))
    return str(why).partition("\n")[0].rstrip(".")


@functools.cache
def _adapter() -> TypeAdapter[Parts]:
    from pydantic import TypeAdapter

    return TypeAdapter(Parts)


def plan_of_parts(directory: Path, parts: Parts, *, plot: bool = False) -> Plan:
    """The plan for joining parts: the same as that of each part, and whether the card gets its plot.

    Raises:
        CkavgError: the checkpoints are gone, or the description is not valid.
    """
    try:
        selection = Selection(**_typed(Selection, parts.selection))
        options = Options(**_typed(Options, parts.options) | {"plot": plot})
        scheme = scheme_from(parts.scheme, parts.parameters)
    except (ValueError, TypeError, KeyError, RecordError) as error:
        raise RecordError(f"{directory / JOB} is not valid: {_reason(error)}.", hint=_AFRESH) from error
    found, out = inspect_source(parts.source, selection), Path(parts.out)
    (run,) = checked([found], [out], force=options.force)
    (plan,) = plan_averages([(run, scheme, out)], options)
    own = parts_of(plan, parts.count, parts.device, parts.checkpoints)
    if plan.current is None and (why := _differing(parts, own, plan)):
        raise OutputError(f"{directory} holds parts of another average: {why}.", hint=_AFRESH)
    return plan


def _typed(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the fields of a dataclass, each checked against its type.

    Raises:
        ValueError, KeyError: a value or a name does not fit.
    """
    from pydantic import TypeAdapter

    hints = typing.get_type_hints(kind) | {"init": str | None, "card": str | None}
    typed = {name: TypeAdapter(hints[name]).validate_python(value) for name, value in values.items()}
    if typed.get("init") is not None:
        typed["init"] = Path(typed["init"])
    return typed
