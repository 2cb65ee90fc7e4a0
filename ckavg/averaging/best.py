"""`ckavg best`: form, judge and remove averages round by round, then form the winner at its output path.

`averaging/search.py` decides what to try next. The winner's value is the best of many, and therefore optimistic: it is
compared with that of the last checkpoint and, by `confirm`, on other data.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ckavg.averaging.evaluation import record_evaluation
from ckavg.averaging.pipeline import Done, carry_out
from ckavg.averaging.plan import Options, Plan, plan_averages, result_name
from ckavg.averaging.search import LAST, Candidate, Space, next_by_halving, next_in_soup, ranked
from ckavg.averaging.sources import opened
from ckavg.checkpoints.run import Run
from ckavg.checkpoints.trainer_log import Goal
from ckavg.engine.context import Context, OnProgress, listening
from ckavg.errors import EvaluationError, SettingError, WriteError, short_repr
from ckavg.output.output_path import path_within, remove
from ckavg.output.record import Evaluation, Record
from ckavg.output.upload import Target, place_here
from ckavg.schemes import Scheme
from ckavg.storage.address import AddressPath
from ckavg.storage.atomic import resolved
from ckavg.storage.base import AnyPath

Strategy = Literal["halving", "soup"]
_STRATEGIES = {"halving": next_by_halving, "soup": next_in_soup}

Standing = Literal["better", "level", "unknown", "last"]
"""How the winner compares with the last checkpoint: better beyond the noise; within the noise; unknown, since the noise
or the value of the last checkpoint is not known; or it is the last checkpoint.
"""

Judge = Callable[[Record, Plan], Evaluation]
"""Evaluates a result; the evaluation may have no value."""

Form = Callable[[Sequence[Plan]], Done]
"""Carries out plans in one reading."""

_SAME = 0.01
"""Averages that differ by less than this fraction of the weight count as one and are evaluated once."""

_STRIDES = (2, 4)

NAME, SCRATCH = "best", ".ckavg-best-"
"""The name of the result; the prefix of the directory beside it that holds a round."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One average that was tried.

    Attributes:
        name: the name of its result; of a soup, its steps.
        round: the round that tried it, from 1.
        record: of its result, whose files are removed.
        evaluation: its evaluation.
        same_as: the name of the average whose evaluation it shares, because the weights are almost the same; or empty.
    """

    name: str
    round: int
    record: Record
    evaluation: Evaluation
    same_as: str = ""

    @property
    def value(self) -> float | None:
        """The value of the metric; None if the evaluation failed."""
        return self.evaluation.value


Contestants = dict[Candidate, Contestant]
"""In the order in which they were tried."""


@dataclass(frozen=True, slots=True)
class Best:
    """The outcome of a search.

    Attributes:
        record: of the result, with its evaluation.
        contestants: all that were tried, in order; the last checkpoint first.
        winner: the index of the best.
        goal: whether the least or the greatest value is best.
        confirmed: the second evaluation of the winner and of the last checkpoint; None without one.
        target: the address that the result has yet to be uploaded to; None if it stays here or is there already.
    """

    record: Record
    contestants: tuple[Contestant, ...]
    winner: int
    goal: Goal
    confirmed: tuple[Evaluation, Evaluation] | None = None
    target: Target | None = None

    __repr__ = short_repr

    @property
    def evaluated(self) -> int:
        """How many averages were evaluated."""
        return _evaluated(self.contestants)

    @property
    def standing(self) -> Standing:
        """How the winner compares with the last checkpoint."""
        best, last = self.contestants[self.winner], self.contestants[0]
        if self.winner == 0:
            return "last"
        errors = [each.evaluation.stderr for each in (best, last) if each.evaluation.stderr is not None]
        if best.value is None or last.value is None or not errors:
            return "unknown"
        return "level" if abs(best.value - last.value) <= max(errors) else "better"

    @property
    def beats_last(self) -> bool:
        """Whether the winner is known to be better than the last checkpoint, also by `confirmed` if there is one."""
        if self.standing not in ("better", "unknown") or self.contestants[0].value is None:
            return False
        if self.confirmed is None:
            return True
        best, last = (each.value for each in self.confirmed)
        return best is not None and last is not None and (best < last if self.goal == "min" else best > last)

    @property
    def reason(self) -> str:
        """Why the winner won, in words."""
        best, last = self.contestants[self.winner], self.contestants[0]
        if self.standing == "last":
            return "No average is better than the last checkpoint, which is the result."
        if last.value is None:
            return f"{best.name} is the best of those with a value; the last checkpoint has none to compare with."
        text = f"{best.name} is better than the last checkpoint by {abs((best.value or 0.0) - last.value):.2g}"
        return {
            "better": f"{text}, which is more than the standard error.",
            "level": f"{text}, which is within the standard error: it is level with the last checkpoint, and no "
            "average is shown to be better.",
        }.get(self.standing, f"{text}. Without a standard error, this may be noise.")

    def to_dict(self) -> dict[str, Any]:
        """The search as plain JSON values, without the record of the result."""
        values: dict[str, Any] = {
            "winner": self.contestants[self.winner].name,
            "standing": self.standing,
            "reason": self.reason,
            "evaluated": self.evaluated,
            "contestants": [
                {
                    "name": each.name,
                    "round": each.round,
                    "value": each.value,
                    "stderr": each.evaluation.stderr,
                    "problem": each.evaluation.problem,
                    "same_as": each.same_as,
                    "effective_count": each.record.effective_count,
                    "anchor_weight": each.record.anchor_weight,
                }
                for each in self.contestants
            ],
        }
        if self.confirmed is not None:
            winner, last = map(dataclasses.asdict, self.confirmed)
            values["confirmed"] = {"best": winner, "last": last}
        return values


def best(
    run: Run | AnyPath | str,
    evaluate: Callable[[Path], float | tuple[float, float]],
    *,
    goal: Goal,
    budget: int = 12,
    strategy: Strategy = "halving",
    confirm: Callable[[Path], float | tuple[float, float]] | None = None,
    out: Path | str | None = None,
    device: str = "auto",
    progress: bool | OnProgress = False,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Best:
    """Search schemes, hyper-parameters and windows for the average with the best value of an evaluation.

    Args:
        run: the checkpoints, the anchor first.
        evaluate: takes the directory of a model; returns its value, or the value and its standard error; NaN: no value.
        goal: `min` or `max`: whether the least or the greatest value is best.
        budget: how often `evaluate` may be called, 2 or more.
        strategy: `halving` or `soup`; see `averaging/search.py`.
        confirm: evaluates the winner and the last checkpoint once more, on other data.
        out: where the result goes, see `average`; None: `<source>/averaged/best`. If the last checkpoint wins, it is
            the result.
        device, progress, on_progress: see `average`.
        options: see `Options`.

    Raises:
        EvaluationError: no average has a value.
        CkavgError: see `average`.
    """
    run = opened(run)
    search = Search(
        run=run,
        goal=goal,
        budget=budget,
        strategy=strategy,
        out=Path(out) if out is not None else path_within(run.home, "averaged", NAME),
        options=Options(**options),
    )
    with listening(progress or on_progress or False) as listener:
        context = Context(device=device, on_progress=listener)
        found = search.carry_out(
            lambda plans: carry_out(plans, context),
            judged_by(evaluate, goal),
            None if confirm is None else judged_by(confirm, goal),
        )
        if found.target is None:
            return found
        record = found.target.send(found.record, listener)
    found.target.discard()
    return dataclasses.replace(found, record=record)


def judged_by(function: Callable[[Path], float | tuple[float, float]], goal: Goal) -> Judge:
    """A judge from a function that takes the directory of a model; see `evaluate` of `best`."""
    name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}({{dir}})"

    def judge(record: Record, _: Plan) -> Evaluation:
        found = function(record.directory)
        value, stderr = found if isinstance(found, tuple) else (found, None)
        known = stderr if stderr is not None and 0 <= stderr < math.inf else None
        if not math.isfinite(value):
            return Evaluation(name, None, f"it is {value}", goal=goal)
        return Evaluation(name, float(value), stderr=known, goal=goal)

    return judge


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search, and where its result goes.

    Attributes:
        run, goal, budget, strategy, out: see `best`.
        options: of every average.

    Raises:
        SettingError: one of them is not valid.
    """

    run: Run
    goal: Goal
    budget: int
    strategy: Strategy
    out: Path
    options: Options

    def __post_init__(self) -> None:
        if self.budget < 2:
            raise SettingError(
                f"budget is {self.budget}; it must be 2 or more evaluations.",
                hint="The last checkpoint takes one of them.",
            )
        for name, choices in (("goal", ("min", "max")), ("strategy", tuple(_STRATEGIES))):
            if getattr(self, name) not in choices:
                raise SettingError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(choices)}.")

    def plan_result(self) -> Plan:
        """The plan of the result if the last checkpoint wins; any other winner has the same size and output path."""
        return self._plans([(Candidate(LAST), self.out)])[0]

    def plan_round(self, contestants: Contestants, directory: Path) -> dict[Candidate, Plan]:
        """The plans to try next, each in its own directory below `directory`; empty when the search is over."""
        left = self.budget - _evaluated(contestants.values())
        tried = {candidate: each.value for candidate, each in contestants.items()}
        ages = {candidate: each.record.mean_age or 0.0 for candidate, each in contestants.items()}
        candidates = _STRATEGIES[self.strategy](tried, self.goal, space_of(self.run), left, ages) if left else ()
        wanted = []
        for candidate in candidates:
            run, scheme = self._recipe(candidate)
            name = result_name(scheme, run.selection, self.options.lora, self.options.rank)
            wanted.append((candidate, directory / name))
        return dict(zip(candidates, self._plans(wanted), strict=True)) if wanted else {}

    def carry_out(self, form: Form, judge: Judge, confirm: Judge | None = None) -> Best:
        """Search, and form the winner at its output path.

        Args:
            form: forms averages.
            judge, confirm: evaluate them.
        """
        target = self.plan_result().target
        if target is None:
            return self._carry_out(form, judge, confirm, None)
        target.begin()
        try:
            return self._carry_out(form, judge, confirm, target)
        except BaseException:
            target.release()
            raise

    def _carry_out(self, form: Form, judge: Judge, confirm: Judge | None, target: Target | None) -> Best:
        contestants = self._contest(form, judge)
        order = ranked({candidate: each.value for candidate, each in contestants.items()}, self.goal)
        if not order:
            problem = next(iter(contestants.values())).evaluation.problem
            raise EvaluationError(f"No evaluation succeeded. The first problem: {problem}.", hint="There is no result.")
        winner = order[0]
        confirmed = None if confirm is None else self._confirmed(winner, form, confirm)
        plans = self._plans([(winner, target or self.out)], plot=self.options.plot)
        chosen = dataclasses.replace(contestants[winner].evaluation, best_of=_evaluated(contestants.values()))
        if winner.scheme != LAST and (last := contestants.get(Candidate(LAST))) is not None:
            chosen = dataclasses.replace(chosen, last_value=last.value, last_stderr=last.evaluation.stderr)
        record = record_evaluation(form(plans).records[0], chosen, plans[0])
        to_send = None if isinstance(record.directory, AddressPath) else target
        return Best(record, tuple(contestants.values()), [*contestants].index(winner), self.goal, confirmed, to_send)

    def _contest(self, form: Form, judge: Judge) -> Contestants:
        """Try round after round until the budget is spent or nothing is left to try."""
        contestants: Contestants = {}
        for number in itertools.count(1):
            with _scratch(place_here(self.out)) as scratch:
                plans = self.plan_round(contestants, scratch)
                if not plans:
                    break
                records = form([*plans.values()]).records
                for (candidate, plan), record in zip(plans.items(), records, strict=True):
                    contestants[candidate] = _judged(candidate, number, record, plan, contestants, judge)
                    remove(record.directory)
        return contestants

    def _confirmed(self, winner: Candidate, form: Form, confirm: Judge) -> tuple[Evaluation, Evaluation]:
        """Evaluate the winner and the last checkpoint with `confirm`."""
        with _scratch(place_here(self.out)) as scratch:
            plans = self._plans([(each, scratch / each.scheme) for each in dict.fromkeys((winner, Candidate(LAST)))])
            found = [confirm(record, plan) for record, plan in zip(form(plans).records, plans, strict=True)]
        return found[0], found[-1]

    def _plans(self, wanted: Sequence[tuple[Candidate, Path | Target]], *, plot: bool = False) -> list[Plan]:
        # The evaluation judges an average that is almost its anchor, too.
        options = dataclasses.replace(self.options, allow_anchor=True, plot=plot)
        return plan_averages([(*self._recipe(candidate), place) for candidate, place in wanted], options)

    def _recipe(self, candidate: Candidate) -> tuple[Run, Scheme]:
        """The run that a candidate visits, as options of selection would choose it, and its scheme."""
        run, selection = self.run, self.run.selection
        anchors, own = run.checkpoints[: run.anchor_is_init], run.checkpoints[run.anchor_is_init :]
        if candidate.window:
            own = own[-candidate.window :]
            if selection.every is None:
                selection = dataclasses.replace(selection, last=candidate.window)
            else:  # `last` would count the anchor
                selection = dataclasses.replace(selection, from_step=own[0].step)
        if candidate.stride > 1:
            first, second = (each.step for each in (*anchors, *own)[:2])
            every = candidate.stride * (second - first)
            own = tuple(each for each in own if (each.step - first) % every == 0)
            selection = dataclasses.replace(selection, every=every)
        if selection != run.selection:
            run = dataclasses.replace(run, selection=selection, checkpoints=(*anchors, *own))
        soup = tuple(place + len(anchors) for place in candidate.soup)
        return run, dataclasses.replace(candidate, soup=soup).to_scheme(len(run.checkpoints))


