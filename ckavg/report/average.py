"""Stage *report*: what the averaging verbs show."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ckavg.averaging.plan import Plan, fetching_of, memory_bytes
from ckavg.output.loading import load_command
from ckavg.output.record import Averaged
from ckavg.report.console import plain_table, print_json, quoted, stdout_console
from ckavg.report.fetching import fetching_lines, fetching_to_dict
from ckavg.report.text import MOST_ROWS, as_bytes, as_count, bar, shortened_rows
from ckavg.storage.remote import Fetching

_BAR_WIDTH = 32


def print_summary(result: Averaged, plan: Plan) -> None:
    """Print what was averaged, the weight of each checkpoint as a bar, where the result is, and what to type next."""
    console = stdout_console()
    console.print(quoted(_title(plan)), style="bold")
    console.print(quoted(_run_line(result, plan)))
    console.print()
    console.print(_weights_table(result))
    console.print()
    read, seconds = as_bytes(result.bytes_read), result.seconds
    rate = result.bytes_read / max(seconds.path + seconds.replay, 1e-9) / 1e9
    console.print(f"read     {read} in {seconds.total:.1f} s ({rate:.1f} GB/s), wrote {as_bytes(plan.write_bytes)}")
    if len(result.outputs) > 1:
        steps = ", ".join(str(output.step) for output in result.outputs[:-1])
        console.print(quoted(f"also     checkpoint-STEP in it, the average as of step {steps}"), soft_wrap=True)
    console.print(quoted(f"result   {result.directory}"), soft_wrap=True)
    console.print(quoted(f"next     {_next_command(result, plan)}"), soft_wrap=True)


def plan_to_dict(plan: Plan, fetching: Fetching | None) -> dict[str, Any]:
    """A plan as plain JSON values, with what is fetched for it and those it is carried out with."""
    return {
        "dry_run": True,
        "scheme": plan.scheme.name,
        "parameters": plan.scheme.parameters(),
        "steps": list(plan.run.steps),
        "bytes_to_read": plan.path_bytes + plan.replay_bytes,
        "bytes_to_write": plan.write_bytes,
        "memory_bytes": memory_bytes([plan]),
        "fetch": fetching_to_dict(fetching),
        "warnings": list(plan.warnings + plan.foreseen),
        "outputs": [
            {
                "name": out.name,
                "step": plan.run.steps[index],
                "directory": str(out),
                "files": list(plan.files),
            }
            for index, out in plan.outputs.items()
        ],
    }


def print_plan(plan: Plan, *, as_json: bool) -> None:
    """Print what would be read and written."""
    fetching = fetching_of([plan])
    if as_json:
        print_json(plan_to_dict(plan, fetching))
        return
    console = stdout_console()
    steps = plan.run.steps
    console.print(
        quoted(f"{plan.scheme.title}: {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}"), style="bold"
    )
    passes = [("pass 1, the path", plan.path_bytes), ("pass 2, the average", plan.replay_bytes)]
    for title, count in passes:
        if count:
            console.print(f"would read   {as_bytes(count)} in {title}")
        elif plan.path and title == passes[0][0]:
            console.print("would read   nothing in pass 1: the path is known from before")
    for line in fetching_lines(fetching):
        console.print(quoted(f"would {line}"), soft_wrap=True)
    console.print(quoted(f"would write  {as_bytes(plan.write_bytes)} to {plan.out}"), soft_wrap=True)
    for name in (*plan.files, *(f"{out.name}/" for out in list(plan.outputs.values())[:-1])):
        console.print(quoted(f"             {name}"), soft_wrap=True)
    console.print(f"would need   about {as_bytes(memory_bytes([plan]))} of memory")
    console.print("Nothing was read or written.")


def _title(plan: Plan) -> str:
    stated = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in plan.scheme.stated.items())
    return f"{plan.scheme.title}: {stated}" if stated else plan.scheme.title


def _run_line(result: Averaged, plan: Plan) -> str:
    steps = result.steps
    floating = sum(entry.numel for entry in plan.run.tensors.values() if entry.is_floating)
    line = f"{len(steps)} checkpoints of {as_count(floating)} parameters, steps {steps[0]} to {steps[-1]}"
    return line if result.path_length is None else f"{line}, {path_told(result)}"


def path_told(result: Averaged) -> str:
    """The path length of a result that has one, and how it is known where it was not measured in full."""
    lengths, errors = result.path_length or (0.0,), result.path_length_error
    told = f"path length ℓ(T) = {lengths[-1]:.4f}"
    if errors is not None:
        return f"{told} ± {errors[-1]:.4f}, from a sample of {100 * result.sample:g} %"
    return f"{told}, known from before" if result.seconds.path == 0 else told


def _weights_table(result: Averaged) -> Table:
    columns = result.columns()
    largest = max(abs(weight) for weight in result.weights)
    columns[" "] = [bar(weight, largest, _BAR_WIDTH) for weight in result.weights]
    table = plain_table(*columns, left=(" ",))
    head, middle, tail = shortened_rows(list(zip(*columns.values(), strict=True)), MOST_ROWS)
    hidden = result.weights[middle]
    elided = {"step": "…", "weight": f"{sum(hidden):.4f}", " ": f"{len(hidden)} more"}
    between = [tuple(elided.get(name, "") for name in columns)] if hidden else []
    for row in (*head, *between, *tail):
        table.add_row(*row)
    return table


def _next_command(result: Averaged, plan: Plan) -> str:
    largest = sorted(plan.weights.shards, key=lambda shard: -sum(each.nbytes for each in plan.weights.of(shard.part)))
    return load_command(result.directory, plan.side_files, [shard.name for shard in largest])
