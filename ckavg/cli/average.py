"""The averaging verbs, made from the schemes, and what they share with `ckavg sweep`: plan, warn, average, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from ckavg.averaging.evaluation import Criterion
from ckavg.averaging.pipeline import Done, carry_out, discard_sent, do_part
from ckavg.averaging.plan import Options, Plan, checked, output_path, plan_averages
from ckavg.averaging.reading import fetching_of, memory_bytes, readings
from ckavg.averaging.sources import inspect_sources
from ckavg.checkpoints.run import Run, Selection
from ckavg.cli.errors import distributed, interrupted_with
from ckavg.cli.evaluation import (
    Evaluated,
    criterion_from,
    directory_here,
    evaluate_all,
    marks,
    print_curves,
    send_shown,
    shown_value,
    unsent,
    write_curves,
)
from ckavg.cli.options import Averaging, Command, Measuring, with_options
from ckavg.cli.parts import print_part, ranks_of_part
from ckavg.cli.push import destination_of, print_pushed, push_shown, when_complete
from ckavg.cli.text import Output, as_count, print_json, say, show_progress, table_by_step, warn_of
from ckavg.engine.context import Context
from ckavg.engine.distributed import Ranks
from ckavg.errors import SettingError, listed, printable
from ckavg.hub import Destination, check_access
from ckavg.output.card import products_shown
from ckavg.output.loading import load_command
from ckavg.output.output_path import check_file
from ckavg.output.record import MOST_BYTES, Record
from ckavg.output.staging import find_leftovers
from ckavg.schemes import SCHEMES, Scheme
from ckavg.schemes.parse import Parameter, described, make_scheme, parameters_of, shown
from ckavg.storage.address import output_address
from ckavg.storage.local import parse_json, read_small
from ckavg.storage.remote import Fetching

_WEIGHTS = 'Expected JSON: [0.1, 0.2, 0.7], or {"500": 0.3, "1000": 0.7} by step.'


def scheme_verb(name: str) -> Command:
    """The command of the schemes of a name: their hyper-parameters are options of its own."""
    own = parameters_of(name)
    fields: list[Any] = [
        (each.name, _option(each), dataclasses.field(default=None if each.repeatable else each.default)) for each in own
    ]
    options_class = dataclasses.make_dataclass(name, fields, bases=(Averaging,), frozen=True, slots=True)

    def verb(options: Averaging) -> None:
        with distributed(verbose=options.verbose, timeout=options.rank_timeout) as ranks:
            typed = {each.name: _typed(each, getattr(options, each.name)) for each in own}
            stated = {each.name: typed[each.name] for each in own if typed[each.name] not in (None, each.default)}
            _average(make_scheme(name, stated), options, ranks)

    needs_path = any(scheme.needs_path for scheme in SCHEMES if scheme.name == name)
    reading = "twice: first for the path length ℓ, then for the average" if needs_path else "once"
    verb.__name__, verb.__doc__ = name, f"{described(name)}\n\nReads every checkpoint {reading}."
    return with_options(options_class)(verb)


def _option(parameter: Parameter) -> Any:
    """The type of a hyper-parameter, with what the command line says of it."""
    name = f"--{shown(parameter.name)}"
    metavar = "N" if parameter.type is int else None
    if parameter.repeatable:
        more = typer.Option(
            name, help=f"{parameter.help} Repeatable.", metavar="[STEP:]X", show_default=str(parameter.default)
        )
        return Annotated[list[str] | None, more]
    if parameter.default is None:
        option = typer.Option(name, help=parameter.help, metavar=metavar, show_default="none")
        return Annotated[parameter.type | None, option]
    return Annotated[parameter.type, typer.Option(name, help=parameter.help, metavar=metavar)]


def _typed(parameter: Parameter, value: Any) -> Any:
    """What was typed for a hyper-parameter, as the scheme takes it: texts as one, and what a file holds."""
    if parameter.repeatable:
        return ",".join(value) if value else None
    if isinstance(value, str) and value.endswith(".json"):
        return _read_weights(Path(value))
    return value


def _read_weights(file: Path) -> Any:
    try:
        weights = parse_json(read_small(file, MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingError(f"--weights {file} cannot be read: {why}.", hint=_WEIGHTS) from error
    if isinstance(weights, list | dict) and weights:
        return weights
    raise SettingError(f"--weights {file} holds no list and no object.", hint=_WEIGHTS)


def _average(scheme: Scheme, options: Averaging, ranks: Ranks) -> None:
    if options.out is not None:
        output_address(options.out)  # what is misspelled is told at once
    ranks = ranks_of_part(options, ranks)
    criterion = criterion_from(options)
    destination, selection = destination_of(options), options.selection(scheme.every_from)
    asked = [Asked(scheme, selection)]
    plans = plans_of(
        asked,
        options,
        ranks,
        destination,
        lambda home: [output_path(home, scheme, selection, options.out, options.lora, options.rank)],
    )
    if options.dry_run:
        show_plans(plans, options)
        return
    if ranks.mode == "part":
        print_part(plans[0], do_part_shown(plans[0], options, ranks), options, ranks)
        return
    done = carry_out_shown(plans, options, ranks)
    if ranks.is_first:
        finish(done, plans, options, criterion, destination)


def finish(
    done: Done,
    plans: Sequence[Plan],
    options: Averaging,
    criterion: Criterion | None,
    destination: Destination | None,
) -> None:
    """What follows on an average that is complete: evaluate, show and upload it."""
    is_sent = plans[0].target is not None
    complete = unsent(plans) if is_sent else when_complete(done.records[0].directory, destination)
    with interrupted_with(complete):
        warn_of(new_warnings(done, plans))
        evaluated = send_shown(evaluate_all(done.records, plans, criterion, options), plans, quiet=options.quiet)
        (result,), (plan,) = evaluated.records, plans
        if not (options.as_json or options.quiet):
            print_summary(result, plan)
            print_curves(evaluated)
        write_plot(done, options, evaluated)
        write_curves(evaluated, options.csv)
        write_report(done, options, evaluated)
        pushed = None
        if destination is not None and not evaluated.has_failed:
            directory = directory_here(plan, result, quiet=options.quiet)
            pushed = push_shown(directory, destination, quiet=options.quiet)
        discard_sent(plans)
        if options.as_json:
            url = {} if pushed is None else {"url": pushed.url}
            print_json(as_result(result, plan) | evaluated.to_dict() | url)
        elif pushed is not None and not options.quiet:
            print_pushed(pushed)
        evaluated.check()


@dataclass(frozen=True, slots=True)
class Asked:
    """An average that a command line asks for, and with which of its words, where there are several."""

    scheme: Scheme
    selection: Selection
    word: str = ""


def plans_of(
    asked: Sequence[Asked],
    options: Averaging,
    ranks: Ranks,
    destination: Destination | None,
    paths_in: Callable[[Path], list[Path]],
) -> list[Plan]:
    """Plan averages by the options of their verb, and warn of what can be told before anything is read.

    Args:
        asked: the averages.
        options: of the verb.
        ranks: the processes of the job.
        destination: where a result is uploaded; whether that will be let in is found out, before hours of reading.
        paths_in: from the home of the run to the place of each result.
    """
    words: dict[Selection, list[str]] = {}
    for each in asked:
        words.setdefault(each.selection, []).append(each.word)
    found = inspect_sources(options.source, list(words), max_disk=options.max_disk)
    places = paths_in(found[0].home)
    runs = checked(found, places, words=[listed(some) for some in words.values()], force=options.force)
    for run in runs:
        check_files(options, run)
    by_selection = dict(zip(words, runs, strict=True))
    wanted = [(by_selection[each.selection], each.scheme, place) for each, place in zip(asked, places, strict=True)]
    plans = plan_averages(wanted, library_options(options))
    warn_of(attributed([(plan, plan.warnings) for plan in plans]))
    own = [plan.out for plan in plans]
    for directory in {place.parent: None for place in own}:
        warn_of(map(str, find_leftovers(directory, but=own)))
    if destination is not None and ranks.is_first:
        check_access(destination, plans[0].files)
    if options.dry_run:
        warn_of(attributed([(plan, plan.foreseen) for plan in plans]))
    return plans


def check_files(options: Averaging, run: Run) -> None:
    """Refuse files that were asked for beside the result and have no place where they are to go."""
    check_plot(options, run)
    if options.csv is not None:
        check_file(options.csv, run)
    check_report(options, run)


def library_options(options: Averaging) -> Options:
    """What the options of a verb ask for, as the library takes it."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    return Options(**given | {"path_exclude": tuple(options.path_exclude or ())})


