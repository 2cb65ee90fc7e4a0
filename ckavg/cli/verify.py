"""`ckavg verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from ckavg.cli.errors import FAILED, failures
from ckavg.cli.options import Json, Quiet, Verbose, folder
from ckavg.cli.progress import show_progress
from ckavg.cli.tables import Table, Words
from ckavg.cli.text import Output, plural, print_json, say
from ckavg.errors import SettingError, printable
from ckavg.verify.findings import Verified
from ckavg.verify.verify import ELEMENTS, verify_result

_PASSED = {
    "record": "its numbers follow from each other",
    "files": "nothing is missing or changed",
    "weights": "they load, and none is NaN",
    "sources": "the checkpoints are those that were averaged",
    "replay": "computed again from the checkpoints",
}


def verify(
    result: Annotated[Path, folder("RESULT", "Directory of a result, or of a snapshot in it.")],
    *,
    replay: Annotated[
        bool, typer.Option("--replay", help="Compute elements again from the checkpoints, and compare.")
    ] = False,
    sources: Annotated[
        bool, typer.Option("--sources", help="Read all checkpoints again, and compare their checksums.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory of the checkpoints, if it was moved.", show_default="where it was"),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="The anchor θ_0, if it was moved.", show_default="where it was"),
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Ask the Hub or the store that the record names for the checkpoints.")
    ] = False,
    elements: Annotated[int, typer.Option(metavar="N", min=1, help="How many elements --replay draws.")] = ELEMENTS,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Which elements --replay draws.", show_default="others each time"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Read a result again and check it against its record: files, weights, numbers.

    With --replay and --sources, against the checkpoints, too. Exit status 1 when something is not as recorded.
    """
    with failures(verbose=verbose):
        if not (replay or sources) and (source is not None or init is not None or fetch):
            raise SettingError(
                "verify: --source, --init and --fetch say where the checkpoints are, but none are read.",
                hint="Add --replay or --sources.",
            )

        def say_addresses(places: Sequence[str]) -> None:
            if fetch or not quiet:
                for place in places:
                    say(printable(f"reading {place}"))

        with show_progress(1, quiet=quiet) as on_progress:
            verified = verify_result(
                result,
                replay=replay,
                sources=sources,
                source=source,
                init=init,
                fetch=fetch,
                elements=elements,
                seed=seed,
                on_progress=on_progress,
                on_addresses=say_addresses,
            )
        if as_json:
            print_json(verified.to_dict())
        else:
            print_verified(verified, quiet=quiet)
        if verified.problems:
            raise typer.Exit(FAILED)


def print_verified(verified: Verified, *, quiet: bool) -> None:
    """Print what was checked, then warnings and problems, then the verdict; if quiet, problems alone."""
    out = Output()
    if not quiet:
        out.line(verified.result, style="bold")
        out.line(verified.title, wrap=True)
        out.line()
        wrong = {each.check for each in verified.findings if each.is_problem}
        table = Table("", " ", "  ", left=("", " ", "  "), wraps=("  ",))
        for check in verified.checks:
            outcome = Words("WRONG", "bad") if check in wrong else Words("ok", "good")
            passed = f"{'see below' if check in wrong else _PASSED[check]}{_measured(verified, check)}"
            table.add_row(check, outcome, passed)
        out.table(table)
        for warning in verified.warnings:
            out.warning(warning)
    for problem in verified.problems:
        if not quiet:
            out.line()
        message, *more = problem.splitlines()
        out.problem(message, more)
    if not quiet:
        out.line()
        out.line(_verdict(verified), style="bad" if verified.problems else "good", wrap=True)


def _measured(verified: Verified, check: str) -> str:
    if check == "files":
        return f" ({verified.files} files)"
    if check != "replay" or not verified.elements:
        return ""
    apart = f"at most {verified.largest_deviation:.2f} units in the last place apart"
    return f" ({verified.elements:,} elements, {apart}, seed {verified.seed})"


def _verdict(verified: Verified) -> str:
    read = f"Read {decimal(verified.bytes_read)} in {verified.seconds:.1f} s."
    if not verified.problems:
        return f"All as recorded. {read}"
    return f"{plural(len(verified.problems), 'problem')}: this result is not what its record says. {read}"
