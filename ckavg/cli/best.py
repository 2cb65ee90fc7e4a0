"""`ckavg best`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import typer
from rich.filesize import decimal

from ckavg.averaging.best import NAME, SCRATCH, Best, Search
from ckavg.averaging.evaluation import DIRECTORY, Criterion
from ckavg.averaging.evaluation_cache import EvaluationCache
from ckavg.averaging.pipeline import Done
from ckavg.averaging.plan import Plan, checked
from ckavg.averaging.reading import readings
from ckavg.averaging.sources import inspect_sources
from ckavg.checkpoints.run import Run
from ckavg.cli.average import carry_out_shown, library_options
from ckavg.cli.errors import distributed, interrupted_with
from ckavg.cli.evaluation import Job, add_said, criterion_from, directory_here, judge, shown_value, unsent
from ckavg.cli.options import Averaging, with_options
from ckavg.cli.progress import show_progress, show_status
from ckavg.cli.push import destination_of, push_shown
from ckavg.cli.summary import print_next
from ckavg.cli.tables import Table
from ckavg.cli.text import Output, print_json, print_places, say, warn, warn_of
from ckavg.engine.distributed import Ranks
from ckavg.errors import EvaluationError, SettingError, listed, printable
from ckavg.hub import Destination, check_access, continued
from ckavg.output.output_path import path_within
from ckavg.output.record import Evaluation, Record


@dataclass(frozen=True, slots=True)
class Searching(Averaging):
    """The options of `best`."""

    budget: Annotated[
        int,
        typer.Option(help="How many evaluations the search may take, the last checkpoint's among them.", metavar="N"),
    ] = 12
    strategy: Annotated[
        Literal["halving", "soup"],
        typer.Option(help="Search schemes, values and windows, or add checkpoints to a greedy soup."),
    ] = "halving"
    confirm: Annotated[
        str | None,
        typer.Option(help="Evaluate the winner and the last checkpoint once more, on other data.", metavar="COMMAND"),
    ] = None


@with_options(
    Searching,
    without=(
        *("snapshot_every", "allow_anchor", "eval_run", "csv", "plot", "report"),
        *("part", "wait", "distributed", "rank_timeout"),
    ),
)
def best(options: Searching) -> None:
    """Search for the average that your own command finds best, and compare it with the last checkpoint.

    Tries schemes, values and windows in rounds, each from one reading, within --budget evaluations. One result stays,
    in averaged/best; if no average is better, it is the last checkpoint itself.
    """
    with distributed(verbose=options.verbose, timeout=options.rank_timeout) as ranks:
        if ranks.world > 1:
            raise SettingError("best: the search runs in one process.", hint="Start it without torchrun.")
        _search(options, ranks)


def _search(options: Searching, ranks: Ranks) -> None:
    criterion, destination = criterion_from(options), destination_of(options)
    if criterion is None:
        raise SettingError("best: nothing tells which average is best.", hint="Add --eval 'COMMAND {dir}'.")
    with show_status(f"looking for checkpoints in {options.source}", quiet=options.quiet):
        search = _search_of(options, criterion)
    first = search.plan_result()
    warn_of(first.warnings)
    for left in sorted(first.out.absolute().parent.glob(f"{SCRATCH}*")):
        warn("warning", f"{left} is of a search that was killed, or still runs. Remove it if none does.")
    confirm = None if options.confirm is None else _confirming(criterion, options.confirm)
    if options.dry_run:
        _show_plan(search, first, options)
        return
    if destination is not None:
        check_access(destination, first.files)
    judging = _Judging(criterion, search.run, options)
    try:
        found = search.carry_out(
            lambda plans: _formed(plans, options, ranks),
            judging,
            None if confirm is None else _Judging(confirm, search.run, options),
        )
    except KeyboardInterrupt as error:
        error.add_note("What was evaluated is remembered: the same command goes on from there.")
        raise
    except EvaluationError as error:
        add_said(error, judging.said)
        raise
    warn_of(warning for warning in found.record.warnings if warning not in first.warnings)
    if found.target is not None:
        with interrupted_with(unsent([first])), show_progress(1, quiet=options.quiet) as on_progress:
            record = found.target.send(found.record, on_progress)
        found = dataclasses.replace(found, record=record)
    if options.as_json:
        print_json(found.record.to_dict() | {"search": found.to_dict()})
    elif options.quiet:
        print_places([found.record.directory])
    else:
        print_search(found, criterion, first)
    if destination is not None:
        _push(found, first, destination, quiet=options.quiet)
    if found.target is not None:
        found.target.discard()


def _search_of(options: Searching, criterion: Criterion) -> Search:
    found = inspect_sources(options.source, [options.selection()], max_disk=options.max_disk)
    place = options.out if options.out is not None else path_within(found[0].home, "averaged", NAME)
    return Search(
        run=checked(found, [place], force=options.force)[0],
        goal=criterion.goal,
        budget=options.budget,
        strategy=options.strategy,
        out=place,
        options=library_options(options),
    )


def _confirming(criterion: Criterion, command: str) -> Criterion:
    if DIRECTORY not in command:
        raise SettingError(
            f"--confirm is {command!r}; it must say with {DIRECTORY} where the directory of a result goes."
        )
    return dataclasses.replace(criterion, command=command)


def _formed(plans: Sequence[Plan], options: Searching, ranks: Ranks) -> Done:
    if not options.quiet:
        names = listed([printable(plan.out.name) for plan in plans], 12)
        say(f"forming {names}")
    return carry_out_shown(plans, options, ranks)


class _Judging:
    """Evaluates results by the user's command, and remembers; `said` is what the first that failed printed."""

    def __init__(self, criterion: Criterion, run: Run, options: Searching) -> None:
        self._quiet = options.quiet
        self._cache = EvaluationCache.load(run, criterion, anew=options.eval_again)
        warn_of(self._cache.warnings)
        self._count = 0
        self.said: tuple[str, ...] = ()

    def __call__(self, record: Record, plan: Plan) -> Evaluation:
        self._count += 1
        key = self._cache.key_of_result(record.output, tuple(shard.name for shard in plan.weights.shards))
        job = Job(record.output.name, record.directory, key, 0, record.output.step)
        outcome = judge(job, self._cache, "" if self._quiet else f", {self._count}")
        if outcome.evaluation.problem:
            warn("warning", f"{record.output.name}: {outcome.evaluation.problem}.")
            self.said = self.said or outcome.said
        return outcome.evaluation