def _evaluated(contestants: Iterable[Contestant]) -> int:
    """How many contestants were evaluated."""
    return sum(not each.same_as for each in contestants)


def _judged(
    candidate: Candidate, number: int, record: Record, plan: Plan, before: Contestants, judge: Judge
) -> Contestant:
    """A contestant with its evaluation, or with that of an earlier one that has almost the same weights."""
    name = record.output.name
    if candidate.soup:
        steps = [str(step) for step, weight in zip(record.steps, record.weights, strict=True) if weight]
        name = f"{'soup of steps' if len(steps) > 1 else 'step'} {', '.join(steps)}"
    for each in before.values():
        if not each.same_as and distance(each.record, record) < _SAME:
            return Contestant(name, number, record, each.evaluation, each.name)
    return Contestant(name, number, record, judge(record, plan))


def distance(one: Record, other: Record) -> float:
    """The fraction of the weight by which two averages differ: ½ Σ |w − v|."""
    weights, others = (dict(zip(each.steps, each.weights, strict=True)) for each in (one, other))
    steps = weights.keys() | others.keys()
    return math.fsum(abs(weights.get(step, 0.0) - others.get(step, 0.0)) for step in steps) / 2


def space_of(run: Run) -> Space:
    """What may be tried on a run, besides what its options of selection fix already."""
    chosen, steps = run.selection, run.steps
    is_even = len({after - before for before, after in itertools.pairwise(steps)}) == 1
    strides = tuple(
        stride for stride in _STRIDES if is_even and chosen.every is None and (len(steps) - 1) % stride == 0
    )
    # A window may have other common tensors, and other best checkpoints, than the whole run.
    windows = not chosen.common_only and (chosen.best is None or chosen.every is None)
    return Space(len(steps) - run.anchor_is_init, strides, windows)


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """A temporary directory beside a result; removed at the end, with any parents that were made for it."""
    parent = resolved(place).parent
    made = [each for each in (parent, *parent.parents) if not each.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
    except OSError as error:
        raise WriteError(f"{parent} cannot be written: {error.strerror}.", hint="Choose another place.") from error
    try:
        yield scratch
    except BaseException as error:
        # The directory is removed, so a note that finished blocks are kept in it would be wrong.
        error.__notes__ = [note for note in getattr(error, "__notes__", ()) if scratch.name not in note]
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for each in made:
            with suppress(OSError):
                each.rmdir()
