"""Which of many similar cases run each time; the others are marked as exhaustive."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def unless(is_typical: bool) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a case."""
    return () if is_typical else (pytest.mark.exhaustive,)


def all_but(kept: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values for a test, all but those kept marked as exhaustive."""
    return [pytest.param(value, marks=unless(value in kept)) for value in values]


def thinned(first: Iterable[Any], second: Iterable[Any], *, every: int = 3) -> list[Any]:
    """All pairs for a test of two arguments. Only one in `step` runs each time, chosen so that every value is tried."""
    seconds = list(second)
    return [
        pytest.param(one, other, marks=unless((row + column) % every == 0))
        for row, one in enumerate(first)
        for column, other in enumerate(seconds)
    ]


def few_or_all(few: int, everything: int) -> list[Any]:
    """How many examples a test draws."""
    return [few, pytest.param(everything, marks=unless(is_typical=False))]
