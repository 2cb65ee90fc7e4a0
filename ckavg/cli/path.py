"""`ckavg path`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ckavg.averaging import advice
from ckavg.averaging.pipeline import measure_path
from ckavg.averaging.plan import fetching_of_path
from ckavg.averaging.record import left_out_of_path
from ckavg.checkpoints.inspect import as_run
from ckavg.cli.averaging import check_plot, tell_fetching, warn_of
from ckavg.cli.commands import with_options
from ckavg.cli.options import Measuring
from ckavg.cli.progress import show_progress
from ckavg.cli.ranks import together
from ckavg.output.output_path import check_file
from ckavg.path.plan import plan_path
from ckavg.sources import inspect_source


@dataclass(frozen=True, slots=True)
class MeasuringPath(Measuring):
    """The options of `path`."""

    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write ℓ by step and by tensor to FILE.", show_default=False),
    ] = None


@with_options(MeasuringPath)
def path(options: MeasuringPath) -> None:
    """Measure how far the weights travelled: pass 1 alone, kept for later runs.

    The table is kept in SOURCE/averaged/path.json, so that ckavg pema need not read the checkpoints for it again.
    """
    from ckavg.report import path as report

    with together(verbose=options.verbose) as ranks:
        run = as_run(inspect_source(options.source, options.selection(), max_disk=options.max_disk))
        check_plot(options, run)
        if options.csv is not None:
            check_file(options.csv, run)
        plan = plan_path(run, exclude=options.path_exclude or (), sample=options.sample)
        warnings = run.warnings + advice.about_anchor(run.steps[0], run.tensors, with_init=run.anchor_is_init)
        warnings += plan.recalled.warnings
        warn_of(warnings)
        fetching = fetching_of_path(run, plan)
        tell_fetching(fetching, quiet=options.quiet or not ranks.is_first)
        begun = time.perf_counter()
        with show_progress(
            1 + (fetching is not None and bool(fetching.whole)), quiet=options.quiet or not ranks.is_first
        ) as on_progress:
            measured = measure_path(
                run,
                path_exclude=options.path_exclude or (),
                zero_sigma=options.zero_sigma,
                sample=options.sample,
                allow_nonfinite=options.allow_nonfinite,
                device=options.device,
                on_progress=on_progress,
                ranks=ranks,
            )
        if not ranks.is_first:
            return
        seconds = time.perf_counter() - begun
        excluded = left_out_of_path(run, measured)
        told = advice.about_path(measured, excluded)
        warn_of(told)
        if options.csv is not None:
            report.write_csv(measured, options.csv)
        if options.plot is not None:
            from ckavg.output.plots import path_figure, save_figure

            save_figure(path_figure(measured), options.plot)
        if options.as_json or not options.quiet:
            report.print_path(
                measured, excluded=excluded, warnings=warnings + told, seconds=seconds, as_json=options.as_json
            )
