"""The averaging verbs, made from the schemes, and what they share with `ckavg sweep`: plan, warn, average, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ckavg.averaging.evaluation import Criterion
from ckavg.averaging.pipeline import Done, carry_out, do_part
from ckavg.averaging.plan import Options, Plan, checked, output_path, plan_averages
from ckavg.averaging.publish import discard_sent
from ckavg.averaging.reading import fetching_of, readings
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
    unsent,
    write_curves,
)
from ckavg.cli.options import Averaging, Command, Measuring, with_options
from ckavg.cli.parts import print_part, ranks_of_part
from ckavg.cli.progress import show_progress, show_status
from ckavg.cli.push import destination_of, print_pushed, push_shown, when_complete
from ckavg.cli.summary import as_result, print_summary, reading_shown, say_fetching, show_plans, to_form
from ckavg.cli.text import print_json, print_places, warn_of
from ckavg.engine.context import Context
from ckavg.engine.distributed import Ranks
from ckavg.errors import SettingError, listed
from ckavg.hub import Destination, check_access
from ckavg.output.output_path import check_file
from ckavg.output.record import MOST_BYTES
from ckavg.output.staging import find_leftovers
from ckavg.schemes import SCHEMES, Scheme
from ckavg.schemes.parse import Parameter, described, make_scheme, parameters_of, shown
from ckavg.storage.address import output_address
from ckavg.storage.local import parse_json, read_small

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
        if options.quiet and not options.as_json:
            print_places([result.directory])
        elif not options.as_json:
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
    with show_status(f"looking for checkpoints in {options.source}", quiet=options.quiet or not ranks.is_first):
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
    return Options(**given | {"path_exclude": tuple(options.path_exclude or ()), "plot": options.plots_weights})


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
    with show_progress(passes, quiet=quiet, first=reading_shown(new)) as on_progress:
        yield Context(device=options.device, on_progress=on_progress, ranks=ranks)


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
