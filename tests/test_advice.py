"""What an expert would say, and when."""

from __future__ import annotations

import pytest

from ckavg import advice
from ckavg.path.table import PathLength, TensorPath
from ckavg.schemes import BEMA, Last, Timeline


def path(*distances: float) -> PathLength:
    """A path of one tensor of 10 elements with σ = 1."""
    steps = tuple(range(0, 100 * len(distances) + 1, 100))
    return PathLength(steps, {"w": TensorPath(10, 1.0, distances)}, "exclude", 0)


@pytest.mark.parametrize(
    ("distances", "told"),
    [
        ((0.5, 0.5), "The path is short: ℓ(T) = 0.1"),
        ((5.0, 5.0), ""),
        ((1.0, 1.0), ""),
        ((20.0, 20.0), ""),
        ((30.0, 30.0), "The path is long: ℓ(T) = 6"),
        ((5.0, 0.0, 5.0), "Steps 100 and 200 hold identical weights"),
        ((0.0, 0.0), "Nothing moved"),
    ],
)
def test_path(distances: tuple[float, ...], told: str) -> None:
    said = advice.about_path(path(*distances), ())
    assert len(said) == bool(told)
    assert not told or said[0].startswith(told)


def test_nothing_counts() -> None:
    empty = PathLength((0, 1), {"w": TensorPath(10, 0.0, (1.0,))}, "exclude", 0)
    assert [line.split(",")[0] for line in advice.about_path(empty, ("b",))] == [
        "No spread at the anchor (σ = 0)",
        "Left out of the path length: 1 tensor (b).",
        "No tensor counts in the path length",
    ]


@pytest.mark.parametrize(("step", "with_init", "said"), [(0, False, 0), (400, False, 1), (400, True, 0)])
def test_anchor(step: int, with_init: bool, said: int) -> None:
    assert len(advice.about_anchor(step, with_init=with_init)) == said


def test_an_average_that_ends_where_it_begins() -> None:
    steps = (0, 100, 200)
    late, last = BEMA(burn_in=150), Last()
    assert len(advice.about_coefficients(late, late.coefficients(Timeline(steps)), steps)) == 1
    assert advice.about_coefficients(last, last.coefficients(Timeline(steps)), steps) == ()
