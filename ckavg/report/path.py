"""Stage *report*: what `path` shows, and the table it writes."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ckavg.errors import WriteError
from ckavg.path.table import PathLength
from ckavg.report.console import plain_table, print_json, quoted, stdout_console
from ckavg.report.text import MOST_ROWS, as_bytes, as_count, bar, shortened_rows
from ckavg.storage.atomic import write_bytes

_BAR_WIDTH = 32
_TRAVELLERS = 8


def print_path(
    path: PathLength, *, excluded: tuple[str, ...], warnings: tuple[str, ...], seconds: float, as_json: bool
) -> None:
    """Print ℓ by step, and which tensors travelled furthest and least.

    Args:
        path: what was measured.
        excluded: floating tensors that did not count.
        warnings: what a user should know.
        seconds: how long it took.
        as_json: one JSON object instead of tables.
    """
    if as_json:
        print_json(to_dict(path, excluded=excluded, warnings=warnings, seconds=seconds))
        return
    console = stdout_console()
    counted = f"{len(path.steps)} checkpoints, steps {path.steps[0]} to {path.steps[-1]}"
    console.print(
        f"{counted}: {as_count(path.parameters_counted)} parameters travelled ℓ(T) = {path.lengths[-1]:.4f}",
        style="bold",
    )
    console.print("ℓ is the mean distance that a parameter went, in units of its tensor's spread at the anchor.\n")
    console.print(_by_step(path))
    console.print()
    console.print(_by_tensor(path))
    console.print()
    if path.sample < 1:
        console.print(f"estimated from {100 * path.sample:g} % of each tensor; ± is one standard error")
    how = f"in {seconds:.1f} s" if path.bytes_read else "all of it was known from before"
    console.print(f"read     {as_bytes(path.bytes_read)}, {how}")


def to_dict(
    path: PathLength, *, excluded: tuple[str, ...], warnings: tuple[str, ...], seconds: float
) -> dict[str, Any]:
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
        "excluded_from_path": sorted({*excluded, *path.uncounted}),
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
    errors = path.standard_errors
    columns: list[tuple[str, tuple[float, ...]]] = [("path_length", path.lengths)]
    if errors is not None:
        columns.append(("standard_error", errors))
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


def _by_step(path: PathLength) -> Any:
    errors = path.standard_errors
    table = plain_table("step", "ℓ", *(("±",) if errors else ()), " ", left=(" ",))
    lengths = path.lengths
    columns = [
        [str(step) for step in path.steps],
        [f"{length:.4f}" for length in lengths],
        *([[f"{error:.4f}" for error in errors]] if errors else ()),
        [bar(length, lengths[-1], _BAR_WIDTH) for length in lengths],
    ]
    head, middle, tail = shortened_rows(list(zip(*columns, strict=True)), MOST_ROWS)
    hidden = len(lengths[middle])
    between = [("…", *[""] * (len(columns) - 2), f"{hidden} more")] if hidden else []
    for row in (*head, *between, *tail):
        table.add_row(*row)
    return table


def _by_tensor(path: PathLength) -> Any:
    """The tensors that travelled furthest, and those that travelled least."""
    ends = {name: path.tensor_lengths(name)[-1] for name in path.counted}
    ordered = sorted(ends, key=lambda name: (-ends[name], name))
    table = plain_table("tensor", "ℓ", " ", left=("tensor", " "))
    hidden = len(ordered) - 2 * _TRAVELLERS
    shown = ordered if hidden <= 1 else [*ordered[:_TRAVELLERS], None, *ordered[-_TRAVELLERS:]]
    for name in shown:
        if name is not None:
            table.add_row(quoted(name), f"{ends[name]:.4f}", bar(ends[name], ends[ordered[0]], _BAR_WIDTH))
        else:
            table.add_row(f"… {hidden} more between", "", "")
    return table
