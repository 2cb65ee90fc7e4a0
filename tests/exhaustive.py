"""Which of many alike are tried each time; the others are where everything is."""

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
