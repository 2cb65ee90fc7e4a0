"""What is printed about averages: the plan, the reading, the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from ckavg.averaging.reading import fetching_of, memory_bytes, readings
from ckavg.cli.evaluation import shown_value
from ckavg.cli.tables import table_by_step
from ckavg.cli.text import Output, as_count, plural, print_json, say
from ckavg.errors import printable
from ckavg.output.card import products_shown
from ckavg.output.commands import as_options, shell_word
from ckavg.output.loading import load_command
from ckavg.schemes.parse import shown

if TYPE_CHECKING:
    from ckavg.averaging.plan import Plan
    from ckavg.checkpoints.run import Selection
    from ckavg.cli.options import Averaging
    from ckavg.output.record import Record
    from ckavg.storage.base import AnyPath
    from ckavg.storage.remote import Fetching


def to_form(plans: Sequence[Plan]) -> list[Plan]:
    """The plans whose result does not exist or is outdated."""
    return [plan for plan in plans if plan.current is None]


def as_result(record: Record, plan: Plan) -> dict[str, Any]:
    """A record as plain JSON values, marked if the existing result was up to date."""
    return record.to_dict() | ({"up_to_date": True} if plan.is_up_to_date else {})


def reading_shown(plans: Sequence[Plan]) -> str:
    """What is read to form averages, pass by pass; empty if nothing is."""
    path_bytes, replay_bytes = bytes_to_read(plans)
    if not path_bytes + replay_bytes:
        return ""
    visited = plural(len({step for plan in plans for step in plan.run.steps}), "checkpoint")
    passes = f"{decimal(path_bytes)} for the path, then {decimal(replay_bytes)} for the average"
    return f"reading {visited} in {plans[0].run.source}: {passes if path_bytes else decimal(replay_bytes)}"


def bytes_to_read(plans: Sequence[Plan]) -> tuple[int, int]:
    """Bytes that averages formed together read in pass 1 and in pass 2."""
    together = readings(plans)
    return sum(each.path_bytes for each in together), sum(each.replay_bytes for each in together)


def say_fetching(fetching: Fetching | None, *, quiet: bool) -> None:
    """Say what will be fetched, and how much of the disk it takes, before it begins."""
    if not quiet:
        for line in fetching_lines(fetching):
            say(printable(line))


def fetching_lines(fetching: Fetching | None) -> list[str]:
    """What is downloaded to disk and what is streamed, one line each, beginning with a verb."""
    if fetching is None:
        return []
    room = f"with room for {decimal(fetching.room)}"
    lines = {
        f"find   {decimal(fetching.kept_bytes)} in {fetching.directory}": fetching.kept_bytes,
        f"fetch  {decimal(fetching.whole_bytes)} to {fetching.directory}, {room}": fetching.whole_bytes,
        f"fetch  {decimal(fetching.streamed_bytes)} as it is read, none of it to the disk": fetching.streamed_bytes,
    }
    return [line for line, count in lines.items() if count]


def show_plans(plans: Sequence[Plan], options: Averaging, *, of_sweep: bool = False) -> None:
    """Show what would be read and written, as `--dry-run` asks for."""
    if not options.as_json:
        print_plans(plans)
        return
    new = to_form(plans)
    fetching = fetching_of(new)
    as_dicts = [plan_to_dict(plan, fetching) for plan in plans]
    if not of_sweep:
        print_json(as_dicts[0])
        return
    nbytes = sum(bytes_to_read(new))
    whole = {"dry_run": True, "bytes_to_read": nbytes, "memory_bytes": memory_bytes(new), "averages": as_dicts}
    print_json(whole)


def plan_to_dict(plan: Plan, fetching: Fetching | None) -> dict[str, Any]:
    """A plan as plain JSON values, with what is fetched for all plans."""
    is_new = plan.current is None
    return {
        "dry_run": True,
        **({"up_to_date": True} if plan.is_up_to_date else {}),
        "scheme": plan.scheme.name,
        "parameters": plan.scheme.parameters(),
        "steps": list(plan.run.steps),
        "bytes_to_read": plan.path_bytes + plan.replay_bytes if is_new else 0,
        "bytes_to_write": plan.write_bytes if is_new else 0,
        "memory_bytes": memory_bytes([plan]),
        "fetch": fetching
        and {
            "to_disk_bytes": fetching.whole_bytes,
            "on_disk_bytes": fetching.kept_bytes,
            "streamed_bytes": fetching.streamed_bytes,
            "directory": str(fetching.directory),
            "room_bytes": fetching.room,
        },
        "warnings": list(plan.warnings + plan.foreseen),
        "outputs": [
            {
                "name": out.name,
                "step": plan.run.steps[index],
                "directory": str(plan.shown(out)),
                "files": list(plan.files),
            }
            for index, out in plan.outputs.items()
        ],
    }


def print_plans(plans: Sequence[Plan]) -> None:
    """Print what would be read and written."""
    out = Output()
    for each in plans:
        if each.is_up_to_date:
            out.line(f"{each.shown()} is up to date", style="good")
        elif each.current is not None:
            out.line(f"would send   {decimal(each.write_bytes)} to {each.shown()}, finished in {each.out}")
    plans = to_form(plans)
    if not plans:
        out.line("Nothing was read or written.")
        return
    plan = plans[0]
    visited = sorted({step for each in plans for step in each.run.steps})
    steps = f"{len(visited)} checkpoints, steps {visited[0]} to {visited[-1]}"
    title = plan.scheme.title if len(plans) == 1 else f"{len(plans)} averages from one reading"
    out.line(f"{title}: {steps}", style="bold")
    path_bytes, replay_bytes = bytes_to_read(plans)
    if any(each.path for each in plans):
        cached = "nothing in pass 1: the path is cached"
        out.line(f"would read   {f'{decimal(path_bytes)} in pass 1, the path' if path_bytes else cached}")
    if replay_bytes:
        out.line(f"would read   {decimal(replay_bytes)} in pass 2, the average")
    for line in fetching_lines(fetching_of(plans)):
        out.line(f"would {line}")
    for each in plans:
        out.line(f"would write  {decimal(each.write_bytes)} to {each.shown()}")
    if len(plans) == 1:
        for name in (*plan.files, *(f"{place.name}/" for place in list(plan.outputs.values())[:-1])):
            out.line(f"             {name}")
    out.line(f"would need   about {decimal(memory_bytes(plans))} of memory")
    out.line("Nothing was read or written.")


def next_command(source: AnyPath, selection: Selection) -> str:
    """The command that averages these checkpoints."""
    return f"ckavg pema {shell_word(str(source))} {as_options(selection.stated)}".rstrip()


def print_summary(result: Record, plan: Plan) -> None:
    """Print what was averaged, the weight of each checkpoint as a bar, where the result is, and what to type next."""
    out = Output()
    if plan.is_up_to_date:
        out.line(f"{plan.shown()} is up to date", style="good")
    stated = ", ".join(f"{shown(name)} {value}" for name, value in plan.scheme.stated.items())
    out.line(f"{plan.scheme.title}: {stated}" if stated else plan.scheme.title, style="bold")
    floating = as_count(sum(entry.numel for entry in plan.run.tensors.values() if entry.is_floating))
    path = "" if result.path_length is None else f", {path_shown(result)}"
    steps = f"steps {result.steps[0]} to {result.steps[-1]}"
    out.line(f"{len(result.steps)} checkpoints of {floating} parameters, {steps}{path}", wrap=True)
    out.line()
    out.table(table_by_step(result.columns(), result.weights, sums="weight", most=out.rows))
    out.line()
    out.fact("spread", spread_shown(result))
    if plan.current is None:
        rate = result.bytes_read / max(result.seconds.path + result.seconds.replay, 1e-9)
        took = f"in {result.seconds.total:.1f} s ({decimal(int(rate))}/s)"
        out.fact("read", f"{decimal(result.bytes_read)} {took}, wrote {decimal(plan.write_bytes)}")
    if len(result.outputs) > 1:
        snapshots = ", ".join(str(output.step) for output in result.outputs[:-1])
        out.fact("also", f"checkpoint-STEP in it, the average as of step {snapshots}")
    if result.lora == "product":
        out.fact("adapters", products_shown(result))
    if result.evaluation is not None:
        out.fact("eval", f"{result.evaluation.metric} {shown_value(result.evaluation)}".strip())
    out.fact("result", result.directory, style="path")
    print_next(out, result, plan)


def print_next(out: Output, result: Record, plan: Plan) -> None:
    """Print the command that loads a result; of one that is at an address, there is none."""
    if plan.target is not None:
        return
    out.fact("next", load_command(result.directory, plan.side_files, plan.weights.names), style="command")


def spread_shown(result: Record) -> str:
    """The effective number, age and anchor weight of a result, in words."""
    count, age, weight = result.effective_count or 1.0, result.mean_age or 0.0, result.anchor_weight or 0.0
    parts = [
        f"like {count:.1f} equal checkpoints",
        f"{plural(abs(round(age)), 'step')} {'ahead of' if age < 0 else 'behind'} the last",
    ]
    if result.anchor_step < result.steps[-1]:
        of_init = result.anchor_is_init and result.anchor_step == result.steps[0]
        parts.append(f"{100 * weight:.0f} % of {'the base model' if of_init else f'step {result.anchor_step}'}")
    return "; ".join(parts)


def path_shown(result: Record) -> str:
    """The path length of a result, and how it was obtained if not measured in full."""
    lengths, errors = result.path_length or (0.0,), result.path_length_error
    length = f"path length ℓ(T) = {lengths[-1]:.4f}"
    if errors is not None:
        return f"{length} ± {errors[-1]:.4f}, from a sample of {100 * result.sample:g} %"
    return f"{length}, cached" if result.path_kernel is None else length
