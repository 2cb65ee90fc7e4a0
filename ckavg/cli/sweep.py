"""`ckavg sweep`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from ckavg.averaging.plan import Plan, result_name
from ckavg.averaging.publish import discard_sent
from ckavg.cli.average import (
    Asked,
    carry_out_shown,
    new_warnings,
    plans_of,
    write_plot,
    write_report,
)
from ckavg.cli.completion import scheme_words
from ckavg.cli.errors import distributed, interrupted_with
from ckavg.cli.evaluation import (
    Evaluated,
    criterion_from,
    directory_here,
    evaluate_all,
    marks,
    print_curves,
    ranking_to_dict,
    send_shown,
    shown_value,
    unsent,
    write_curves,
)
from ckavg.cli.options import Averaging, with_options
from ckavg.cli.push import destination_of, push_shown
from ckavg.cli.summary import as_result, path_shown, print_next, show_plans
from ckavg.cli.tables import Cell, Spark, Table
from ckavg.cli.text import Output, print_json, print_places, say, warn, warn_of
from ckavg.engine.distributed import Ranks
from ckavg.errors import SettingError, listed, printable
from ckavg.hub import Destination, continued
from ckavg.output.output_path import path_within
from ckavg.output.record import Record
from ckavg.schemes.parse import Word, is_scheme, parse_words


@dataclass(frozen=True, slots=True)
class Sweeping(Averaging):
    """The options of `sweep`."""

    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[SOURCE] SCHEME...",
            help="Schemes with values to try, such as pema:gamma=0.1,0.15,every=50,100 mean:last=10.",
            autocompletion=scheme_words,
        ),
    ] = dataclasses.field(kw_only=True)


@with_options(Sweeping, without=("source",))
def sweep(options: Sweeping) -> None:
    """Form many averages from one reading of the checkpoints: every value of every scheme.

    Each result is the same to the byte as that of the scheme's own command.
    """
    words = list(options.words)
    with distributed(verbose=options.verbose, timeout=options.rank_timeout) as ranks:
        if options.part is not None:
            raise SettingError(
                "sweep: --part is a part of one average.",
                hint="Do each average by its own command, and join its parts.",
            )
        if words and not is_scheme(words[0]):
            options = dataclasses.replace(options, source=Path(words.pop(0)))
        if not words:
            raise SettingError("sweep: no scheme is named.", hint="For example: ckavg sweep . pema:gamma=0.1,0.15 mean")
        average_words(parse_words(words), options, ranks)


def average_words(words: Sequence[Word], options: Sweeping, ranks: Ranks) -> None:
    """Form the averages that words ask for, evaluate and show them."""
    _average_all([_asked(word, options) for word in words], options, ranks)


def _asked(word: Word, options: Sweeping) -> Asked:
    """What a word asks for; its selection takes the place of the options."""
    options = dataclasses.replace(options, **dict[str, Any](word.selection))
    return Asked(word.scheme, options.selection(word.scheme.every_from), word.text)


def _average_all(asked: list[Asked], options: Sweeping, ranks: Ranks) -> None:
    criterion = criterion_from(options)
    destination = destination_of(options)
    if destination is not None and criterion is None and len(asked) > 1:
        raise SettingError(
            "sweep: --push-to-hub uploads one average, and nothing tells which of them.",
            hint="Add --eval COMMAND for the best of them; or choose by yourself, with: ckavg push DIR REPO",
        )

    def paths_in(home: Path) -> list[Path]:
        base = options.out if options.out is not None else path_within(home, "averaged")
        return [
            path_within(base, result_name(each.scheme, each.selection, options.lora, options.rank)) for each in asked
        ]

    plans = plans_of(asked, options, ranks, destination, paths_in)
    if options.dry_run:
        show_plans(plans, options, of_sweep=True)
        return
    done = carry_out_shown(plans, options, ranks)
    if not ranks.is_first:
        return
    goes_on = "" if destination is None else f" {continued(Path('DIR'), destination)}"
    complete = f"All averages are complete in {plans[0].out.parent}.{goes_on}"
    with interrupted_with(complete if plans[0].target is None else unsent(plans)):
        warn_of(new_warnings(done, plans))
        evaluated = send_shown(evaluate_all(done.records, plans, criterion, options), plans, quiet=options.quiet)
        results = evaluated.records
        if options.quiet and not options.as_json:
            print_places([record.directory for record in results])
        elif options.as_json:
            averages = {"averages": [as_result(*each) for each in zip(results, plans, strict=True)]}
            print_json(averages | ranking_to_dict(evaluated) | evaluated.to_dict())
        else:
            print_results(evaluated, plans)
            print_curves(evaluated)
        write_plot(done, options, evaluated)
        write_curves(evaluated, options.csv)
        write_report(done, options, evaluated)
        evaluated.check()
        if destination is not None:
            _push_best(evaluated, plans, destination, quiet=options.quiet)
        discard_sent(plans)


def _push_best(evaluated: Evaluated, plans: Sequence[Plan], destination: Destination, *, quiet: bool) -> None:
    """Upload the best average; its address goes to stderr, where stdout holds one JSON object already."""
    names = [record.output.name for record in evaluated.records]
    best = 0
    if (ranking := evaluated.ranking) is not None:
        best = ranking.best
        if ranking.equal:
            others = listed([names[index] for index in ranking.equal])
            warn("warning", f"{names[best]} is uploaded, the first in the order given; equal to it: {others}.")
    directory = directory_here(plans[best], evaluated.records[best], quiet=quiet)
    pushed = push_shown(directory, destination, quiet=quiet)
    if not quiet:
        say(printable(f"uploaded {names[best]} to {pushed.url}"))


def print_results(evaluated: Evaluated, plans: Sequence[Plan]) -> None:
    """Print the averages side by side, with their evaluations, if there are any, and where the results are."""
    results, criterion = evaluated.records, evaluated.criterion
    best = None if evaluated.ranking is None else evaluated.ranking.best
    out = Output()
    visited = sorted({step for record in results for step in record.steps})
    title = f"{len(results)} averages of {len(visited)} checkpoints, steps {visited[0]} to {visited[-1]}"
    out.line(title, style="bold", wrap=True)
    groups: dict[str, list[int]] = {}
    for place, record in enumerate(results):
        groups.setdefault(record.chosen, []).append(place)
    if len(groups) == 1 and (measured := _measured(results)) is not None:
        out.line(path_shown(measured), wrap=True)
    out.line()
    shown: tuple[str, ...] = () if criterion is None else (printable(criterion.metric or "eval"), " ")
    new = [record for record, plan in zip(results, plans, strict=True) if plan.current is None]
    shown += () if len(new) == len(results) else ("state",)
    columns = ("average", "weights", "first", "last", "least", "n", "age", *shown)
    table = Table(
        *columns, left=("average", "weights", " ", "state"), spare=("state", "first", "least", "weights", "last", "age")
    )
    of_results = marks(evaluated.ranking, len(results))
    for chosen, places in groups.items():
        if len(groups) > 1:
            group = [results[place] for place in places]
            measured = _measured(group)
            path = f", {path_shown(measured)}" if measured is not None else ""
            table.add_heading(f"{chosen}: {len(group[0].steps)} checkpoints{path}")
        for place in places:
            record = results[place]
            name = record.output.name if len(groups) == 1 else f"  {record.to_scheme().label}"
            ends = record.weights[0], record.weights[-1], min(record.weights)
            cells: list[str | Cell] = [f"{weight:.4f}" for weight in ends]
            cells += [f"{record.effective_count or 1:.1f}", f"{record.mean_age or 0:.0f}"]
            cells += [] if criterion is None else [shown_value(record.evaluation), of_results[place]]
            cells += [] if len(new) == len(results) else ["up to date" if plans[place].is_up_to_date else "new"]
            table.add_row(name, _spark(record, visited), *cells, style="good" if place == best else "")
    out.table(table)
    out.line()
    if new:
        out.fact("read", f"{decimal(new[0].bytes_read)} in {new[0].seconds.total:.1f} s")
    if best is not None:
        out.fact("best", results[best].directory, style="path")
        print_next(out, results[best], plans[best])
        return
    out.fact("results", results[0].directory.parent, style="path")
    if criterion is None:
        out.fact("next", "the same with --eval 'COMMAND {dir}' shows which is best", style="command")


def _measured(results: Sequence[Record]) -> Record | None:
    """The first that has a path length."""
    return next((record for record in results if record.path_length), None)


def _spark(record: Record, visited: Sequence[int]) -> Spark:
    """Its weights against the steps that any average visits."""
    weights = dict(zip(record.steps, record.weights, strict=True))
    return Spark([weights.get(step) for step in visited])
