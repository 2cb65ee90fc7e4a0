"""`ckavg sweep`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.filesize import decimal

from ckavg.averaging.evaluation import best, check_command, evaluate, record_evaluation
from ckavg.averaging.plan import Plan
from ckavg.cli.average import carry_out_shown, new_warnings, path_shown, plans_of, show_plans, write_plot
from ckavg.cli.errors import INTERRUPTED, distributed, interrupted_with
from ckavg.cli.options import Averaging, result, with_options
from ckavg.cli.push import destination_of, push_shown
from ckavg.cli.text import Output, plain_table, print_json, quoted, say, sparkline, warn, warn_of
from ckavg.engine.distributed import Ranks
from ckavg.errors import HubError, SettingError, WriteError, printable
from ckavg.hub import Destination, continued
from ckavg.output.output_path import path_within
from ckavg.output.record import Record
from ckavg.schemes import Scheme
from ckavg.schemes.parse import is_scheme, parse_schemes

_MOST_BARS = 60
"""Checkpoints whose weights are drawn in a column of the table."""


@dataclass(frozen=True, slots=True)
class Sweeping(Averaging):
    """The options of `sweep`."""

    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[SOURCE] SCHEME...",
            help="Schemes with values to try, such as pema:gamma=0.1,0.15 bema:eta=0.2 mean.",
        ),
    ] = dataclasses.field(kw_only=True)
    eval_command: Annotated[
        str | None,
        result(
            "Run COMMAND on each result, {dir} its directory; the last number that it prints counts.",
            "--eval",
            metavar="COMMAND",
        ),
    ] = None
    eval_goal: Annotated[
        Literal["min", "max"], result("Whether the best result has the least or the greatest number.")
    ] = "min"


@with_options(Sweeping, without=("source",))
def sweep(options: Sweeping) -> None:
    """Form many averages from one reading of the checkpoints: every value of every scheme.

    Each result is the same to the byte as that of the scheme's own command. With --eval, your own command tells which
    of them is best.
    """
    words = list(options.words)
    with distributed(verbose=options.verbose) as ranks:
        if words and not is_scheme(words[0]):
            options = dataclasses.replace(options, source=Path(words.pop(0)))
        if not words:
            raise SettingError("sweep: no scheme is named.", hint="For example: ckavg sweep . pema:gamma=0.1,0.15 mean")
        _average_all(parse_schemes(words), options, ranks)


def _average_all(schemes: tuple[Scheme, ...], options: Sweeping, ranks: Ranks) -> None:
    if options.eval_command is not None:
        check_command(options.eval_command)
    destination = destination_of(options)
    if destination is not None and options.eval_command is None and len(schemes) > 1:
        raise SettingError(
            "sweep: --push-to-hub uploads one average, and nothing tells which of them.",
            hint="Add --eval COMMAND for the best of them; or choose by yourself, with: ckavg push DIR REPO",
        )
    if options.every and len({scheme.every_from for scheme in schemes}) > 1:
        raise SettingError(
            "sweep: with --every, all averages must begin at one burn-in, for updates are counted from it.",
            hint="Sweep each burn-in by itself.",
        )

    def paths_in(home: Path) -> list[Path]:
        base = options.out if options.out is not None else path_within(home, "averaged")
        return [path_within(base, scheme.label) for scheme in schemes]

    plans = plans_of(schemes, options, ranks, destination, paths_in)
    if options.dry_run:
        show_plans(plans, options, of_sweep=True)
        return
    done = carry_out_shown(plans, options, ranks)
    if not ranks.is_first:
        return
    goes_on = "" if destination is None else f" {continued(Path('DIR'), destination)}"
    with interrupted_with(f"All averages are complete in {plans[0].out.parent}.{goes_on}"):
        warn_of(new_warnings(done, plans))
        results, interrupted = list(done.records), False
        if options.eval_command is not None:
            interrupted = not _evaluate_all(results, plans, options.eval_command, quiet=options.quiet)
        winner = best([record.evaluation for record in results], options.eval_goal)
        if options.as_json:
            name = {} if winner is None else {"best": results[winner].outputs[-1].name}
            print_json({"averages": [record.to_dict() for record in results], **name})
        elif not options.quiet:
            print_results(results, winner)
        write_plot(done, options)
        if interrupted:
            raise typer.Exit(INTERRUPTED)
        if destination is not None:
            _push_best(results, 0 if len(results) == 1 else winner, destination, quiet=options.quiet)


def _evaluate_all(results: list[Record], plans: Sequence[Plan], command: str, *, quiet: bool) -> bool:
    """Have the user's command judge each result; one that fails costs nothing else. False after an interrupt."""
    try:
        for place, record in enumerate(results):
            name = record.outputs[-1].name
            if not quiet:
                say(f"evaluating {printable(name)}, {place + 1} of {len(results)}")
            evaluation = evaluate(record.directory, command)
            if evaluation.value is None:
                warn("warning", f"{name} has no evaluation: {evaluation.problem}.")
            try:
                results[place] = record_evaluation(record, evaluation, plans[place])
            except WriteError as error:
                warn("warning", error.message)
    except KeyboardInterrupt:
        warn("interrupted", "The evaluation ends here. All averages are complete.")
        return False
    return True


def _push_best(results: list[Record], winner: int | None, destination: Destination, *, quiet: bool) -> None:
    """Upload the best average; its address goes to stderr, where stdout holds one JSON object already."""
    if winner is None:
        raise HubError(
            "sweep: no average has an evaluation, so that none is the best. Nothing was uploaded.",
            hint=f"Choose by yourself: ckavg push DIR {destination.repo}",
        )
    pushed = push_shown(results[winner].directory, destination, quiet=quiet)
    if not quiet:
        say(printable(f"uploaded {results[winner].outputs[-1].name} to {pushed.url}"))


def print_results(results: Sequence[Record], winner: int | None) -> None:
    """Print the averages side by side, the best of which is number `winner`, and where the results are."""
    out, first = Output(), results[0]
    steps = f"steps {first.steps[0]} to {first.steps[-1]}"
    out.line(f"{len(results)} averages of {len(first.steps)} checkpoints, {steps}", style="bold")
    measured = next((record for record in results if record.path_length), None)
    if measured is not None:
        out.line(path_shown(measured))
    out.line()
    evaluated = any(record.evaluation is not None for record in results)
    columns = (
        "average",
        "weights, first to last",
        "first",
        "last",
        "least",
        "n",
        "age",
        *(("eval", " ") if evaluated else ()),
    )
    table = plain_table(*columns, left=("average", "weights, first to last", " "))
    for place, record in enumerate(results):
        weights = record.weights
        bars = sparkline(weights) if len(weights) <= _MOST_BARS else ""
        cells = [f"{weight:.4f}" for weight in (weights[0], weights[-1], min(weights))]
        cells += [f"{record.effective_count or 1:.1f}", f"{record.mean_age or 0:.0f}"]
        if evaluated:
            value = record.evaluation and record.evaluation.value
            shown = f"{value:.6g}" if value is not None else "failed" if record.evaluation else ""
            cells += [shown, "best" if place == winner else ""]
        table.add_row(quoted(record.outputs[-1].name), bars, *cells, style="bold" if place == winner else "")
    out.print(table)
    out.line()
    out.line(f"read     {decimal(first.bytes_read)} in {first.seconds.total:.1f} s")
    out.line(f"results  {first.directory.parent}" if winner is None else f"best     {results[winner].directory}")