def _push(found: Best, plan: Plan, destination: Destination, *, quiet: bool) -> None:
    """Upload a winner that beats the last checkpoint; of any other, say how."""
    directory = directory_here(plan, found.record, quiet=quiet)
    if not found.beats_last:
        told = "Nothing is uploaded: the result is not shown to beat the last checkpoint."
        warn("warning", f"{told} {continued(directory, destination)}")
        return
    done = push_shown(directory, destination, quiet=quiet)
    if not quiet:
        say(printable(f"uploaded {directory.name} to {done.url}"))


# --- what is shown ---


def _show_plan(search: Search, first: Plan, options: Searching) -> None:
    plans = [*search.plan_round({}, first.out.parent / SCRATCH).values()]
    nbytes = sum(reading.path_bytes + reading.replay_bytes for reading in readings(plans))
    written = sum(plan.write_bytes for plan in plans)
    names = [plan.out.name for plan in plans]
    if options.as_json:
        print_json(
            {
                "dry_run": True,
                "first_round": names,
                "first_round_bytes_to_read": nbytes,
                "disk_bytes": written,
                "bytes_to_write": first.write_bytes,
                "directory": str(first.shown()),
                "files": list(first.files),
            }
        )
        return
    out = Output()
    out.line(f"Search of {len(search.run.steps)} checkpoints, at most {options.budget} evaluations", style="bold")
    out.line(f"would try    first {listed(names, 12)}")
    out.line(f"would read   {decimal(nbytes)} for them, then as much or less in each round of a few")
    out.line(f"would take   {decimal(written)} beside {first.out} while the first round is evaluated, later less")
    out.line(f"would write  {decimal(first.write_bytes)} to {first.shown()}")
    out.line("Nothing was read or written.")


def print_search(found: Best, criterion: Criterion, plan: Plan) -> None:
    """Print all contestants in the order in which they were tried, which won and why, and what to do next."""
    out, metric = Output(), printable(criterion.metric or "eval")
    out.line(f"{found.evaluated} evaluations in {found.contestants[-1].round} rounds", style="bold")
    out.line()
    table = Table("round", "average", "n", "anchor", metric, " ", left=("average", " "), spare=("anchor", "round"))
    for place, each in enumerate(found.contestants):
        mark = "best" if place == found.winner else f"as {each.same_as}" if each.same_as else ""
        table.add_row(
            str(each.round),
            each.name,
            f"{each.record.effective_count or 1:.1f}",
            f"{each.record.anchor_weight or 0:.4f}",
            shown_value(each.evaluation),
            mark,
            style="good" if place == found.winner else "",
        )
    out.table(table)
    out.line()
    out.line(found.reason, wrap=True)
    best, last = (found.contestants[place].evaluation for place in (found.winner, 0))
    is_chosen = f"the best of {found.evaluated} by this very number: no estimate of quality, but optimistic"
    out.fact("eval", f"{metric} {shown_value(best)}, {is_chosen}")
    if found.confirmed is not None:
        best, last = found.confirmed
        out.fact("confirm", f"{shown_value(best)}, the last checkpoint {shown_value(last)}")
    elif found.standing != "last":
        out.fact("", "On other data: the same with --confirm 'COMMAND {dir}'", style="command")
    out.fact("result", found.record.directory, style="path")
    print_next(out, found.record, plan)
