"""`ckavg path`."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from ckavg.averaging.advice import about_anchor, about_path
from ckavg.averaging.pipeline import path_length
from ckavg.averaging.reading import fetching_of_path
from ckavg.averaging.record import left_out_of_path
from ckavg.averaging.sources import inspect_source
from ckavg.checkpoints.inspect import as_run
from ckavg.checkpoints.run import Run
from ckavg.cli.average import check_plot
from ckavg.cli.errors import distributed
from ckavg.cli.options import Measuring, with_options
from ckavg.cli.progress import show_progress, show_status
from ckavg.cli.summary import next_command, say_fetching
from ckavg.cli.tables import Bar, Table, table_by_step
from ckavg.cli.text import Output, as_count, plural, print_json, warn_of
from ckavg.engine.distributed import Ranks
from ckavg.errors import WriteError
from ckavg.output.output_path import check_file
from ckavg.path.plan import plan_path
from ckavg.path.table import PathLength
from ckavg.storage.atomic import write_bytes

_FURTHEST = 8
"""Tensors that are shown of those that travelled furthest, and of those that travelled least."""


@dataclass(frozen=True, slots=True)
class MeasuringPath(Measuring):
    """The options of `path`."""

    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write ℓ by step and by tensor to FILE."),
    ] = None


@with_options(MeasuringPath)
def path(options: MeasuringPath) -> None:
    """Measure how far the weights travelled: pass 1 alone, kept for later runs.

    The table is kept in SOURCE/averaged/path.json, so that ckavg pema need not read the checkpoints for it again.
    """
    with distributed(verbose=options.verbose, timeout=options.rank_timeout) as ranks:
        with show_status(f"looking for checkpoints in {options.source}", quiet=options.quiet or not ranks.is_first):
            run = as_run(inspect_source(options.source, options.selection(), max_disk=options.max_disk))
        check_plot(options, run)
        if options.csv is not None:
            check_file(options.csv, run)
        begun = time.perf_counter()
        measured, warnings = _measure(run, options, ranks)
        if not ranks.is_first:
            return
        seconds = time.perf_counter() - begun
        if options.csv is not None:
            write_csv(measured, options.csv)
        if options.plot is not None:
            from ckavg.output.plots import path_figure, save_figure

            save_figure(path_figure(measured), options.plot)
        if options.as_json:
            print_json(path_to_dict(run, measured, warnings=warnings, seconds=seconds))
        elif not options.quiet:
            print_path(run, measured, seconds=seconds)


def _measure(run: Run, options: MeasuringPath, ranks: Ranks) -> tuple[PathLength, tuple[str, ...]]:
    """Measure the path and show how far it has come; with all warnings, which were printed."""
    exclude, quiet = options.path_exclude or (), options.quiet or not ranks.is_first
    plan = plan_path(run, exclude=exclude, sample=options.sample)
    before = run.warnings + about_anchor(run.steps[0], run.tensors, with_init=run.anchor_is_init)
    before += plan.cached.warnings
    warn_of(before)
    fetching = fetching_of_path(run, plan)
    say_fetching(fetching, quiet=quiet)
    passes = 1 + (fetching is not None and bool(fetching.whole))
    reading = f"reading {plural(len(run.steps), 'checkpoint')} in {run.source}: {decimal(plan.nbytes)}"
    with show_progress(passes, quiet=quiet, first=reading if plan.nbytes else "") as on_progress:
        measured = path_length(
            run,
            path_exclude=exclude,
            zero_sigma=options.zero_sigma,
            sample=options.sample,
            allow_nonfinite=options.allow_nonfinite,
            device=options.device,
            progress=on_progress or False,
            ranks=ranks,
        )
    after = about_path(measured, left_out_of_path(run, measured)) if ranks.is_first else ()
    warn_of(after)
    return measured, before + after


def path_to_dict(run: Run, path: PathLength, *, warnings: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """The path as plain JSON values."""
    counted = set(path.counted)
    return {
        "steps": list(path.steps),
        "anchor_step": path.steps[0],
        "span": path.steps[-1] - path.steps[0],
        "path_length": list(path.lengths),
        "path_length_error": None if path.standard_errors is None else list(path.standard_errors),
        "sample": path.sample,
        "zero_sigma": path.zero_sigma,
        "excluded_from_path": sorted({*left_out_of_path(run, path), *path.uncounted}),
        "parameters_counted": path.parameters_counted,
        "tensors": {
            name: {
                "sigma": tensor.sigma if tensor.is_finite else None,
                "numel": tensor.numel,
                "path_length": list(path.tensor_lengths(name)) if name in counted else None,
            }
            for name, tensor in sorted(path.tensors.items())
        },
        "warnings": list(warnings),
        "bytes_read": path.bytes_read,
        "seconds": {"path": seconds},
    }


def write_csv(path: PathLength, file: Path) -> None:
    """Write ℓ by step and by tensor: a row for each step, a column for the whole model and for each counted tensor.

    Raises:
        WriteError: the system would not let us write.
    """
    columns = [("path_length", path.lengths)]
    if path.standard_errors is not None:
        columns.append(("standard_error", path.standard_errors))
    columns += [(name, path.tensor_lengths(name)) for name in path.counted]  # whatever their names, "step" included
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *(name for name, _ in columns)])
    writer.writerows(zip(path.steps, *(values for _, values in columns), strict=True))
    try:
        write_bytes(file, text.getvalue().encode())
    except OSError as error:
        raise WriteError(
            f"{file} cannot be written: {error.strerror or error}.", hint="Name a file in a directory of yours."
        ) from error


def print_path(run: Run, path: PathLength, *, seconds: float) -> None:
    """Print ℓ by step, which tensors travelled furthest and least, and what to type next."""
    out = Output()
    counted = f"{len(path.steps)} checkpoints, steps {path.steps[0]} to {path.steps[-1]}"
    travelled = f"{as_count(path.parameters_counted)} parameters travelled ℓ(T) = {path.lengths[-1]:.4f}"
    out.line(f"{counted}: {travelled}", style="bold", wrap=True)
    out.line("ℓ is the mean distance that a parameter went, in units of its tensor's spread at the anchor.", wrap=True)
    out.line()
    columns = {"step": [str(step) for step in path.steps], "ℓ": [f"{length:.4f}" for length in path.lengths]}
    if path.standard_errors:
        columns["±"] = [f"{error:.4f}" for error in path.standard_errors]
    out.table(table_by_step(columns, path.lengths, most=out.rows))
    out.line()
    out.table(_by_tensor(path))
    out.line()
    if path.sample < 1:
        out.line(f"estimated from {100 * path.sample:g} % of each tensor; ± is one standard error", wrap=True)
    out.fact("read", f"{decimal(path.bytes_read)}, {f'in {seconds:.1f} s' if path.bytes_read else 'all of it cached'}")
    out.fact("next", next_command(run.source, run.selection), style="command")


def _by_tensor(path: PathLength) -> Table:
    """The tensors that travelled furthest, and those that travelled least."""
    ends = {name: path.tensor_lengths(name)[-1] for name in path.counted}
    ordered = sorted(ends, key=lambda name: (-ends[name], name))
    rows: list[tuple[str | Bar, ...]] = [
        (name, f"{ends[name]:.4f}", Bar(ends[name], 0.0, ends[ordered[0]])) for name in ordered
    ]
    hidden = len(rows) - 2 * _FURTHEST
    if hidden > 1:
        rows[_FURTHEST:-_FURTHEST] = [(f"… {hidden} more between", "", "")]
    table = Table("tensor", "ℓ", " ", left=("tensor", " "), spare=(" ",))
    for row in rows:
        table.add_row(*row)
    return table
