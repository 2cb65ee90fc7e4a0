"""`ckavg inspect`."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Annotated

import typer

from ckavg.checkpoints.inspect import Inspection
from ckavg.cli.commands import with_options
from ckavg.cli.failures import FAILED, failures
from ckavg.cli.options import Choice, Json, Quiet, Verbose
from ckavg.cli.progress import show_progress
from ckavg.engine.distributed import Ranks
from ckavg.output.staging import find_leftovers
from ckavg.sources import inspect_source


@dataclass(frozen=True, slots=True)
class Inspecting(Choice):
    """The options of `inspect`."""

    deep: Annotated[
        bool, typer.Option("--deep", help="Read all weights, too: NaN, stale saves, outliers, SHA-256 of every file.")
    ] = False
    as_json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False


@with_options(Inspecting)
def inspect(options: Inspecting) -> None:
    """Show what was found, in which order, and what is wrong with it. Reads no weights without --deep.

    Exit status 1 when something stands in the way of averaging.
    """
    from ckavg.report import inspection as report

    with failures(verbose=options.verbose):
        found = _with_leftovers(inspect_source(options.source, options.selection(), max_disk=options.max_disk))
        is_sound = not found.problems
        if options.deep:
            is_sound = _look_deep(found, options) and is_sound
        elif options.as_json or not options.quiet:
            report.print_inspection(found, as_json=options.as_json)
        if not is_sound:
            raise typer.Exit(FAILED)


def _with_leftovers(found: Inspection) -> Inspection:
    """With a warning for each average that was interrupted where results go by default."""
    left = find_leftovers(found.home / "averaged")
    return dataclasses.replace(found, warnings=found.warnings + tuple(map(str, left)))


def _look_deep(found: Inspection, options: Inspecting) -> bool:
    """Read the weights of the checkpoints that can be read, show what they reveal; whether they are sound."""
    if not Ranks.of_environment().is_first:  # one reads for all processes of a job
        return True
    from ckavg.health.examine import examine
    from ckavg.remote.fetching import fetch_all
    from ckavg.report.health import print_health

    begun = time.perf_counter()
    with show_progress(1, quiet=options.quiet) as on_progress:
        paths = [shard.path for checkpoint in found.checkpoints for shard in checkpoint.shards]
        fetch_all(found.remote, paths, on_progress)
        health = examine(found.source, found.checkpoints, on_progress=on_progress)
        if found.remote is not None:
            found.remote.release()
    seconds = time.perf_counter() - begun
    if options.as_json or not options.quiet:
        print_health(found, health, seconds=seconds, as_json=options.as_json)
    return not any(finding.is_problem for finding in health.findings)
