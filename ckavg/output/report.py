"""The report of `--report`: one HTML page of averages that needs neither a network nor a library.

The page is the fixed file `report.html` with the numbers inserted as JSON. Names from outside appear only in that JSON,
and the page shows them as text, never as markup. Its content security policy allows only its own script and style.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import platform
import re
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from ckavg import __version__
from ckavg.errors import SettingError, WriteError, printable
from ckavg.output.commands import reproduce
from ckavg.output.output_path import check_parent
from ckavg.output.plots import find_layers, recipe_title
from ckavg.output.published import published
from ckavg.output.record import Curves, Evaluation, Record
from ckavg.path.table import PathLength
from ckavg.storage.atomic import write_bytes
from ckavg.storage.redaction import without_secrets

_MOST_KINDS, _MOST_TENSORS = 40, 30
_RANGES = "every", "last", "from_step", "to_step"
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def check_report_file(file: Path) -> None:
    """Refuse a report that cannot be written, before any work is done.

    Raises:
        SettingError: the name does not end in .html.
        WriteError: `file` is a directory, or its directory is missing or not writable.
    """
    if file.suffix.lower() != ".html":
        raise SettingError(f"report is {str(file)!r}; it must end in .html.")
    check_parent(file, "--report")


def save_report(file: Path, data: dict[str, Any]) -> None:
    """Write the page for the data of `report_data`, completely or not at all.

    Raises:
        WriteError: the file cannot be written; it is unchanged.
    """
    try:
        write_bytes(file, report_html(data).encode())
    except OSError as error:
        raise WriteError(
            f"{file} cannot be written: {error.strerror or error}.", hint="Choose another place with --report."
        ) from error


def report_html(data: dict[str, Any]) -> str:
    """The page. Its data contain no `<`, so they cannot end the script; its policy allows no other script or style."""
    page = (files("ckavg.output") / "report.html").read_text(encoding="utf-8")
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        page = page.replace(f"{kind}-src 'none'", f"{kind}-src 'sha256-{digest}'")
    return page.replace("DATA", json.dumps(data, allow_nan=False).replace("<", r"\u003c"), 1)


def report_data(
    results: Sequence[Record],
    marks: Sequence[str] = (),
    paths: Sequence[PathLength | None] = (),
    curves: Curves = (),
) -> dict[str, Any]:
    """The data of the page as plain JSON values, without paths of this machine and secrets.

    Args:
        results: the averages, with their evaluations.
        marks: a word for each beside its evaluation, such as `best`; may be empty.
        paths: the path length of each, or None; may be empty.
        curves: evaluations along the run.
    """
    shown = [*map(published, results)]
    said = next((one.evaluation for one in shown if one.evaluation is not None), None)
    shown_paths = _paths(results, paths or [None] * len(results))
    places = [path["steps"] for path in shown_paths]
    warnings: dict[str, list[str]] = defaultdict(list)
    averages = []
    for record, mark in zip(shown, marks or [""] * len(results), strict=True):
        name = printable(record.output.name)
        for warning in record.warnings:
            warnings[printable(warning)].append(name)
        averages.append(
            {
                "name": name,
                "recipe": printable(recipe_title(record)),
                "chosen": printable(record.chosen),
                "mark": mark,
                "command": without_secrets(reproduce(record, record.to_scheme())),
                "evaluation": record.evaluation and _evaluation(record.evaluation),
                "anchor": record.steps.index(record.anchor_step),
                "path": places.index([*record.steps]) if record.path_length is not None else None,
            }
            | {name: getattr(record, name) for name in ("scheme", "parameters", "steps", "betas", "weights")}
            | {name: getattr(record, name) for name in ("effective_count", "mean_age", "anchor_weight", "path_length")}
        )
    return {
        "averages": averages,
        "metric": printable(said.metric or "evaluation") if said else "",
        "goal": said.goal if said else "",
        "eval_command": printable(said.command) if said else "",
        "axes": _axes(results),
        "curves": [
            {"name": printable(name), "points": points}
            for name, curve in curves
            if len(points := [_point(step, each) for step, each in curve if each.value is not None]) > 1
        ],
        "paths": shown_paths,
        "warnings": [{"text": text, "names": names} for text, names in warnings.items()],
        "versions": {"ckavg": __version__, "Python": platform.python_version(), "torch": version("torch")},
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    return {"value": evaluation.value, "stderr": evaluation.stderr, "problem": printable(evaluation.problem)}


def _point(x: float, evaluation: Evaluation) -> tuple[float, float | None, float | None]:
    return x, evaluation.value, evaluation.stderr


def _axes(results: Sequence[Record]) -> list[dict[str, Any]]:
    """The metric against each hyper-parameter and each range of the selection that has several values.

    A line joins averages that differ in nothing else. The last checkpoint has neither, and is a flat line.
    """
    values = [(one, one.evaluation) for one in results if one.evaluation and one.evaluation.value is not None]
    settings = [
        (one, each, {**one.parameters, **{key: one.selection[key] for key in _RANGES if key in one.selection}})
        for one, each in values
    ]
    names = dict.fromkeys(key for *_, own in settings for key, value in own.items() if not isinstance(value, str))
    flat = {each.value: one.output.name for one, each in reversed(values) if one.scheme == "last"}
    axes = []
    for name in names:
        lines: dict[tuple[Any, ...], dict[Any, Any]] = defaultdict(dict)
        for one, each, own in settings:
            if isinstance(x := own.get(name), int | float):
                rest = tuple((key, value) for key, value in own.items() if key != name)
                lines[one.scheme, rest][x] = _point(x, each)
        lines = {key: points for key, points in lines.items() if len(points) > 1}
        if lines:
            shared = {scheme: set.intersection(*(set(r) for s, r in lines if s == scheme)) for scheme, _ in lines}
            axes.append(
                {
                    "name": name.replace("_", " "),
                    "lines": [
                        {
                            "name": _line_name(scheme, [each for each in rest if each not in shared[scheme]]),
                            "points": [points[x] for x in sorted(points)],
                        }
                        for (scheme, rest), points in lines.items()
                    ],
                    "flat": [{"name": printable(label), "value": value} for value, label in flat.items()],
                }
            )
    return axes


def _line_name(scheme: str, own: Sequence[tuple[str, object]]) -> str:
    return printable(", ".join([scheme, *(f"{key.replace('_', ' ')} {value}" for key, value in own)]))


def _paths(results: Sequence[Record], paths: Sequence[PathLength | None]) -> list[dict[str, Any]]:
    """ℓ of each measured selection, once, and ℓ of its tensors if pass 1 has them."""
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    for record, path in zip(results, paths, strict=True):
        if record.path_length is not None and found.get(record.steps, {"layers": None})["layers"] is None:
            found[record.steps] = {
                "name": record.chosen,
                "steps": [*record.steps],
                "lengths": record.path_length,
                "errors": record.path_length_error,
                "layers": path and _layers(path),
            }
    return [*found.values()]


def _layers(path: PathLength) -> dict[str, Any]:
    numbers, kinds, others = find_layers(path)
    furthest = sorted(kinds, key=lambda kind: -max(each for each in kinds[kind] if not math.isnan(each)))
    rows = {kind: [None if math.isnan(each) else each for each in kinds[kind]] for kind in furthest[:_MOST_KINDS]}
    return {
        "numbers": numbers,
        "kinds": [(printable(kind), rows[kind]) for kind in sorted(rows)],
        "others": [(printable(name), length) for name, length in [*others.items()][:_MOST_TENSORS]],
        "hidden": [max(len(kinds) - _MOST_KINDS, 0), max(len(others) - _MOST_TENSORS, 0)],
    }
