"""What `--eval` does for the averaging verbs: run, remember, compare, and show a user's own command."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ckavg.averaging.evaluation import (
    Criterion,
    Outcome,
    Ranking,
    compare_with_last,
    criterion_of,
    evaluate,
    failed,
    rank,
    record_evaluation,
)
from ckavg.averaging.evaluation_cache import EvaluationCache
from ckavg.averaging.plan import Plan
from ckavg.averaging.publish import send_results
from ckavg.cli.errors import INTERRUPTED
from ckavg.cli.options import Averaging
from ckavg.cli.progress import show_progress
from ckavg.cli.tables import Table
from ckavg.cli.text import MOST_ROWS, Output, say, warn, warn_of
from ckavg.engine.context import Context
from ckavg.errors import EvaluationError, SettingError, WriteError, listed, printable
from ckavg.output.record import Curves, Evaluation, Record
from ckavg.output.record import Output as Written
from ckavg.storage.atomic import write_bytes
from ckavg.storage.base import RemotePath

RUN = "run"
"""The series of the run's own checkpoints in a curve."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What came of evaluating the results of a command.

    Attributes:
        records: of the results, with their evaluations.
        criterion: what decided; None where nothing was evaluated.
        ranking: which of them is best; None where no evaluation has a value.
        curves: with `--eval-run`, of the run's checkpoints and of each average.
        failure: the first evaluation that failed.
        interrupted: whether the user ended it.
    """

    records: tuple[Record, ...]
    criterion: Criterion | None = None
    ranking: Ranking | None = None
    curves: Curves = ()
    failure: Outcome | None = None
    interrupted: bool = False

    @property
    def has_failed(self) -> bool:
        """Whether nothing tells how good the results are, though that was asked."""
        return self.interrupted or (self.criterion is not None and self.ranking is None)

    def check(self) -> None:
        """End the command where the user has ended the evaluation, or none has succeeded.

        Raises:
            EvaluationError: none has; with the first problem, and what the command said last.
        """
        if self.interrupted:
            raise typer.Exit(INTERRUPTED)
        if self.has_failed and self.failure is not None:
            error = EvaluationError(
                f"No evaluation succeeded. The first problem: {self.failure.evaluation.problem}.",
                hint="All averages are complete; nothing was uploaded. Correct --eval, and run the command again.",
            )
            add_said(error, self.failure.said)
            raise error

    def to_dict(self) -> dict[str, Any]:
        """The curves as plain JSON values, by the names of their keys; empty where there are none."""
        if not self.curves:
            return {}
        points = (
            {"series": name, "step": step, "value": each.value, "stderr": each.stderr, "problem": each.problem}
            for name, curve in self.curves
            for step, each in curve
        )
        return {"curves": list(points)}


def add_said(error: EvaluationError, said: Sequence[str]) -> None:
    """Add the last lines of what a command said to an error."""
    for line in ("The last lines of what the command said:", *said) if said else ():
        error.add_note(line)


def criterion_from(options: Averaging) -> Criterion | None:
    """What decides between results, by the options of an averaging verb; None without `--eval`. Warns of a strange one.

    Raises:
        SettingError: it is not complete, or there is none and yet an option that goes with it.
    """
    if options.eval_command is None:
        names = ("eval_metric", "eval_goal", "eval_stderr", "eval_again", "eval_run", "csv")
        given = next((name for name in names if getattr(options, name)), None)
        if given is not None:
            option = f"--{given.replace('_', '-')}"
            raise SettingError(f"{option} needs --eval.", hint="Add --eval 'COMMAND {dir}', or leave it out.")
        return None
    criterion = criterion_of(options.eval_command, options.eval_metric, options.eval_goal, options.eval_stderr)
    warn_of(criterion.warnings)
    return criterion


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to evaluate.

    Attributes:
        name: what it is called in messages.
        directory: where it is; None where that is no directory of this machine.
        key: in the cache.
        series: index of the average that it is of; -1 for the run.
        step: its optimizer step.
        is_result: whether the evaluation goes into the record of the average.
    """

    name: str
    directory: Path | None
    key: str | None
    series: int
    step: int
    is_result: bool = False


