"""`ckavg sweep`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

from ckavg.averaging.evaluation import best, check_command, evaluate, record_evaluation
from ckavg.averaging.plan import Plan, checked
from ckavg.cli.averaging import carry_out_shown, check_plot, plans_of, warn_of, warn_of_leftovers, write_plot
from ckavg.cli.commands import joined
from ckavg.cli.failures import INTERRUPTED
from ckavg.cli.options import Sweeping
from ckavg.cli.push import check_push, destination_of, interrupted_with, push_shown
from ckavg.cli.ranks import together
from ckavg.cli.terminal import say, warn
from ckavg.engine.distributed import Ranks
from ckavg.errors import HubError, SettingError, WriteError
from ckavg.hub.destination import Destination
from ckavg.hub.publish import continued
from ckavg.output.output_path import path_within
from ckavg.output.record import Record
from ckavg.report.text import printable
from ckavg.schemes import SCHEMES, Scheme
from ckavg.schemes.parse import is_scheme, parse_schemes
from ckavg.sources import inspect_source


def _describe(
    *,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[SOURCE] SCHEME...",
            help="Schemes with values to try, such as pema:gamma=0.1,0.15 bema:eta=0.2 mean.",
        ),
    ],
) -> None:
    """Form many averages from one reading of the checkpoints: every value of every scheme.

    Each result is the same to the byte as that of the scheme's own command. With --eval, your own command tells which
    of them is best.
    """


def _sweep(options: Sweeping, values: Mapping[str, object]) -> None:
    words = list(cast(Sequence[str], values["words"]))
    with together(verbose=options.verbose) as ranks:
        if words and not is_scheme(words[0], SCHEMES):
            options = dataclasses.replace(options, source=Path(words.pop(0)))
        if not words:
            raise SettingError("sweep: no scheme is named.", hint="For example: ckavg sweep . pema:gamma=0.1,0.15 mean")
        _average_all(parse_schemes(words, SCHEMES), options, ranks)


_describe.__name__ = "sweep"
sweep = joined(_describe, Sweeping, inspect.signature(_describe, eval_str=True).parameters, _sweep, takes_source=False)


def _average_all(schemes: tuple[Scheme, ...], options: Sweeping, ranks: Ranks) -> None:
    from ckavg.report import sweep as report

    if options.eval_command is not None:
        check_command(options.eval_command)
    destination = destination_of(options)
    if destination is not None and options.eval_command is None and len(schemes) > 1:
        raise SettingError(
            "sweep: --push-to-hub uploads one average, and nothing tells which of them.",
            hint="Add --eval COMMAND for the best of them; or choose by yourself, with: ckavg push DIR REPO",
        )
    origins = {scheme.every_from for scheme in schemes}
    if options.every and len(origins) > 1:
        raise SettingError(
            "sweep: with --every, all averages must begin at one burn-in, for updates are counted from it.",
            hint="Sweep each burn-in by itself.",
        )
    found = inspect_source(options.source, options.selection(origins.pop()), max_disk=options.max_disk)
    base = options.out if options.out is not None else path_within(found.home, "averaged")
    places = [path_within(base, scheme.label) for scheme in schemes]
    run = checked(found, places, force=options.force)
    check_plot(options, run)
    plans = plans_of(run, list(zip(schemes, places, strict=True)), options)
    warn_of(dict.fromkeys(warning for plan in plans for warning in plan.warnings))
    warn_of_leftovers(plans)
    if ranks.is_first:
        check_push(destination, plans[0].files)
    if options.dry_run:
        warn_of(dict.fromkeys(warning for plan in plans for warning in plan.foreseen))
        report.print_plans(plans, as_json=options.as_json)
        return
    done = carry_out_shown(plans, options, ranks)
    if not ranks.is_first:
        return
    goes_on = "" if destination is None else f" {continued(Path('DIR'), destination)}"
    with interrupted_with(f"All averages are complete in {base}.{goes_on}"):
        told = {warning for plan in plans for warning in plan.warnings}
        warn_of(dict.fromkeys(each for result in done.records for each in result.warnings if each not in told))
        results, interrupted = list(done.records), False
        if options.eval_command is not None:
            interrupted = not _evaluate_all(results, plans, options.eval_command, quiet=options.quiet)
        report.print_results(results, goal=options.eval_goal, as_json=options.as_json, quiet=options.quiet)
        write_plot(done, options)
        if interrupted:
            raise typer.Exit(INTERRUPTED)
        if destination is not None:
            _push_best(results, destination, options)


def _push_best(results: list[Record], destination: Destination, options: Sweeping) -> None:
    """Upload the best average; its address goes to stderr, where stdout holds one JSON object already."""
    winner = best([result.evaluation for result in results], options.eval_goal) if len(results) > 1 else 0
    if winner is None:
        raise HubError(
            "sweep: no average has an evaluation, so that none is the best. Nothing was uploaded.",
            hint=f"Choose by yourself: ckavg push DIR {destination.repo}",
        )
    pushed = push_shown(results[winner].directory, destination, quiet=options.quiet)
    if not options.quiet:
        say(printable(f"uploaded {results[winner].outputs[-1].name} to {pushed.url}"))


def _evaluate_all(results: list[Record], plans: Sequence[Plan], command: str, *, quiet: bool) -> bool:
    """Have the user's command tell of each result; one that fails costs nothing else. False after an interrupt."""
    try:
        for place, result in enumerate(results):
            if not quiet:
                say(f"evaluating {printable(result.outputs[-1].name)}, {place + 1} of {len(results)}")
            evaluation = evaluate(result.directory, command)
            if evaluation.value is None:
                warn("warning", f"{result.outputs[-1].name} has no evaluation: {evaluation.problem}.")
            try:
                results[place] = record_evaluation(result, evaluation, plans[place])
            except WriteError as error:
                warn("warning", error.message)
    except KeyboardInterrupt:
        warn("interrupted", "The evaluation ends here. All averages are complete.")
        return False
    return True
