"""Stage *report*: what `sweep` shows."""

from __future__ import annotations

from collections.abc import Sequence

from ckavg.averaging.evaluation import best
from ckavg.averaging.plan import Plan, fetching_of, memory_bytes
from ckavg.output.record import Evaluation, Record
from ckavg.report.average import path_told, plan_to_dict
from ckavg.report.console import plain_table, print_json, quoted, stdout_console
from ckavg.report.fetching import fetching_lines
from ckavg.report.text import as_bytes, sparkline

_MOST_CHECKPOINTS = 60


def print_results(results: Sequence[Record], *, goal: str, as_json: bool, quiet: bool) -> None:
    """Print the averages side by side: the weights of the checkpoints, first to last, and where each result is.

    Args:
        results: the averages.
        goal: `min` or `max`: which evaluation is the best.
        as_json: one JSON object instead of a table.
        quiet: nothing at all, unless as JSON.
    """
    evaluations = [result.evaluation for result in results]
    winner = best(evaluations, goal)
    if as_json:
        told = {} if winner is None else {"best": results[winner].outputs[-1].name}
        print_json({"averages": [result.to_dict() for result in results], **told})
    if as_json or quiet:
        return
    console = stdout_console()
    first = results[0]
    steps = f"steps {first.steps[0]} to {first.steps[-1]}"
    console.print(quoted(f"{len(results)} averages of {len(first.steps)} checkpoints, {steps}"), style="bold")
    measured = next((result for result in results if result.path_length), None)
    if measured is not None:
        console.print(path_told(measured))
    console.print()
    evaluated = any(evaluation is not None for evaluation in evaluations)
    columns = ("average", "weights, first to last", "first", "last", "least", *(("eval", " ") if evaluated else ()))
    table = plain_table(*columns, left=("average", "weights, first to last", " "))
    for place, result in enumerate(results):
        weights = result.weights
        line = sparkline(weights) if len(weights) <= _MOST_CHECKPOINTS else ""
        cells = [f"{weight:.4f}" for weight in (weights[0], weights[-1], min(weights))]
        if evaluated:
            cells += [_value(result.evaluation), "best" if place == winner else ""]
        table.add_row(quoted(result.outputs[-1].name), line, *cells, style="bold" if place == winner else "")
    console.print(table)
    console.print()
    console.print(f"read     {as_bytes(first.bytes_read)} in {first.seconds.total:.1f} s")
    chosen = first.directory.parent if winner is None else results[winner].directory
    console.print(quoted(f"{'results' if winner is None else 'best   '}  {chosen}"), soft_wrap=True)


def _value(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    return "failed" if evaluation.value is None else f"{evaluation.value:.6g}"


def print_plans(plans: Sequence[Plan], *, as_json: bool) -> None:
    """Print what would be read and written."""
    fetching = fetching_of(plans)
    if as_json:
        print_json({"dry_run": True, "averages": [plan_to_dict(plan, fetching) for plan in plans]})
        return
    console = stdout_console()
    read = max(plan.path_bytes for plan in plans) + max(plan.replay_bytes for plan in plans)
    console.print(f"{len(plans)} averages from one reading", style="bold")
    console.print(f"would read   {as_bytes(read)}")
    for line in fetching_lines(fetching):
        console.print(quoted(f"would {line}"), soft_wrap=True)
    for plan in plans:
        console.print(quoted(f"would write  {as_bytes(plan.write_bytes)} to {plan.out}"), soft_wrap=True)
    console.print(f"would need   about {as_bytes(memory_bytes(plans))} of memory")
    console.print("Nothing was read or written.")