def evaluate_all(
    records: Sequence[Record], plans: Sequence[Plan], criterion: Criterion | None, options: Averaging
) -> Evaluated:
    """Have the user's command judge each result, and what `--eval-run` names; one that fails costs nothing else."""
    if criterion is None:
        return Evaluated(tuple(records))
    results = list(records)
    cache = EvaluationCache.load(plans[0].run, criterion, anew=options.eval_again)
    warn_of(cache.warnings)
    jobs = list(_jobs(results, plans, cache, with_run=options.eval_run))
    curves: dict[int, dict[int, Evaluation]] = {series: {} for series in range(-1, len(results))}
    failure, interrupted = None, False
    try:
        for number, job in enumerate(jobs, start=1):
            if job.series >= 0 and cache.get(job.key) is None:
                directory_here(plans[job.series], results[job.series], quiet=options.quiet)
            outcome = judge(job, cache, "" if options.quiet else f", {number} of {len(jobs)}")
            if outcome.evaluation.problem:
                what = "has no evaluation" if outcome.evaluation.value is None else "is evaluated, but"
                warn("warning", f"{job.name} {what}: {outcome.evaluation.problem}.")
                failure = failure or outcome
            curves[job.series][job.step] = outcome.evaluation
            if job.is_result:
                results[job.series] = _recorded(results[job.series], outcome.evaluation, plans[job.series])
    except KeyboardInterrupt:
        warn("interrupted", "The evaluation ends here. All averages are complete.")
        interrupted = True
    for place, evaluation in compare_with_last(results, curves[-1]):
        results[place] = _recorded(results[place], evaluation, plans[place])
    names = [RUN, *(record.output.name for record in results)]
    lines = [(name, tuple(sorted(curve.items()))) for name, curve in zip(names, curves.values(), strict=True) if curve]
    return Evaluated(
        tuple(results),
        criterion,
        rank([record.evaluation for record in results], criterion.goal),
        tuple(lines) if options.eval_run or options.csv else (),
        failure,
        interrupted,
    )


def _jobs(results: Sequence[Record], plans: Sequence[Plan], cache: EvaluationCache, *, with_run: bool) -> Iterator[Job]:
    """The results first, since they decide; then the checkpoints of the run, and the snapshots."""

    def output_job(series: int, output: Written, name: str) -> Job:
        key = cache.key_of_result(output, tuple(shard.name for shard in plans[series].weights.shards))
        plan, place = plans[series], output.directory.relative_to(results[series].directory)
        return Job(name, plan.out / place, key, series, output.step)

    for series, record in enumerate(results):
        yield dataclasses.replace(output_job(series, record.output, record.output.name), is_result=True)
    if not with_run:
        return
    visited = {(point.step, point.path): point for plan in plans for point in plan.run.checkpoints}
    for point in sorted(visited.values(), key=lambda point: point.step):
        directory = None if isinstance(point.path, RemotePath) or point.kind == "file" else Path(point.path)
        yield Job(f"step {point.step} of the run", directory, cache.key_of_checkpoint(point), -1, point.step)
    for series, record in enumerate(results):
        for output in record.outputs[:-1]:
            yield output_job(series, output, f"{record.output.name}/{output.name}")


def judge(job: Job, cache: EvaluationCache, number: str) -> Outcome:
    """Evaluate one thing, or remember it; `number` is said after its name, and nothing at all without."""
    known = cache.get(job.key)
    if number:
        say(f"{'evaluated before:' if known else 'evaluating'} {printable(job.name)}{number}")
    if known is not None:
        return Outcome(known)
    if job.directory is None:
        return failed(cache.criterion, "it is no directory of this machine, and does not load as it stands")
    outcome = evaluate(job.directory, cache.criterion)
    cache.add(job.key, outcome.evaluation)
    return outcome


def directory_here(plan: Plan, record: Record, *, quiet: bool) -> Path:
    """Where a result is on this machine; one that is at an address alone is fetched."""
    if plan.is_there and plan.target is not None:
        with show_progress(1, quiet=quiet) as on_progress:
            plan.target.fetch(record, on_progress)
    return plan.out


