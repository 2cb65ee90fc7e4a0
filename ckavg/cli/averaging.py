"""What all averaging verbs do: open the run, plan, warn, average, report."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ckavg.averaging.pipeline import Done, carry_out
from ckavg.averaging.plan import Plan, checked, fetching_of, output_path, plan_averages
from ckavg.checkpoints.run import Fetching, Run
from ckavg.cli.commands import Command, joined
from ckavg.cli.options import Averaging, Measuring
from ckavg.cli.progress import show_progress
from ckavg.cli.push import check_push, complete_in, destination_of, push_shown
from ckavg.cli.ranks import together
from ckavg.cli.terminal import say, warn
from ckavg.engine.distributed import Ranks
from ckavg.output.output_path import check_file
from ckavg.output.staging import find_leftovers
from ckavg.report.text import printable
from ckavg.schemes import Scheme
from ckavg.sources import inspect_source


def averaging_command(make_scheme: Callable[..., Scheme]) -> Command:
    """Make a command of a function from hyper-parameters to a scheme; everything else about averaging is shared."""
    own = inspect.signature(make_scheme, eval_str=True).parameters

    def body(options: Averaging, values: Mapping[str, object]) -> None:
        with together(verbose=options.verbose) as ranks:
            _average(make_scheme(**values), options, ranks)

    return joined(make_scheme, Averaging, own, body)


def _average(scheme: Scheme, options: Averaging, ranks: Ranks) -> None:
    from ckavg.report import average as report
    from ckavg.report.console import print_json
    from ckavg.report.push import print_pushed

    destination = destination_of(options)
    found = inspect_source(options.source, options.selection(scheme.every_from), max_disk=options.max_disk)
    run = checked(found, [output_path(found.home, scheme, options.out)], force=options.force)
    check_plot(options, run)
    (plan,) = plans_of(run, [(scheme, options.out)], options)
    warn_of(plan.warnings)
    warn_of_leftovers([plan])
    if ranks.is_first:
        check_push(destination, plan.files)
    if options.dry_run:
        warn_of(plan.foreseen)
        report.print_plan(plan, as_json=options.as_json)
        return
    done = carry_out_shown([plan], options, ranks)
    if not ranks.is_first:
        return
    (result,) = done.records
    with complete_in(result.directory, destination):
        warn_of(result.warnings[len(plan.warnings) :])
        if options.as_json and destination is None:
            print_json(result.to_dict())
        elif not (options.as_json or options.quiet):
            report.print_summary(result, plan)
        write_plot(done, options)
        if destination is not None:
            pushed = push_shown(result.directory, destination, quiet=options.quiet)
            if options.as_json:
                print_json(result.to_dict() | {"url": pushed.url})
            else:
                print_pushed(pushed, as_json=False, quiet=options.quiet)


def plans_of(run: Run, wanted: Sequence[tuple[Scheme, Path | None]], options: Averaging) -> list[Plan]:
    """The plans of averages, by the options of their verb."""
    return plan_averages(
        run,
        wanted,
        dtype=options.dtype,
        path_exclude=options.path_exclude or (),
        sample=options.sample,
        snapshot_every=options.snapshot_every,
        card=options.card,
        force=options.force,
    )


def carry_out_shown(plans: Sequence[Plan], options: Averaging, ranks: Ranks) -> Done:
    """Carry out plans and show how far they have come."""
    fetching = fetching_of(plans)
    tell_fetching(fetching, quiet=options.quiet or not ranks.is_first)
    passes = 2 if any(plan.path_bytes for plan in plans) else 1
    passes += fetching is not None and bool(fetching.whole)
    with show_progress(passes, quiet=options.quiet or not ranks.is_first) as on_progress:
        return carry_out(
            plans,
            accumulate=options.accumulate,
            device=options.device,
            zero_sigma=options.zero_sigma,
            allow_nonfinite=options.allow_nonfinite,
            on_progress=on_progress,
            ranks=ranks,
        )


def tell_fetching(fetching: Fetching | None, *, quiet: bool) -> None:
    """Say what will be fetched, and how much of the disk it takes, before it begins."""
    from ckavg.report.fetching import fetching_lines

    if not quiet:
        for line in fetching_lines(fetching):
            say(printable(line))


def warn_of(warnings: Iterable[str]) -> None:
    """Print warnings to stderr."""
    for warning in warnings:
        warn("warning", warning)


def warn_of_leftovers(plans: Sequence[Plan]) -> None:
    """Tell of interrupted averages that lie where results will, besides those that are continued now."""
    outs = [plan.out for plan in plans]
    for directory in dict.fromkeys(out.parent for out in outs):
        warn_of(map(str, find_leftovers(directory, but=outs)))


def check_plot(options: Measuring, run: Run) -> None:
    """Refuse a plot that could not be made, or has no place where it is to go, before anything is read."""
    if options.plot is not None:
        from ckavg.output.plots import check_plot_file

        check_file(options.plot, run)
        check_plot_file(options.plot)


def write_plot(done: Done, options: Averaging) -> None:
    """Write the plot that was asked for, if one was."""
    if options.plot is not None:
        from ckavg.output.plots import averages_figure, save_figure

        save_figure(averages_figure(done.records, done.path), options.plot)
