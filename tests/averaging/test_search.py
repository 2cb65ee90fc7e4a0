"""What the search of `ckavg best` tries next, against objectives whose optimum is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest

from ckavg.averaging.search import Candidate, Space, grid, next_by_halving, next_in_soup, ranked
from ckavg.checkpoints.trainer_log import Goal

LAST = Candidate("last")
SPACE = Space(40, strides=(2, 4))
Objective = Callable[[Candidate], float | None]


def searched(
    objective: Objective, budget: int, space: Space = SPACE, goal: Goal = "min", following: object = next_by_halving
) -> dict[Candidate, float | None]:
    """All that a search tries, in order; what it asks for is checked on the way."""
    tried: dict[Candidate, float | None] = {}
    assert callable(following)
    while len(tried) < budget:
        candidates = following(tried, goal, space, budget - len(tried), {each: age(each) for each in tried})
        assert len(set(candidates)) == len(candidates) <= budget - len(tried)
        assert not tried.keys() & set(candidates)
        if not candidates:
            break
        tried |= {each: objective(each) for each in candidates}
    return tried


def age(candidate: Candidate) -> float:
    """The larger a value and a window, the older an average."""
    return (candidate.window or SPACE.count) * (1.0 if candidate.scheme == "mean" else candidate.value or 0.0)


def parabola(scheme: str, optimum: float) -> Objective:
    """Quadratic in the logarithm of the value of one scheme; everything else is worse."""

    def objective(candidate: Candidate) -> float:
        if candidate.scheme != scheme or candidate.value is None:
            return 100.0
        return math.log(candidate.value / optimum) ** 2 + (candidate.window > 0) + (candidate.stride > 1)

    return objective


@pytest.mark.parametrize("scheme", ["ema", "pema", "power", "bema"])
@pytest.mark.parametrize("optimum", [0.06, 0.13, 0.24])
def test_it_finds_the_value_of_a_parabola(scheme: str, optimum: float) -> None:
    tried = searched(parabola(scheme, optimum), 20)
    found = ranked(tried, "min")[0]
    assert found.scheme == scheme
    assert found.value is not None
    assert abs(math.log(found.value / optimum)) < 0.2


@pytest.mark.parametrize("optimum", [3, 9, 14, 27])
def test_it_finds_the_window_of_a_mean(optimum: int) -> None:
    def objective(candidate: Candidate) -> float:
        window = candidate.window or SPACE.count
        return math.log(window / optimum) ** 2 + (candidate.scheme != "mean") + (candidate.stride > 1)

    found = ranked(searched(objective, 20), "min")[0]
    assert found.scheme == "mean"
    assert abs(math.log(found.window / optimum)) < 0.25


def test_a_best_value_beyond_the_bounds_ends_at_them() -> None:
    def rising(candidate: Candidate) -> float:
        return -(candidate.value or 0.0) if candidate.scheme == "ema" else 1.0

    values = [each.value for each in searched(rising, 40) if each.scheme == "ema" and each.value is not None]
    assert max(values) == 1.0

    def falling(candidate: Candidate) -> float:
        return (candidate.value or 0.0) if candidate.scheme == "ema" else 2.0

    values = [each.value for each in searched(falling, 40) if each.scheme == "ema" and each.value is not None]
    assert min(values) == 0.01


def test_other_schemes_take_large_steps_towards_the_age_of_the_best_before_it_takes_small_ones() -> None:
    """A scheme whose first value is far off still gets its chance, even if it is behind on the way."""

    def objective(candidate: Candidate) -> float:
        if candidate.scheme == "mean":
            return 1.0 + (candidate.window > 0)
        away = abs(math.log((candidate.value or 1.0) / 0.8)) if candidate.scheme == "ema" else 9.0
        return 0.5 + away + (candidate.window > 0) + (candidate.stride > 1)

    tried = searched(objective, 14)
    found = ranked(tried, "min")[0]
    assert (found.scheme, found.value) == ("ema", 0.8)
    assert not any(each.scheme == "ema" and (each.value or 1) < 0.2 for each in tried)


def noisy(candidate: Candidate) -> float | None:
    """The same value for the same candidate in any order; some fail, some are not finite."""
    drawn = random.Random(repr(candidate))
    return drawn.choice([drawn.gauss(0, 1), drawn.gauss(0, 1), None, math.nan, math.inf])


def budgets() -> Iterator[int]:
    yield from (2, 3, 5, 8, 12, 13, 30, 200)


@pytest.mark.parametrize("budget", budgets())
@pytest.mark.parametrize("space", [SPACE, Space(2), Space(1), Space(5, windows=False)], ids=str)
@pytest.mark.parametrize("following", [next_by_halving, next_in_soup])
def test_a_budget_is_never_exceeded_and_windows_are_of_the_run(budget: int, space: Space, following: object) -> None:
    tried = searched(noisy, budget, space, following=following)
    assert next(iter(tried)) == LAST
    assert len(tried) <= budget
    for each in tried:
        assert each.window == 0 or (space.windows and 2 <= each.window < space.count)
        assert each.stride == 1 or each.stride in space.strides
        assert all(0 <= place < space.count for place in each.soup)
    best = ranked(tried, "min")
    valid = [value for value in tried.values() if value is not None and math.isfinite(value)]
    assert (tried[best[0]] if best else None) == min(valid, default=None)


def test_what_is_greatest_is_sought_likewise() -> None:
    objective = parabola("ema", 0.13)
    least, most = searched(objective, 20), searched(lambda each: -(objective(each) or 0.0), 20, goal="max")
    assert list(least) == list(most)


def test_around_the_last_checkpoint_there_is_nothing_so_the_next_best_has_its_turn() -> None:
    worth = {"last": 0.0, "ema": 1.0}
    tried = searched(lambda each: worth.get(each.scheme, 2.0), 12)
    assert len(tried) == 12
    assert [each.scheme for each in list(tried)[7:9]] == ["ema", "ema"]


def test_of_equal_ones_the_last_checkpoint_is_best() -> None:
    assert ranked(searched(lambda _: 1.0, 12), "max")[0] == LAST


def test_where_all_fail_there_is_no_best_and_no_next() -> None:
    tried = searched(lambda _: None, 12)
    assert tried.keys() == set(grid(SPACE)[:7])
    assert ranked(tried, "min") == []


def test_the_grid_has_every_scheme_first_and_coarse_intervals_only_where_there_are_many() -> None:
    first = grid(SPACE)[:6]
    assert [each.scheme for each in first] == ["last", "mean", "ema", "pema", "power", "bema"]
    assert {each.window for each in grid(SPACE)} == {0, 20, 10}
    assert {each.stride for each in grid(SPACE)} == {1, 2, 4}
    assert {each.stride for each in grid(Space(15, strides=(2,)))} == {1}
    assert {each.window for each in grid(Space(3))} == {0}


def souped(losses: list[float | None], of_soup: Callable[[tuple[int, ...]], float], budget: int) -> list[Candidate]:
    last = len(losses) - 1

    def objective(candidate: Candidate) -> float | None:
        places = candidate.soup or (last,)
        return losses[places[0]] if len(places) == 1 else of_soup(places)

    return list(searched(objective, budget, Space(len(losses)), following=next_in_soup))


def test_a_soup_takes_checkpoints_by_their_metric_and_keeps_what_does_not_hurt() -> None:
    """By hand: 2 is best, then 0, 3, 1. With 0 it is as good, with 3 worse, with 1 better."""
    values = {(0, 2): 1.0, (0, 2, 3): 2.0, (0, 1, 2): 0.5}
    tried = souped([1.5, 4.0, 1.0, 3.0], lambda places: values[places], 10)
    assert [each.soup for each in tried] == [(), (2,), (1,), (0,), (0, 2), (0, 2, 3), (0, 1, 2)]


def test_a_soup_is_of_the_newest_as_far_as_the_budget_goes_and_without_what_failed() -> None:
    tried = souped([0.1, 0.2, None, 1.0, 2.0], lambda _: 3.0, 6)
    assert [each.soup for each in tried] == [(), (3,), (2,), (3, 4)]
