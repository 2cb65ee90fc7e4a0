"""Stage *discover*: the log that a trainer wrote beside a checkpoint. Reads one small, untrusted JSON file."""

from __future__ import annotations

import bisect
import itertools
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckavg.checkpoints.layouts import WEIGHTS
from ckavg.checkpoints.run import Checkpoint
from ckavg.errors import CkavgError, MismatchError, listed
from ckavg.storage.base import AnyPath
from ckavg.storage.local import read_object

TRAINER_STATE = "trainer_state.json"
"""The file in which transformers' Trainer keeps `global_step` and `log_history`."""

_LOG, _ENTRIES, _SPACE = b'"log_history"', b'"log_history": [', " \t\n\r"
_DECODER = json.JSONDecoder()

Goal = Literal["min", "max"]

_Losses = dict[int, set[float]]
"""What a trainer logged, by step."""

_LESS_IS_BETTER = "loss|losses|perplexity|ppl|nll|error|errors|err|wer|cer|ter|mse|rmse|mae|bits_per_byte|bpb|brier"
_MORE_IS_BETTER = (
    r"acc|accuracy|f1|exact_match|em|bleu|rouge\w?|reward|rewards|score|scores|auc|auroc|mcc|precision|recall|chrf"
)
_NEITHER = "stderr|std|neg|negative"
_GOALS = {
    goal: re.compile(rf"(?:^|_)(?:{words})(?=_|$)")
    for goal, words in {"min": _LESS_IS_BETTER, "max": _MORE_IS_BETTER, "": _NEITHER}.items()
}

LARGEST = 64 * 2**20
"""Bytes; a log of a few hundred thousand entries is smaller. A larger file is not read for advice."""


def read_trainer_state(directory: AnyPath) -> dict[str, Any]:
    """The trainer state of a checkpoint directory, empty where it is no JSON object.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is not JSON, no plain file, or very large.
    """
    return read_object(directory / TRAINER_STATE, LARGEST)


class Logs:
    """The logs of the trainers seen so far, each by the latest checkpoint that has it; those of one run share one.

    The states of K checkpoints of one run have some K²/2 entries: each holds the log of the one before, in the same
    bytes, and goes on from there. What two of them share is parsed and compared once.
    """

    def __init__(self) -> None:
        self._known: list[_Losses] = []
        self._text = b""  # the entries of the state read last
        self._entries: list[Any] = []
        self._shared = 0  # how many of them are of the state before, too: all of its entries, or none
        self._growing: _Losses | None = None  # the losses of that state, where they are the only log
        self._waiting: list[tuple[int, float]] = []  # losses after that, of no new step

    def read(self, directory: AnyPath) -> tuple[dict[str, Any], int | None]:
        """The trainer state of a checkpoint directory, and which log it holds, or goes on with; None where it shares no
        step with any.

        A trainer keeps its log from one checkpoint to the next: of one run, the later one holds all of the earlier. So
        two that have no loss in common for one step are of two runs.

        Raises:
            OSError, ValueError: as of `read_trainer_state`.
        """
        state = read_object(directory / TRAINER_STATE, LARGEST, self.parse)
        return state, self.number(state)

    def parse(self, text: bytes) -> Any:
        """What `json.loads` makes of a trainer state, with the entries that the last one has taken from there."""
        before, known, entries = self._text, 0, self._entries
        self._text, self._entries, self._shared = b"", [], 0
        head, found, rest = text.partition(_ENTRIES)
        is_key = found and head[:1] == b"{" and head[1:2] != b"\0" and head[-1:] != b"\\"  # rather than part of one
        if not is_key or _LOG in head or _LOG in rest:
            return json.loads(text)
        if before and rest.startswith(before):
            known = len(before)
        more = rest[known:].decode("utf-8", "surrogatepass").lstrip(_SPACE)
        if known and more[:1] not in (",", "]"):
            return json.loads(text)
        is_more = known > 0 and more[0] == ","
        new, end = _DECODER.raw_decode(more := f"[{more[is_more:].lstrip(_SPACE)}")
        tail = more[end:]
        state = json.loads(f'{head.decode("utf-8", "surrogatepass")}"log_history":[]{tail}')
        if (is_more and not new) or b"\\u" in head or "\\u" in tail or state.get("log_history") != []:
            return json.loads(text)
        self._shared = len(entries) if known else 0
        self._entries = state["log_history"] = (entries if known else []) + new
        inner = rest[: len(rest) - len(tail.encode("utf-8", "surrogatepass")) - 1]
        self._text = inner.rstrip(_SPACE.encode())
        return state

    def number(self, state: Mapping[str, Any]) -> int | None:
        """Which log a state holds that was read just now."""
        log = self._growing
        if log is not None and self._shared:
            self._waiting += _finite_losses({"log_history": self._entries[self._shared :]})
            if any(step not in log for step, _ in self._waiting):
                _add(log, self._waiting)
                self._waiting = []
            return 0
        losses = _add({}, _finite_losses(state))
        number = self._number_of(losses)
        self._growing = losses if number == 0 and len(self._known) == 1 and self._known[0] is losses else None
        self._waiting = []
        return number

    def _number_of(self, losses: _Losses) -> int | None:
        is_new = not self._known
        for number, log in enumerate(self._known):
            shared = log.keys() & losses.keys()
            if shared and all(log[step] & losses[step] for step in shared):
                self._known[number] = max(log, losses, key=len)
                return number
            is_new = is_new or bool(shared)
        if not losses or not is_new:
            return None
        self._known.append(losses)
        return len(self._known) - 1