def attributed(told: Sequence[tuple[Plan, Sequence[str]]]) -> list[str]:
    """Warnings of several averages, each once; where the averages are of several selections, and it is said of one
    selection alone, with what tells that: the name of the result or, of several results, the selection.
    """
    owners: dict[str, list[Plan]] = {}
    for plan, warnings in told:
        for warning in dict.fromkeys(warnings):
            owners.setdefault(warning, []).append(plan)
    shown = []
    for warning, plans in owners.items():
        ours, all_of_them = ({plan.run.selection for plan in some} for some in (plans, [plan for plan, _ in told]))
        if len(ours) == 1 < len(all_of_them):
            name = plans[0].out.name if len(plans) == 1 else plans[0].run.selection.label or "all checkpoints"
            shown.append(f"{name}: {warning}")
        else:
            shown.append(warning)
    return shown


def carry_out_shown(plans: Sequence[Plan], options: Averaging, ranks: Ranks) -> Done:
    """Carry out plans and show how far they have come."""
    with shown_progress(plans, options, ranks) as context:
        return carry_out(plans, context)


def do_part_shown(plan: Plan, options: Averaging, ranks: Ranks) -> tuple[int, ...]:
    """Do a part of a plan and show how far it has come; with the parts that are not finished."""
    if plan.current is not None:
        return ()
    with shown_progress([plan], options, ranks) as context:
        return do_part(plan, context)


