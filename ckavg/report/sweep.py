"""Stage *report*: what `sweep` shows."""

from __future__ import annotations

from collections.abc import Sequence

from ckavg.average import Plan
from ckavg.report.average import plan_to_dict
from ckavg.report.console import plain_table, print_json, quoted, stdout_console
from ckavg.report.text import as_bytes, sparkline
from ckavg.result.record import Averaged

_MOST_CHECKPOINTS = 60


def print_results(results: Sequence[Averaged], *, as_json: bool, quiet: bool) -> None:
    """Print the averages side by side: the weights of the checkpoints, first to last, and where each result is."""
    if as_json:
        print_json({"averages": [result.to_dict() for result in results]})
    if as_json or quiet:
        return
    console = stdout_console()
    first = results[0]
    steps = f"steps {first.steps[0]} to {first.steps[-1]}"
    console.print(quoted(f"{len(results)} averages of {len(first.steps)} checkpoints, {steps}"), style="bold")
    measured = next((result.path_length for result in results if result.path_length), None)
    if measured is not None:
        console.print(f"path length ℓ(T) = {measured[-1]:.4f}")
    console.print()
    table = plain_table(
        "average", "weights, first to last", "first", "last", "least", left=("average", "weights, first to last")
    )
    for result in results:
        weights = result.weights
        line = sparkline(weights) if len(weights) <= _MOST_CHECKPOINTS else ""
        numbers = (f"{weight:.4f}" for weight in (weights[0], weights[-1], min(weights)))
        table.add_row(quoted(result.outputs[-1].name), line, *numbers)
    console.print(table)
    console.print()
    console.print(f"read     {as_bytes(first.bytes_read)} in {first.seconds.total:.1f} s")
    console.print(quoted(f"results  {first.directory.parent}"), soft_wrap=True)


def print_plans(plans: Sequence[Plan], *, as_json: bool) -> None:
    """Print what would be read and written."""
    if as_json:
        print_json({"dry_run": True, "averages": [plan_to_dict(plan) for plan in plans]})
        return
    console = stdout_console()
    read = max(plan.path_bytes for plan in plans) + max(plan.replay_bytes for plan in plans)
    console.print(f"{len(plans)} averages from one reading", style="bold")
    console.print(f"would read   {as_bytes(read)}")
    for plan in plans:
        console.print(quoted(f"would write  {as_bytes(plan.write_bytes)} to {plan.out}"), soft_wrap=True)
    console.print("Nothing was read or written.")