def _finite_losses(state: Mapping[str, Any]) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in _logged(state, "loss") if type(loss) is float and math.isfinite(loss)]


def _add(losses: _Losses, found: Iterable[tuple[int, float]]) -> _Losses:
    """Add losses by step: a run that was resumed may have logged a step twice."""
    for step, loss in found:
        losses.setdefault(step, set()).add(loss)
    return losses


def unrelated_logs(checkpoints: Iterable[tuple[str, int | None]]) -> list[CkavgError]:
    """An error if checkpoints, given by name and number of their log, belong to more than one run."""
    by_log: dict[int, list[str]] = defaultdict(list)
    for name, log in checkpoints:
        if log is not None:
            by_log[log].append(name)
    if len(by_log) < 2:
        return []
    named = " and ".join(listed(names) for names in by_log.values())
    return [
        MismatchError(
            f"The checkpoints belong to {len(by_log)} runs: by their {TRAINER_STATE}, {named} logged different losses "
            "for the same steps.",
            hint="Some are from an earlier run in the same directory. Leave them out with --from-step, --to-step, "
            "--steps or --skip-step.",
        )
    ]


Series = tuple[tuple[int, float], ...]
"""Logged values: (optimizer step, value), by step."""


Trend = Literal["falling", "level", "rising"]

_FEWEST, _GROUPS = 8, 40
_LEVEL, _MOVING = 1.5, 3.0
_LARGEST_STEP = 10**18


@dataclass(frozen=True, slots=True)
class Course:
    """The course of training, from the trainer's log.

    Attributes:
        metric: `eval_loss` or, if that was not logged, `loss`; empty if neither was.
        values: its values.
        trend: its trend at the end; None if not clear.
        rates: the learning rates.
    """

    metric: str
    values: Series
    trend: Trend | None
    rates: Series


@dataclass(frozen=True, slots=True)
class History:
    """The log of a trainer at the time it saved a checkpoint.

    Attributes:
        state: its trainer state; empty if there is none.
    """

    state: Mapping[str, Any]

    def values(self, name: str) -> Series:
        """The finite numbers logged under a name; the last one for each step."""
        values = {
            step: float(value)
            for step, value in _logged(self.state, name)
            if 0 <= step < _LARGEST_STEP
            and type(value) in (int, float)
            and abs(value) <= sys.float_info.max  # JSON has NaN and 10**400
        }
        return tuple(sorted(values.items()))

    @property
    def names(self) -> list[str]:
        """The names under which it logged numbers, sorted."""
        history = self.state.get("log_history")
        entries = [each for each in history if isinstance(each, dict)] if isinstance(history, list) else []
        names = {name for each in entries for name in each if name not in ("step", "epoch")}
        return sorted(name for name in names if self.values(name))

    @property
    def learning_rates(self) -> Series:
        """The learning rates."""
        return tuple((step, rate) for step, rate in self.values("learning_rate") if rate >= 0)


def read_history(checkpoint: AnyPath) -> History:
    """The log beside a checkpoint; empty if there is none, if it is malformed or very large, or if the checkpoint is a
    single file: a log beside that need not belong to its run. Never raises.
    """
    if checkpoint.suffix == WEIGHTS or not checkpoint.is_dir():
        return History({})
    try:
        return History(read_trainer_state(checkpoint))
    except (OSError, ValueError):
        return History({})


