"""`ckavg verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ckavg.cli.failures import FAILED, failures
from ckavg.cli.options import Json, Quiet, Verbose
from ckavg.cli.progress import show_progress
from ckavg.cli.terminal import say
from ckavg.errors import SettingError, printable
from ckavg.verify.verify import ELEMENTS, verify_result


def verify(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="Directory of a result, or of a snapshot in it.")],
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
    from ckavg.report import verify as report

    with failures(verbose=verbose):
        if not (replay or sources) and (source is not None or init is not None or fetch):
            raise SettingError(
                "verify: --source, --init and --fetch say where the checkpoints are, but none are read.",
                hint="Add --replay or --sources.",
            )

        def tell(places: Sequence[str]) -> None:
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
                on_places=tell,
            )
        report.print_verified(verified, as_json=as_json, quiet=quiet)
        if verified.problems:
            raise typer.Exit(FAILED)
