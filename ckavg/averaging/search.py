"""The search of `ckavg best`: which averages to try next, given the values of those tried so far. Pure.

`halving` spends half of the budget on a coarse grid over schemes, values and windows, the most different first. Then it
takes large steps from the best, to half and twice its value and its window; then one step from the best of each other
scheme, towards the age of the best; then small steps from the best, to its geometric mean with a neighbour. After that
it turns to the next best. `soup` is the greedy soup of Wortsman et al., Model soups, 2022, Recipe 1, of as many of the
newest checkpoints as the budget can judge and add.

Both begin with the last checkpoint, depend only on what was tried, and use no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckavg.checkpoints.trainer_log import Goal
from ckavg.schemes import Last, Scheme
from ckavg.schemes.parse import make_scheme

_FINEST = 1.1
"""Values that differ by less than this factor count as the same."""

_MANY = 16
"""With at least this many checkpoints, coarser intervals are tried too."""


@dataclass(frozen=True, slots=True)
class _Family:
    """A scheme as an axis of the search: its hyper-parameter, the coarse grid of values, and the bounds."""

    parameter: str
    values: tuple[float, ...]
    least: float
    most: float


_FAMILIES: Mapping[str, _Family | None] = {
    "mean": None,
    "ema": _Family("gamma", (0.2, 0.1), 0.01, 1.0),
    "pema": _Family("gamma", (0.15, 0.3), 0.01, 1.0),
    "power": _Family("sigma_rel", (0.1, 0.05), 0.01, 0.28),
    "bema": _Family("eta", (0.2, 0.4), 0.05, 2.0),
}
"""The first values are the defaults, except for EMA, whose 0.15 is too close to 0.2 and 0.1."""

LAST = "last"


@dataclass(frozen=True, slots=True)
class Candidate:
    """An average that may be tried.

    Attributes:
        scheme: its name.
        value: of the hyper-parameter; None if it has none.
        window: how many of the newest checkpoints it visits, without an anchor given with `init`; 0: all.
        stride: visit every n-th of them.
        soup: of a soup, the indices of the checkpoints to average uniformly, ascending; else empty.
    """

    scheme: str
    value: float | None = None
    window: int = 0
    stride: int = 1
    soup: tuple[int, ...] = ()

    def to_scheme(self, count: int) -> Scheme:
        """Its scheme, for a run that visits `count` checkpoints.

        >>> Candidate("ema", 0.2).to_scheme(9), Candidate("soup", soup=(0, 2)).to_scheme(3).weights
        (EMA(gamma=0.2, tau=1.0), '0.5,0.0,0.5')
        """
        if self.scheme == LAST:
            return Last()
        if self.soup:
            share = 1 / len(self.soup)
            return make_scheme("weights", {"weights": [share * (place in self.soup) for place in range(count)]})
        family = _FAMILIES[self.scheme]
        return make_scheme(self.scheme, {} if family is None else {family.parameter: self.value})


Tried = Mapping[Candidate, float | None]
"""The value of each candidate in the order tried; None if its evaluation failed."""

Ages = Mapping[Candidate, float]
"""The mean age of each, in optimizer steps."""


@dataclass(frozen=True, slots=True)
class Space:
    """What may be tried on a run.

    Attributes:
        count: number of its checkpoints, without an anchor given with `init`.
        strides: intervals to try besides 1, in checkpoints.
        windows: whether to try windows.
    """

    count: int
    strides: tuple[int, ...] = ()
    windows: bool = True


def ranked(tried: Tried, goal: Goal) -> list[Candidate]:
    """The candidates with a finite value, best first; of equal ones, the first one tried.

    >>> one, two, three = (Candidate("ema", value) for value in (0.1, 0.2, 0.3))
    >>> [each.value for each in ranked({one: 2.0, two: float("nan"), three: 1.0}, "min")]
    [0.3, 0.1]
    """
    sign = 1 if goal == "min" else -1
    valid = [(sign * value, each) for each, value in tried.items() if value is not None and math.isfinite(value)]
    return [each for _, each in sorted(valid, key=lambda pair: pair[0])]


def grid(space: Space) -> list[Candidate]:
    """The coarse grid, the most different first: all schemes with their first value, then other windows and values.

    >>> [(each.scheme, each.value, each.window) for each in grid(Space(8))[:7]]  # doctest: +NORMALIZE_WHITESPACE
    [('last', None, 0), ('mean', None, 0), ('ema', 0.2, 0), ('pema', 0.15, 0), ('power', 0.1, 0), ('bema', 0.2, 0),
     ('mean', None, 4)]
    """
    windows = [(0, 1)]
    if space.windows:
        windows += [(window, 1) for window in (space.count // 2, space.count // 4) if window > 1]
    if space.count >= _MANY:
        windows += [(0, stride) for stride in space.strides]
    places = [
        (by_value + by_window, Candidate(scheme, value, *window))
        for scheme, family in _FAMILIES.items()
        for by_value, value in enumerate(family.values if family else (None,))
        for by_window, window in enumerate(windows)
    ]
    return [Candidate(LAST), *(each for _, each in sorted(places, key=lambda place: place[0]))]


def next_by_halving(tried: Tried, goal: Goal, space: Space, left: int, ages: Ages) -> tuple[Candidate, ...]:
    """What to try next, at most `left`; empty when the search is over.

    >>> tried = {Candidate("last"): 2.0, Candidate("ema", 0.2): 1.0, Candidate("ema", 0.1): 3.0}
    >>> [(each.value, each.window) for each in next_by_halving(tried, "min", Space(8), 9, {})]
    [(0.4, 0), (0.2, 4)]
    """
    if not tried:
        return tuple(grid(space)[: left // 2 + 1])
    order = [each for each in ranked(tried, goal) if each.scheme != LAST]
    leaders = {each.scheme: each for each in reversed(order)}
    for steps in (
        *(_around(best, tried, space, large=True) for best in order[:1]),
        *(_towards(order[0], each, tried, ages) for each in order[1:] if each == leaders[each.scheme]),
        *(_around(best, tried, space, large=large) for best in order for large in (False, True)),
    ):
        if untried := tuple(each for each in steps if each not in tried):
            return untried[:left]
    return ()


def _towards(best: Candidate, other: Candidate, tried: Tried, ages: Ages) -> Iterator[Candidate]:
    """A step of another scheme towards the age of the best: the larger its value, the older an average.

    If the best is older, twice the greatest value tried of that scheme; if it is younger, half the least.
    """
    family, value = _FAMILIES[other.scheme], other.value
    if family is None or value is None:
        return
    values = [each.value for each in tried if each.scheme == other.scheme and each.value is not None]
    older = ages.get(best, 0.0) - ages.get(other, 0.0)
    if older < 0 and value == min(values) > family.least:
        yield replace(other, value=max(value / 2, family.least))
    if older > 0 and value == max(values) < family.most:
        yield replace(other, value=min(value * 2, family.most))


def _around(best: Candidate, tried: Tried, space: Space, *, large: bool) -> Iterator[Candidate]:
    """The neighbours of a candidate by its value, then by its window, at a large step or a small one."""
    family = _FAMILIES[best.scheme]
    if family is not None and best.value is not None:
        values = [each.value for each in tried if each.value and replace(each, value=best.value) == best]
        for value in _between(best.value, values, family.least, family.most, large=large):
            if not any(max(value, each) / min(value, each) < _FINEST for each in values):
                yield replace(best, value=float(f"{value:.3g}"))
    if space.windows and best.stride == 1:
        windows = [each.window or space.count for each in tried if replace(each, window=best.window) == best]
        for window in _between(best.window or space.count, windows, 2, space.count, large=large):
            yield replace(best, window=round(window) % space.count)


def _between(best: float, others: Sequence[float], least: float, most: float, *, large: bool) -> Iterator[float]:
    """On each side of a value: its half or double if it has no neighbour, else its geometric mean with the neighbour.

    >>> list(_between(4, [1, 4], 1, 6, large=True)), list(_between(4, [1, 4], 1, 6, large=False))
    ([6], [2.0])
    """
    below = max((each for each in others if each < best), default=None)
    above = min((each for each in others if each > best), default=None)
    for neighbour, step, bound in ((below, max(best / 2, least), least), (above, min(best * 2, most), most)):
        if neighbour is not None and not large:
            yield math.sqrt(neighbour * best)
        elif neighbour is None and large and best != bound:
            yield step


def next_in_soup(tried: Tried, goal: Goal, space: Space, left: int, ages: Ages) -> tuple[Candidate, ...]:
    """What to try next in a greedy soup, at most `left`: each checkpoint alone, then one soup after another.

    >>> [each.soup or each.scheme for each in next_in_soup({}, "min", Space(9), 4, {})]
    ['last', (7,)]
    """
    last = space.count - 1
    if not tried:
        newest = range(last, max(last - (left + 1) // 2, -1), -1)
        return tuple(_soup((place,), last) for place in newest)
    valid = {each: each.soup or (last,) for each in ranked(tried, goal)}
    alone = [soup for soup in valid.values() if len(soup) == 1]
    kept: tuple[int, ...] = alone[0] if alone else ()
    for added in alone[1:]:
        wider = _soup(tuple(sorted((*kept, *added))), last)
        if wider not in tried:
            return (wider,)[:left]
        if wider in valid and not _is_worse(tried[wider], tried[_soup(kept, last)], goal):
            kept = wider.soup
    return ()


def _soup(places: tuple[int, ...], last: int) -> Candidate:
    return Candidate(LAST) if places == (last,) else Candidate("soup", soup=places)


def _is_worse(value: float | None, other: float | None, goal: Goal) -> bool:
    if value is None or other is None:
        return value is None
    return value > other if goal == "min" else value < other
