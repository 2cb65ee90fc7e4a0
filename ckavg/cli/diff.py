"""`ckavg diff`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from rich.filesize import decimal

from ckavg.averaging.recipe import setting_shown
from ckavg.cli.errors import failures
from ckavg.cli.options import Json, Quiet, Verbose, folder
from ckavg.cli.progress import show_progress
from ckavg.cli.tables import Table
from ckavg.cli.text import Output, print_json
from ckavg.errors import listed
from ckavg.verify.difference import Difference, TensorDistance, compare

_MOST_ROWS = 40


def diff(
    one: Annotated[Path, folder("A", "Directory of a result, or of a checkpoint.")],
    other: Annotated[Path, folder("B", "Likewise; one of the two is a result.")],
    *,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare two results, or a result with a checkpoint: recipe, weights, distance by tensor.

    The distance of a tensor is ‖a − b‖₂ / ‖a‖₂, computed in float64.
    """
    with failures(verbose=verbose):
        with show_progress(1, quiet=quiet) as on_progress:
            difference = compare(one, other, on_progress=on_progress)
        if as_json:
            print_json(difference.to_dict())
        elif not quiet:
            _print_difference(one, other, difference)


def _print_difference(one: Path, other: Path, difference: Difference) -> None:
    out = Output()
    out.line(f"A  {one}")
    out.line(f"B  {other}")
    if difference.recipe:
        settings = [
            (name.replace("_", "-"), *(setting_shown(name, each, absent="") for each in values))
            for name, *values in difference.recipe
        ]
        _print_table(out, ("recipe", "A", "B"), settings, left=("recipe", "A", "B"), wraps=("A", "B"))
    if difference.weights:
        rows = [(str(step), *map(_number, weights)) for step, *weights in difference.weights]
        _print_table(out, ("step", "weight in A", "weight in B"), rows)
    tensors = [(each.name, _relative(each)) for each in difference.tensors]
    _print_table(out, ("tensor", "‖a−b‖/‖a‖"), [*tensors[:_MOST_ROWS]], left=("tensor",))
    if len(tensors) > _MOST_ROWS:
        out.line(f"… {len(tensors) - _MOST_ROWS} more, closer")
    out.line()
    out.fact("total", _relative(difference.total))
    if difference.unequal:
        are = "is" if len(difference.unequal) == 1 else "are"
        out.fact("unequal", f"{listed(difference.unequal)}, which {are} copied")
    out.fact("read", decimal(difference.bytes_read))


def _print_table(
    out: Output,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: tuple[str, ...] = (),
    wraps: tuple[str, ...] = (),
) -> None:
    table = Table(*columns, left=left, wraps=wraps)
    for row in rows:
        table.add_row(*row)
    out.line()
    out.table(table)


def _number(weight: float | None) -> str:
    return "" if weight is None else f"{weight:.4f}"


def _relative(each: TensorDistance) -> str:
    return "not finite" if each.relative is None else f"{each.relative:.3e}"
