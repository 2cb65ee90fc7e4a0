"""`ckavg inspect`."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from ckavg.averaging.advice import about_anchor
from ckavg.averaging.sources import inspect_source
from ckavg.checkpoints.inspect import Inspection
from ckavg.checkpoints.run import Checkpoint
from ckavg.checkpoints.trainer_log import Course, Trend, read_course, values_at
from ckavg.cli.errors import FAILED, failures, message_of
from ckavg.cli.options import Choice, Json, Quiet, Verbose, with_options
from ckavg.cli.progress import show_progress, show_status
from ckavg.cli.summary import next_command
from ckavg.cli.tables import Table, sparkline
from ckavg.cli.text import Output, as_count, plural, print_json
from ckavg.engine.distributed import Ranks
from ckavg.errors import listed
from ckavg.output.staging import find_leftovers
from ckavg.storage.address import address_of
from ckavg.storage.remote import storages_of

if TYPE_CHECKING:
    from ckavg.verify.findings import Finding
    from ckavg.verify.health import Health

_MOST_FINDINGS = 20
_MOST_FILES = 40
_MOST_VALUES = 60
"""Characters of a sparkline."""

_NAMED = 3
_TRENDS: dict[Trend | None, str] = {
    "falling": "still falling",
    "level": "level",
    "rising": "rising",
    None: "no clear trend",
}
_STEP = re.compile(r"\bsteps? (\d{1,18})\b", re.ASCII)


@dataclass(frozen=True, slots=True)
class Inspecting(Choice):
    """The options of `inspect`."""

    deep: Annotated[
        bool, typer.Option("--deep", help="Read all weights, too: NaN, stale saves, checkpoints that stand out.")
    ] = False
    sha256: Annotated[bool, typer.Option("--sha256", help="As --deep, with the SHA-256 of every weight file.")] = False
    as_json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False


@with_options(Inspecting)
def inspect(options: Inspecting) -> None:
    """Show what was found, in which order, and what is wrong with it. Reads no weights without --deep.

    Exit status 1 when something stands in the way of averaging.
    """
    with failures(verbose=options.verbose):
        with show_status(f"looking for checkpoints in {options.source}", quiet=options.quiet):
            found = inspect_source(options.source, options.selection(), max_disk=options.max_disk)
        left = find_leftovers(found.home / "averaged")
        found = dataclasses.replace(found, warnings=(*found.warnings, *map(str, left)))
        course = read_course(found.last.path) if found.checkpoints else Course("", (), None, ())
        begun = time.perf_counter()
        health = _examine(found, options) if options.deep or options.sha256 else None
        seconds = time.perf_counter() - begun
        if options.as_json:
            deep = {} if health is None else {"health": health_to_dict(health, seconds=seconds)}
            print_json({**inspection_to_dict(found, course), **deep})
        elif not options.quiet:
            out = Output()
            print_inspection(out, found, course)
            if health is not None:
                print_health(out, health, seconds=seconds)
            out.line()
            _print_verdict(out, found, health)
        if found.problems or (health is not None and any(each.is_problem for each in health.findings)):
            raise typer.Exit(FAILED)


def _warnings(found: Inspection) -> tuple[str, ...]:
    if not found.checkpoints:
        return found.warnings
    first = found.checkpoints[0]
    return found.warnings + about_anchor(first.step, first.entries, with_init=found.selection.init is not None)


def _examine(found: Inspection, options: Inspecting) -> Health | None:
    """Read the weights of the checkpoints that can be read; in one process of a job alone."""
    if not Ranks.from_environment().is_first:
        return None
    from ckavg.engine.remote import fetch_all
    from ckavg.verify.health import examine

    with show_progress(1, quiet=options.quiet) as on_progress:
        fetch_all(found.checkpoints, on_progress)
        health = examine(found.source, found.checkpoints, sha256=options.sha256, on_progress=on_progress)
        for storage in storages_of(checkpoint.path for checkpoint in found.checkpoints):
            storage.remove_downloads()
    return health


def inspection_to_dict(found: Inspection, course: Course) -> dict[str, Any]:
    """What the headers and the trainer's log told, as plain JSON values."""
    losses = _eval_losses(found, course)
    return {
        "source": str(found.source),
        "checkpoints": [
            {
                "step": checkpoint.step,
                "directory": str(checkpoint.path),
                "files": list(checkpoint.names),
                "bytes": checkpoint.nbytes,
                "dtype": dtypes,
                "eval_loss": loss,
            }
            for checkpoint, dtypes, loss in zip(found.checkpoints, _dtypes(found.checkpoints), losses, strict=True)
        ],
        "log": {
            "metric": course.metric or None,
            "steps": [step for step, _ in course.values],
            "values": [value for _, value in course.values],
            "trend": course.trend,
        },
        "problems": [problem.as_typed for problem in found.problems],
        "warnings": list(_warnings(found)),
    }


def _eval_losses(found: Inspection, course: Course) -> list[float | None]:
    """The eval_loss of each checkpoint, where one was logged since the one before; the base model has none."""
    own = found.checkpoints[int(found.anchor_is_init) :]
    logged = course.values if course.metric == "eval_loss" else ()
    losses = values_at(logged, [checkpoint.step for checkpoint in own])
    return [None] * (len(found.checkpoints) - len(own)) + losses


def _course_shown(course: Course) -> str:
    """The loss as a sparkline, its first and last value, and what it did in the end."""
    shown = [value for _, value in course.values][:: math.ceil(len(course.values) / _MOST_VALUES)]
    largest = max(map(abs, shown)) or 1.0
    values = [value / largest for value in shown]
    line = sparkline([value - min(values) for value in values])
    trend = _TRENDS[course.trend]
    return f"{course.metric}  {line}  {course.values[0][1]:.4g} to {course.values[-1][1]:.4g}, {trend}"


