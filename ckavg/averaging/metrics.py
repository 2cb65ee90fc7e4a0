"""Find a metric by name in what an evaluation printed or wrote. Pure.

The value comes from the first of these that has the name: a JSON file, the last JSON object in the text, the table of
lm-evaluation-harness, the last line with the name as a word. A name with two values in one of them is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckavg.checkpoints.trainer_log import goal_of

KeyPath = tuple[str, ...]
"""The path to a value in a JSON document: keys and list indices, outermost first."""

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?>(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)(?!\w)", re.IGNORECASE)
_PAIR = re.compile(rf"([A-Za-z_][\w@/,.-]*)['\"]?\s*[:=]\s*(?:{_NUMBER.pattern})", re.IGNORECASE)

_UNITS = ("tokens", "samples", "examples", "documents", "sequences", "images")
_SHOWN_KEYS, _SHOWN = 6, 60


def last_number(text: str) -> float | None:
    """The last number in a text.

    >>> last_number("step 10: loss 1.52e-1, 7 s"), last_number("accuracy: 87.5%"), last_number("done")
    (7.0, 87.5, None)
    >>> last_number("loss=-0.5")
    -0.5
    """
    found = _NUMBER.findall(text)
    return float(found[-1]) if found else None


@dataclass(frozen=True, slots=True)
class Reading:
    """A metric as found.

    Attributes:
        value: of the metric; None if it has none.
        stderr: its standard error; None if it is not known.
        problem: why there is no value, or no standard error of the given name.
        data: how much data was used, such as `4,096 tokens`; empty if it is not known.
    """

    value: float | None = None
    stderr: float | None = None
    problem: str = ""
    data: str = ""


def read_metric(text: str, metric: str | None, stderr: str | None = None, document: Any = None) -> Reading:
    r"""Find the value of a metric, and its standard error.

    Args:
        text: what was printed.
        metric: a key, the end of a dotted path or a whole one, or a word in the text; a key of lm-evaluation-harness
            also without its filter. None: the last number in the text.
        stderr: likewise the standard error; None: `NAME_stderr`, or `stderr` beside the only metric of its object.
        document: the content of a JSON file; None: there is none.

    >>> read_metric('{"loss": 0.5, "loss_stderr": 0.125}', "loss")
    Reading(value=0.5, stderr=0.125, problem='', data='')
    >>> read_metric("train loss 0.5\nval_loss 0.25, loss 0.75", "val_loss").value
    0.25
    >>> read_metric('{"a": {"acc": 1}, "b": {"acc": 2}}', "acc").problem
    "'acc' is ambiguous: there are a.acc, b.acc"
    """
    if metric is None:
        value = last_number(text)
        return Reading(problem="it printed no number") if value is None else _finite(value, "it printed {}")
    printed, rest = _last_object(text)
    documents = [dict(_leaves(each)) for each in (document, printed) if each is not None]
    documents.append(_harness_table(rest))
    for leaves in documents:
        found = _find(leaves, metric)
        if len(found) > 1:
            return Reading(problem=f"{metric!r} is ambiguous: there are {_listed(found, metric)}")
        if found:
            value = _as_number(leaves[found[0]])
            if value is None:
                return Reading(problem=f"{metric!r} is {_shown(leaves[found[0]])}, not a number")
            error = _stderr_among(leaves, found[0], stderr)
            reading = _with_stderr(_finite(value, f"{metric!r} is {{}}"), error, stderr)
            return dataclasses.replace(reading, data=_data_among(leaves, found[0]))
    numbers = _after_word(rest, metric)
    if numbers is None:
        return Reading(problem=_missing(metric, documents, rest))
    if len(numbers) != 1:
        what = "is ambiguous: several numbers follow it" if numbers else "has no number after it"
        return Reading(problem=f"{metric!r} {what} on the last line that has it")
    errors = _after_word(rest, stderr or f"{metric}_stderr") or set()
    reading = _finite(numbers.pop(), f"{metric!r} is {{}}")
    return _with_stderr(reading, errors.pop() if len(errors) == 1 else None, stderr)


def _finite(value: float, problem: str) -> Reading:
    return Reading(value) if math.isfinite(value) else Reading(problem=problem.format(value))


def _with_stderr(reading: Reading, error: float | None, asked: str | None) -> Reading:
    if reading.value is None:
        return reading
    if error is not None and math.isfinite(error) and error >= 0:
        return Reading(reading.value, error)
    return Reading(reading.value, problem=f"no standard error {asked!r} was found" if asked else "")


# --- JSON ---


def _last_object(text: str) -> tuple[Any, str]:
    """The last non-empty JSON object in a text, None if there is none; and the text without it."""
    decoder, found, place = json.JSONDecoder(), (None, 0, 0), text.find("{")
    while place >= 0:
        end = place + 1
        try:
            value, end = decoder.raw_decode(text, place)
            found = (value, place, end) if value else found
        except RecursionError:  # no metric is nested so deep: skip all of it
            end = max(end, text.find("\n", place))
        except ValueError:
            pass
        place = text.find("{", end)
    value, begin, end = found
    return value, text[:begin] + text[end:]


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every leaf of a JSON document with its path; without recursion, since it may be deep."""
    stack = [(path, value)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            stack += [((*path, str(key)), inner) for key, inner in reversed(value.items())]
        elif isinstance(value, list):
            stack += [((*path, str(index)), value[index]) for index in reversed(range(len(value)))]
        else:
            yield path, value


def _find(leaves: Mapping[KeyPath, Any], name: str) -> list[KeyPath]:
    """The paths that a name matches: the whole path, else its end, else without the filter.

    A value that is not a number counts only if no number has the name.
    """
    dotted = {path: ".".join(path) for path in leaves}
    unfiltered = {path: text.rpartition(",")[0] for path, text in dotted.items() if "," in path[-1:][0]}
    ways = [
        [path for path, text in dotted.items() if text == name],
        [path for path, text in dotted.items() if text.endswith(f".{name}")],
        [path for path, text in unfiltered.items() if text == name or text.endswith(f".{name}")],
    ]
    numbers = [[path for path in way if _as_number(leaves[path]) is not None] for way in ways]
    return sorted(next(filter(None, numbers + ways), []))


def _stderr_among(leaves: Mapping[KeyPath, Any], of: KeyPath, name: str | None) -> float | None:
    """The standard error of the value at a path, from the same document."""
    *outside, key = of
    metric, comma, filters = key.partition(",")
    names = [f"{key}_stderr", f"{metric}_stderr{comma}{filters}"] if name is None else [name]
    beside = {path[-1] for path in leaves if path[:-1] == of[:-1]}
    if name is None and sum(goal_of(each) is not None for each in beside) == 1 and goal_of(key) is not None:
        names.append("stderr")
    paths = [path for each in names if (path := (*outside, each)) in leaves]
    if name is not None and not paths and len(found := _find(leaves, name)) == 1:
        paths = found
    return _as_number(leaves[paths[0]]) if paths else None


def _data_among(leaves: Mapping[KeyPath, Any], of: KeyPath) -> str:
    """How much data the value at a path was computed from: a count beside it, or what lm-evaluation-harness states.

    >>> _data_among({("a", "loss"): 0.5, ("a", "tokens"): 4096}, ("a", "loss"))
    '4,096 tokens'
    """
    places = {(*of[:-1], unit): unit for unit in _UNITS} | {("n-samples", *of[1:-1], "effective"): "samples"}
    counts = ((leaves.get(path), unit) for path, unit in places.items())
    return next((f"{count:,} {unit}" for count, unit in counts if type(count) is int and count > 0), "")


def _as_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


# --- text ---


def _harness_table(text: str) -> dict[KeyPath, Any]:
    r"""The tables of lm-evaluation-harness, with the keys of its JSON: `results`, the task, `metric,filter`.

    >>> _harness_table("|Tasks|Filter|Metric|   |Value|   |Stderr|\n|---|---|---|---|---:|---|---|\n"
    ...                "|sums |none  |acc   |↑  |0.500|±  |0.1250|")
    {('results', 'sums', 'acc,none'): 0.5, ('results', 'sums', 'acc_stderr,none'): 0.125}
    """
    leaves: dict[KeyPath, Any] = {}
    header: list[str] = []
    task = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.lstrip().startswith("|") else []
        if {"Filter", "Metric", "Value", "Stderr"} <= set(cells):
            header, task = cells, ""
        elif not header or len(cells) != len(header):
            header = []
        elif "Metric" in header and not cells[header.index("Metric")].startswith("-"):
            row = dict(zip(header, cells, strict=True))
            kind = "groups" if header[0] == "Groups" else "results"
            task = cells[0].removeprefix("- ") or task
            for key, column in ((f"{row['Metric']},", "Value"), (f"{row['Metric']}_stderr,", "Stderr")):
                if _NUMBER.fullmatch(row[column]):
                    leaves[kind, task, key + row["Filter"]] = float(row[column])
    return leaves


def _after_word(text: str, word: str) -> set[float] | None:
    """The first number after each occurrence of a word on the last line that has it; None if no line has it.

    A part of a longer name does not count: not `loss` in `val_loss`, `val/loss` or `loss@5`.
    """
    pattern = re.compile(rf"(?<!\w)(?<!\w[-./@]){re.escape(word)}(?![\w]|[-/@]\w|[.,][A-Za-z_])")
    lines = [line for line in text.splitlines() if pattern.search(line)]
    if not lines:
        return None
    found = (_NUMBER.search(lines[-1], match.end()) for match in pattern.finditer(lines[-1]))
    return {float(number[0]) for number in found if number is not None}


# --- messages ---


def _missing(metric: str, documents: list[dict[KeyPath, Any]], rest: str) -> str:
    """The message that a name is missing, and which names there are."""
    keys = [path for leaves in documents for path, value in leaves.items() if _as_number(value) is not None]
    keys += [(match[1],) for match in _PAIR.finditer(rest)]
    return f"it printed no {metric!r}" + (f"; there are {_listed(keys, metric)}" if keys else ", and no key or number")


def _listed(paths: list[KeyPath], name: str) -> str:
    """A few of some paths, those most like a name first."""

    def likeness(path: KeyPath) -> float:
        return max(difflib.SequenceMatcher(None, name, text).ratio() for text in (".".join(path), path[-1]))

    nearest = sorted(dict.fromkeys(paths[:1000]), key=likeness, reverse=True)
    more = f" and {len(nearest) - _SHOWN_KEYS} more" if len(nearest) > _SHOWN_KEYS else ""
    return ", ".join(".".join(path)[:_SHOWN] for path in nearest[:_SHOWN_KEYS]) + more


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