@contextmanager
def shown_progress(plans: Sequence[Plan], options: Averaging, ranks: Ranks) -> Iterator[Context]:
    """A context in which carrying out plans is shown."""
    quiet = options.quiet or not ranks.is_first
    new = to_form(plans)
    fetching = None if ranks.mode == "join" else fetching_of(new)
    say_fetching(fetching, quiet=quiet)
    passes = sum(2 if reading.path_bytes else 1 for reading in readings(new))
    passes += fetching is not None and bool(fetching.whole)
    with show_progress(passes, quiet=quiet) as on_progress:
        yield Context(device=options.device, on_progress=on_progress, ranks=ranks)


def to_form(plans: Sequence[Plan]) -> list[Plan]:
    """Those of plans whose result is not there already and up to date."""
    return [plan for plan in plans if plan.current is None]


def as_result(record: Record, plan: Plan) -> dict[str, Any]:
    """A record as plain JSON values, marked where the result was there already and is up to date."""
    return record.to_dict() | ({"up_to_date": True} if plan.is_up_to_date else {})


def new_warnings(done: Done, plans: Sequence[Plan]) -> list[str]:
    """What results warn of beside what was said when they were planned."""
    told = []
    for plan, record in zip(plans, done.records, strict=True):
        told.append((plan, [warning for warning in record.warnings if warning not in plan.warnings]))
    return attributed(told)


def check_plot(options: Measuring, run: Run) -> None:
    """Refuse a plot that could not be made, or has no place where it is to go, before anything is read."""
    if options.plot is not None:
        from ckavg.output.plots import check_plot_file

        check_file(options.plot, run)
        check_plot_file(options.plot)


def write_plot(done: Done, options: Averaging, evaluated: Evaluated) -> None:
    """Write the plot that was asked for, if one was."""
    if options.plot is not None:
        from ckavg.output.plots import averages_figure, save_figure

        paths = {path.steps: path for path in done.paths if path is not None}
        path = paths.popitem()[1] if len(paths) == 1 else None
        save_figure(averages_figure(done.records, path, evaluated.curves), options.plot)


def check_report(options: Averaging, run: Run) -> None:
    """Refuse a report that has no place where it is to go, before anything is read."""
    if options.report is not None:
        from ckavg.output.report import check_report_file

        check_file(options.report, run)
        check_report_file(options.report)


def write_report(done: Done, options: Averaging, evaluated: Evaluated) -> None:
    """Write the page that was asked for, if one was."""
    if options.report is not None:
        from ckavg.output.report import report_data, save_report

        data = report_data(
            evaluated.records, marks(evaluated.ranking, len(evaluated.records)), done.paths, evaluated.curves
        )
        save_report(options.report, data)


def say_fetching(fetching: Fetching | None, *, quiet: bool) -> None:
    """Say what will be fetched, and how much of the disk it takes, before it begins."""
    if not quiet:
        for line in fetching_lines(fetching):
            say(printable(line))


