"""Which of many alike are tried each time; the others are where everything is."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def all_but(kept: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values for a test, all but those kept marked as exhaustive."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.exhaustive) for value in values]