def read_course(checkpoint: AnyPath) -> Course:
    """The course of training from the log beside a checkpoint. Never raises."""
    history = read_history(checkpoint)
    for metric in ("eval_loss", "loss"):
        if values := history.values(metric):
            return Course(metric, values, trend_of(values), history.learning_rates)
    return Course("", (), None, history.learning_rates)


def trend_of(values: Sequence[tuple[int, float]]) -> Trend | None:
    """Whether a loss was falling, level or rising in the second half of its values; None if not clear.

    A line through that half has the median slope of all pairs of values. Its change from the first step to the last has
    a standard error of s √(12 / m) for m values, where s² is the sum of squared distances from the line over m − 2. The
    loss falls or rises if the change exceeds 3 of these errors, is level within 1.5, and is not clear in between or
    with fewer than 8 values. More than 40 values are replaced by the means of 40 groups of neighbours.

    >>> trend_of([(step, 1 / step) for step in range(1, 9)]), trend_of([(step, 1.0) for step in range(1, 9)])
    ('falling', 'level')
    """
    if len(values) < _FEWEST:
        return None
    half = _grouped(values)
    half = half[len(half) // 2 :]
    slope = statistics.median(
        (after - before) / (end - begin) for (begin, before), (end, after) in itertools.combinations(half, 2)
    )
    rests = [value - slope * step for step, value in half]
    middle, count = statistics.median(rests), len(half)
    scatter = math.sqrt(math.fsum((rest - middle) ** 2 for rest in rests) / (count - 2))
    fall, error = slope * (half[0][0] - half[-1][0]), scatter * math.sqrt(12 / count)
    if abs(fall) <= _LEVEL * error:
        return "level"
    if abs(fall) <= _MOVING * error:
        return None
    return "falling" if fall > 0 else "rising"


def _grouped(values: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """The values or, if there are many, the means of groups of neighbours, for steps and values. In units of the
    largest value, so that squares do not overflow.
    """
    count, unit = min(len(values), _GROUPS), max(abs(value) for _, value in values) or 1.0
    cuts = [len(values) * place // count for place in range(count + 1)]
    groups = [values[begin:end] for begin, end in itertools.pairwise(cuts)]
    return [(statistics.fmean(s for s, _ in group), statistics.fmean(v / unit for _, v in group)) for group in groups]


def learning_rates(checkpoint: Checkpoint) -> Series:
    """The learning rates in the log beside a checkpoint. Never raises."""
    return read_history(checkpoint.path).learning_rates


def values_at(values: Series, steps: Sequence[int]) -> list[float | None]:
    """For each of these steps, the last value logged since the previous one and no later than the step itself.

    >>> values_at(((90, 2.0), (100, 1.9), (150, 1.8), (320, 1.5)), [100, 200, 300])
    [1.9, 1.8, None]
    """
    found: list[float | None] = []
    begin = 0
    for step in steps:
        end = bisect.bisect_right(values, step, key=lambda entry: entry[0])
        found.append(values[end - 1][1] if end > begin else None)
        begin = end
    return found


def _logged(state: Mapping[str, Any], key: str) -> list[tuple[int, Any]]:
    """The entries of a log under a key, each with its step."""
    history = state.get("log_history")
    entries = [each for each in history if isinstance(each, dict)] if isinstance(history, list) else []
    return [(each["step"], each.get(key)) for each in entries if type(each.get("step")) is int]


def goal_of(name: str) -> Goal | None:
    """Whether the least or the greatest value of a metric is best, by the words in its name; None if unknown.

    The last key of a dotted path is looked at first: the keys before it name a task.

    >>> goal_of("eval_loss"), goal_of("results.error_detection.acc,none"), goal_of("evalLoss")
    ('min', 'max', 'min')
    >>> goal_of("class"), goal_of("acc_stderr"), goal_of("brier_score"), goal_of("results.acc.value")
    (None, None, None, 'max')
    """
    goals: dict[str, Goal] = {"min": "min", "max": "max"}
    for key in reversed(name.split(".")):
        words = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower())
        found = [goal for goal, pattern in _GOALS.items() if pattern.search(words)]
        if found:
            return goals.get(found[0]) if len(found) == 1 else None
    return None