def send_shown(evaluated: Evaluated, plans: Sequence[Plan], *, quiet: bool) -> Evaluated:
    """Send the results that go to an address, and show how far that has come."""
    if all(plan.target is None for plan in plans):
        return evaluated
    if evaluated.interrupted:
        warn("interrupted", unsent(plans))
        raise typer.Exit(INTERRUPTED)
    with show_progress(1, quiet=quiet) as on_progress:
        records = send_results(plans, evaluated.records, Context(on_progress=on_progress))
    return dataclasses.replace(evaluated, records=records)


def unsent(plans: Sequence[Plan]) -> str:
    """What an interrupt says before results have been sent."""
    where = listed([str(plan.target.address) for plan in plans if plan.target is not None])
    return f"What is not in {where} yet is finished, and kept for a week: the same command sends it."


def _recorded(result: Record, evaluation: Evaluation, plan: Plan) -> Record:
    try:
        return record_evaluation(result, evaluation, plan)
    except WriteError as error:
        warn("warning", error.message)
        return result


# --- what is shown ---


def shown_value(evaluation: Evaluation | None) -> str:
    """The value with its standard error, for a table; empty where nothing was evaluated."""
    if evaluation is None:
        return ""
    if evaluation.value is None:
        return "failed"
    error = "" if evaluation.stderr is None else f" ± {evaluation.stderr:.2g}"
    return f"{evaluation.value:.6g}{error}"


def marks(ranking: Ranking | None, count: int) -> list[str]:
    """What a table says of each of so many results: which is best, and which are level with it."""
    said = [""] * count
    if ranking is not None:
        for index in (ranking.best, *ranking.equal):
            said[index] = "best, equal" if ranking.equal else "best"
        for index in ranking.level:
            said[index] = "level with the best"
    return said


def ranking_to_dict(evaluated: Evaluated) -> dict[str, Any]:
    """The names of the best result, of those equal to it and of those level with it, as far as there are any."""
    if (ranking := evaluated.ranking) is None:
        return {}
    names = [record.output.name for record in evaluated.records]
    others = {"equal": ranking.equal, "level": ranking.level}
    return {"best": names[ranking.best]} | {
        key: [names[index] for index in indices] for key, indices in others.items() if indices
    }


def print_curves(evaluated: Evaluated) -> None:
    """Print the metric by step, a column for each series that has several steps."""
    lines = [(name, dict(curve)) for name, curve in evaluated.curves if len(curve) > 1]
    if not lines or evaluated.criterion is None:
        return
    out = Output()
    out.line()
    out.line(f"{evaluated.criterion.metric or 'evaluation'} by step", style="bold")
    names = [name for name, _ in lines]
    table = Table("step", *names, spare=(*names[:0:-1],))
    steps = sorted({step for _, curve in lines for step in curve})
    hidden = slice(MOST_ROWS // 4, len(steps) - MOST_ROWS + MOST_ROWS // 4)
    shown = steps if len(steps) <= MOST_ROWS else [*steps[: hidden.start], None, *steps[hidden.stop :]]
    for step in shown:
        if step is None:
            table.add_row("…", f"{len(steps[hidden])} more", *[""] * (len(lines) - 1))
        else:
            table.add_row(str(step), *(shown_value(curve.get(step)) for _, curve in lines))
    out.table(table)


def write_curves(evaluated: Evaluated, file: Path | None) -> None:
    """Write the curves as CSV, if asked for: series, step, value and stderr; an evaluation that failed has no value.

    Raises:
        WriteError: the system would not let us.
    """
    if file is None:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("series", "step", "value", "stderr"))
    writer.writerows((name, step, each.value, each.stderr) for name, curve in evaluated.curves for step, each in curve)
    try:
        write_bytes(file, text.getvalue().encode())
    except OSError as error:
        raise WriteError(f"{file} cannot be written: {error.strerror}.", hint="Choose another --csv.") from error