def print_inspection(out: Output, found: Inspection, course: Course) -> None:
    """Print the checkpoints and how the loss went, then warnings and problems."""
    if found.checkpoints:
        newest = found.checkpoints[-1]
        floating = as_count(sum(entry.numel for entry in newest.entries.values() if entry.is_floating))
        total = decimal(sum(checkpoint.nbytes for checkpoint in found.checkpoints))
        counted = f"{len(found.checkpoints)} checkpoints of {floating} parameters, {total}"
        out.line(f"{found.source}: {counted}", style="bold", wrap=True)
        out.line()
        out.table(_table(found, course))
        if len(course.values) > 1:
            out.line()
            out.line(_course_shown(course), wrap=True)
    for warning in _warnings(found):
        out.warning(warning)
    for problem in found.problems:
        out.line()
        message, *more = message_of(problem)
        out.problem(message, more)


def _table(found: Inspection, course: Course) -> Table:
    losses = _eval_losses(found, course)
    of_loss = ("eval_loss",) if any(loss is not None for loss in losses) else ()
    columns = ("step", "interval", *of_loss, "shards", "size", "dtype", "directory")
    table = Table(*columns, left=("dtype", "directory"), spare=("shards", "interval", "dtype"))
    before: int | None = None
    for checkpoint, dtypes, loss in zip(found.checkpoints, _dtypes(found.checkpoints), losses, strict=True):
        is_anchor = before is None
        address = address_of(str(checkpoint.path))
        name = checkpoint.path.name
        if is_anchor and found.selection.init:
            name = str(checkpoint.path)
        elif address is not None and address.revision is not None and not address.folder:
            name = address.revision
        table.add_row(
            str(checkpoint.step),
            "" if before is None else f"{checkpoint.step - before:+d}",
            *(["" if loss is None else f"{loss:.4g}"] if of_loss else []),
            str(len(checkpoint.shards)),
            decimal(checkpoint.nbytes),
            dtypes or "none",
            name + (" (anchor)" if is_anchor else ""),
        )
        before = checkpoint.step
    return table


def _dtypes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """The floating dtypes of each; of checkpoints with one table of tensors, they are looked for once."""
    known = {id(each.entries): each for each in checkpoints}
    names = {key: "+".join(each.dtypes) for key, each in known.items()}
    return [names[id(each.entries)] for each in checkpoints]


def health_to_dict(health: Health, *, seconds: float) -> dict[str, Any]:
    """What the weights told, as plain JSON values."""
    return {
        "findings": [
            {"kind": each.check, "step": each.step, "tensor": each.tensor, "message": each.message}
            for each in health.findings
        ],
        "path": list(health.path),
        "sha256": dict(health.sha256),
        "bytes_read": health.bytes_read,
        "seconds": seconds,
    }


def print_health(out: Output, health: Health, *, seconds: float) -> None:
    """Print what the weights told: findings, then hashes."""
    for message in _shortened([each for each in health.findings if each.is_problem]):
        out.line()
        out.problem(message)
    for message in _shortened(_suspicions(health)):
        out.warning(message)
    if health.sha256:
        out.line()
        out.line("SHA-256 of the weight files", style="bold")
        for file, digest in list(health.sha256.items())[:_MOST_FILES]:
            out.line(f"{digest}  {file}")
        if len(health.sha256) > _MOST_FILES:
            out.line(f"… {len(health.sha256) - _MOST_FILES} more with --json")
    out.line()
    frozen = [each.tensor for each in health.findings if each.check == "frozen" and each.tensor]
    if frozen:
        out.fact("frozen", f"{plural(len(frozen), 'tensor')} that never move ({listed(frozen, _NAMED)})")
    out.fact("read", f"{decimal(health.bytes_read)}, in {seconds:.1f} s")


def _suspicions(health: Health | None) -> list[Finding]:
    findings = () if health is None else health.findings
    return [each for each in findings if not each.is_problem and each.check != "frozen"]


def _shortened(findings: Sequence[Finding]) -> list[str]:
    messages = [finding.message for finding in findings]
    hidden = len(messages) - _MOST_FINDINGS
    return messages if hidden <= 0 else [*messages[:_MOST_FINDINGS], f"and {hidden} more, all of them with --json."]


def _print_verdict(out: Output, found: Inspection, health: Health | None) -> None:
    """Print whether anything stands in the way, and what to do next."""
    findings = () if health is None else health.findings
    unsound = sorted({each.step for each in findings if each.is_problem and each.step is not None})
    if unsound:
        options = " ".join(f"--skip-step {step}" for step in unsound[:_NAMED]) + " …" * (len(unsound) > _NAMED)
        where = plural(len(unsound), "checkpoint")
        verdict = f"NaN or infinity in {where}: leave them out with {options}, or save them again."
        out.line(verdict, style="bad", wrap=True)
        return
    if found.problems:
        out.line(f"{plural(len(found.problems), 'problem')} to solve before averaging.", style="bad", wrap=True)
        return
    more = _suspicions(health)
    known = {checkpoint.step for checkpoint in found.checkpoints}
    named = [int(step) for text in found.warnings for step in _STEP.findall(text)]
    steps = [each.step for each in more if each.step is not None] + [step for step in named if step in known]
    if count := len(_warnings(found)) + len(more):
        out.line(f"{plural(count, 'warning')}{f': look at step {steps[0]} first' if steps else ''}.", style="warning")
    else:
        out.line("Nothing stands in the way.", style="good")
    out.fact("next", next_command(found.source, found.selection), style="command")