def fetching_lines(fetching: Fetching | None) -> list[str]:
    """What is fetched to the disk and what is not, in lines that begin with a verb, in one column."""
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
    bytes_to_read = sum(reading.path_bytes + reading.replay_bytes for reading in readings(new))
    whole = {"dry_run": True, "bytes_to_read": bytes_to_read, "memory_bytes": memory_bytes(new), "averages": as_dicts}
    print_json(whole)


def plan_to_dict(plan: Plan, fetching: Fetching | None) -> dict[str, Any]:
    """A plan as plain JSON values, with what is fetched for it and those it is carried out with."""
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
            out.line(f"{each.shown()} is up to date")
        elif each.current is not None:
            out.line(f"would send   {decimal(each.write_bytes)} to {each.shown()}, finished in {each.out}")
    plans = to_form(plans)
    if not plans:
        out.line("Nothing was read or written.")
        return
    plan, together = plans[0], readings(plans)
    visited = sorted({step for each in plans for step in each.run.steps})
    steps = f"{len(visited)} checkpoints, steps {visited[0]} to {visited[-1]}"
    title = plan.scheme.title if len(plans) == 1 else f"{len(plans)} averages from one reading"
    out.line(f"{title}: {steps}", style="bold")
    path_bytes, replay_bytes = sum(each.path_bytes for each in together), sum(each.replay_bytes for each in together)
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


def print_summary(result: Record, plan: Plan) -> None:
    """Print what was averaged, the weight of each checkpoint as a bar, where the result is, and what to type next."""
    out = Output()
    if plan.is_up_to_date:
        out.line(f"{plan.shown()} is up to date")
    stated = ", ".join(f"{shown(name)} {value}" for name, value in plan.scheme.stated.items())
    out.line(f"{plan.scheme.title}: {stated}" if stated else plan.scheme.title, style="bold")
    floating = as_count(sum(entry.numel for entry in plan.run.tensors.values() if entry.is_floating))
    path = "" if result.path_length is None else f", {path_shown(result)}"
    steps = f"steps {result.steps[0]} to {result.steps[-1]}"
    out.line(f"{len(result.steps)} checkpoints of {floating} parameters, {steps}{path}")
    out.line()
    out.print(table_by_step(result.columns(), result.weights, sums="weight"))
    out.line()
    out.line(f"spread   {spread_shown(result)}")
    if plan.current is None:
        rate = result.bytes_read / max(result.seconds.path + result.seconds.replay, 1e-9) / 1e9
        took = f"in {result.seconds.total:.1f} s ({rate:.1f} GB/s)"
        out.line(f"read     {decimal(result.bytes_read)} {took}, wrote {decimal(plan.write_bytes)}")
    if len(result.outputs) > 1:
        snapshots = ", ".join(str(output.step) for output in result.outputs[:-1])
        out.line(f"also     checkpoint-STEP in it, the average as of step {snapshots}")
    if result.lora == "product":
        out.line(f"adapters {products_shown(result)}")
    if result.evaluation is not None:
        out.line(f"eval     {f'{result.evaluation.metric} {shown_value(result.evaluation)}'.strip()}")
    out.line(f"result   {result.directory}")
    if plan.target is not None:
        return
    out.line(f"next     {load_command(result.directory, plan.side_files, plan.weights.names)}")


def spread_shown(result: Record) -> str:
    """What the weights of a result say of it, in words."""
    count, age, weight = result.effective_count or 1.0, result.mean_age or 0.0, result.anchor_weight or 0.0
    parts = [
        f"like {count:.1f} equal checkpoints",
        f"{abs(age):.0f} steps {'ahead of' if age < 0 else 'behind'} the last",
    ]
    if result.anchor_step < result.steps[-1]:
        of_init = result.anchor_is_init and result.anchor_step == result.steps[0]
        parts.append(f"{100 * weight:.0f} % of {'the base model' if of_init else f'step {result.anchor_step}'}")
    return "; ".join(parts)


def path_shown(result: Record) -> str:
    """The path length of a result that has one, and how it is known where it was not measured in full."""
    lengths, errors = result.path_length or (0.0,), result.path_length_error
    length = f"path length ℓ(T) = {lengths[-1]:.4f}"
    if errors is not None:
        return f"{length} ± {errors[-1]:.4f}, from a sample of {100 * result.sample:g} %"
    return f"{length}, cached" if result.path_kernel is None else length
