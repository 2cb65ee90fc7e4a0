"""`ckavg inspect`."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from ckavg.cli.commands import with_options
from ckavg.cli.failures import FAILED, failures
from ckavg.cli.options import Choice, Json, Verbose
from ckavg.run.opening import inspect_run


@dataclass(frozen=True, slots=True)
class Inspecting(Choice):
    """The options of `inspect`."""

    as_json: Json = False
    verbose: Verbose = False


@with_options(Inspecting)
def inspect(options: Inspecting) -> None:
    """Show what was found, in which order, and what is wrong with it. Reads no weights.

    Exit status 1 when something stands in the way of averaging.
    """
    from ckavg.report import inspection as report

    with failures(verbose=options.verbose):
        found = inspect_run(options.source, options.selection())
        report.print_inspection(found, as_json=options.as_json)
        if found.problems:
            raise typer.Exit(FAILED)
