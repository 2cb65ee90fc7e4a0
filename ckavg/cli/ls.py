"""`ckavg ls`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

from ckavg.averaging.evaluation import rank
from ckavg.cli.errors import failures
from ckavg.cli.evaluation import marks, shown_value
from ckavg.cli.options import Json, Verbose, folder
from ckavg.cli.tables import Table, Words
from ckavg.cli.text import Output, print_json
from ckavg.output.record import Record
from ckavg.verify.results import Result, list_results


def ls(
    source: Annotated[
        Path,
        folder(
            "SOURCE",
            "Directory of saved checkpoints, or that results were put into with --out.",
            show_default="current directory",
            readable=False,
        ),
    ] = Path(),
    *,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List the results of a run: recipe, evaluation, what their weights say. Reads no weights.

    Of results that were evaluated by the same command and metric, the best is marked.
    """
    with failures(verbose=verbose):
        results = list_results(source)
        said = _marks(results)
        if as_json:
            print_json({"results": [each.to_dict() | {"mark": mark} for each, mark in zip(results, said, strict=True)]})
        else:
            _print_results(source, results, said)


def _marks(results: Sequence[Result]) -> list[str]:
    """Which are best, and level with the best, among those that one command and metric have judged."""
    judged: dict[tuple[str, str, str], list[int]] = {}
    for index, each in enumerate(results):
        evaluation = each.record and each.record.evaluation
        if evaluation and evaluation.goal:
            judged.setdefault((evaluation.command, evaluation.metric, evaluation.goal), []).append(index)
    said = [""] * len(results)
    for (_, _, goal), indices in judged.items():
        evaluations = [record.evaluation if (record := results[index].record) else None for index in indices]
        ranking = rank(evaluations, "min" if goal == "min" else "max")
        for index, mark in zip(indices, marks(ranking, len(indices)), strict=True):
            said[index] = mark
    return said


def _print_results(source: Path, results: Sequence[Result], said: Sequence[str]) -> None:
    out = Output()
    if not results:
        out.line(f"There are no results in {source}.")
        return
    table = Table(
        *("result", "recipe", "eval", " ", "anchor", "n", "age", "made", "state"),
        left=("result", "recipe", " ", "made", "state"),
        wraps=("recipe",),
        spare=("made", "recipe", "age", "anchor"),
    )
    for each, mark in zip(results, said, strict=True):
        made = "" if each.made is None else datetime.fromtimestamp(each.made).astimezone().strftime("%Y-%m-%d %H:%M")
        record = each.record
        cells = ["", "", "", "", "", ""] if record is None else [*_cells(record, mark)]
        state = Words("problem", "bad") if each.problem else each.state
        table.add_row(each.directory.name, *cells, made, state, style="good" if mark.startswith("best") else "")
    out.table(table)
    for each in results:
        if each.problem:
            out.problem(f"{each.directory.name}: {each.problem}")


def _cells(record: Record, mark: str) -> list[str]:
    evaluation = record.evaluation
    shown = shown_value(evaluation)
    if evaluation is not None and evaluation.metric:
        shown = f"{evaluation.metric} {shown}"
    return [
        _recipe(record),
        shown,
        mark,
        "" if record.anchor_weight is None else f"{100 * record.anchor_weight:.0f} %",
        "" if record.effective_count is None else f"{record.effective_count:.1f}",
        "" if record.mean_age is None else f"{record.mean_age:.0f}",
    ]


def _recipe(record: Record) -> str:
    """The scheme, what was chosen, and the dtype where one was asked for, in a line."""
    chosen = [f"{name.replace('_', '-')} {value}" for name, value in record.selection.items() if name != "every_from"]
    dtype = [] if record.dtype == "source" else [record.dtype]
    return ", ".join([record.to_scheme().label, *chosen, *dtype])
