"""Stage *report*: what `inspect` shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ckavg.averaging.advice import about_anchor
from ckavg.checkpoints.inspect import Inspection
from ckavg.checkpoints.run import Checkpoint
from ckavg.output.command import as_options, shell_word
from ckavg.report.console import plain_table, print_json, quoted, stdout_console
from ckavg.report.text import as_bytes, as_count, told
from ckavg.storage.address import address_of

_STEP = re.compile(r"\bsteps? (\d{1,18})\b", re.ASCII)


def to_dict(found: Inspection) -> dict[str, Any]:
    """The inspection as plain JSON values."""
    return {
        "source": str(found.source),
        "checkpoints": [
            {
                "step": checkpoint.step,
                "directory": _place(found, checkpoint),
                "files": list(checkpoint.names),
                "bytes": checkpoint.nbytes,
                "dtype": "+".join(checkpoint.dtypes),
            }
            for checkpoint in found.checkpoints
        ],
        "problems": [str(problem) for problem in found.problems],
        "warnings": list(_warnings(found)),
    }


def print_inspection(found: Inspection, *, as_json: bool, verdict: bool = True) -> None:
    """Print the checkpoints, then warnings and problems, to stdout; with `verdict`, what follows from them."""
    console = stdout_console()
    if as_json:
        print_json(to_dict(found))
        return
    if found.checkpoints:
        newest = found.checkpoints[-1]
        floating = sum(entry.numel for entry in newest.entries.values() if entry.is_floating)
        total = as_bytes(sum(checkpoint.nbytes for checkpoint in found.checkpoints))
        console.print(
            quoted(f"{found.source}: {len(found.checkpoints)} checkpoints of {as_count(floating)} parameters, {total}"),
            style="bold",
        )
        console.print()
        console.print(_table(found))
    for warning in _warnings(found):
        console.print()
        console.print(quoted(f"warning: {warning}"), style="yellow")
    for problem in found.problems:
        console.print()
        console.print("problem: ", style="bold red", end="")
        message, *rest = told(problem)
        console.print(quoted(message))
        for line in filter(None, rest):
            console.print(quoted(line), soft_wrap=True)  # it may hold a command, which is copied in one line
    if verdict:
        console.print()
        console.print(quoted(conclusion(found)), soft_wrap=True)


def _warnings(found: Inspection) -> tuple[str, ...]:
    if not found.checkpoints:
        return found.warnings
    first = found.checkpoints[0]
    return found.warnings + about_anchor(first.step, first.entries, with_init=found.selection.init is not None)


def _table(found: Inspection) -> Any:
    table = plain_table("step", "interval", "shards", "size", "dtype", "directory", left=("dtype", "directory"))
    before: int | None = None
    for place, checkpoint in enumerate(found.checkpoints):
        name = _place(found, checkpoint) if place == 0 and found.selection.init else _name(found, checkpoint)
        table.add_row(
            str(checkpoint.step),
            "" if before is None else f"{checkpoint.step - before:+d}",
            str(len(checkpoint.shards)),
            as_bytes(checkpoint.nbytes),
            "+".join(checkpoint.dtypes) or "none",
            quoted(name + (" (anchor)" if place == 0 else "")),
        )
        before = checkpoint.step
    return table


def _name(found: Inspection, checkpoint: Checkpoint) -> str:
    """Within the run: of its directory or file, or of its revision."""
    address = address_of(_place(found, checkpoint))
    if address is None or address.revision is None or address.folder:
        return checkpoint.path.name
    return address.revision


def _place(found: Inspection, checkpoint: Checkpoint) -> str:
    return str(checkpoint.path)


def conclusion(found: Inspection, more: Sequence[tuple[int | None, str]] = ()) -> str:
    """What to do next.

    Args:
        found: what the headers told.
        more: further warnings, each with the step that it is about.
    """
    if found.problems:
        return f"{len(found.problems)} problem{'s' if len(found.problems) > 1 else ''} to solve before averaging."
    count = len(_warnings(found)) + len(more)
    steps = [step for step, _ in more if step is not None] + _steps_named(found)
    verdict = "Nothing stands in the way."
    if count:
        look = f": look at step {steps[0]} first" if steps else ""
        verdict = f"{count} warning{'s' if count > 1 else ''}{look}."
    options = as_options(found.selection.stated)
    return f"{verdict} Next: ckavg pema {shell_word(str(found.source))} {options}".rstrip()


def _steps_named(found: Inspection) -> list[int]:
    """The steps of checkpoints that warnings speak of, in the order of the warnings."""
    steps = {checkpoint.step for checkpoint in found.checkpoints}
    return [step for text in found.warnings for step in map(int, _STEP.findall(text)) if step in steps]
