"""The schedules that schemes share: α and β as powers of the absolute optimizer step, and what powers leave of 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckavg.schemes.base import Timeline, require


def step_ages(timeline: Timeline, start: int, *, lag: float, multiplier: float) -> list[float]:
    """ρ + γ t_k of every checkpoint after `start`; t_k is the absolute optimizer step.

    Raises:
        SettingError: it falls below 1, so that a power of it could exceed 1.
    """
    ages = [lag + multiplier * step for step in timeline.steps[start + 1 :]]
    require(
        all(age >= 1 for age in ages),
        f"lag + multiplier × step falls to {min(ages, default=1):g}; it must be at least 1.",
        hint="Raise --lag, or make --multiplier positive.",
    )
    return ages


def falling(ages: Sequence[float], power: float) -> list[float]:
    """age^(−power) of every age; nothing at all for an infinite power, whatever the age.

    >>> falling([1.0, 4.0], 0.5), falling([1.0, 4.0], math.inf)
    ([1.0, 0.5], [0.0, 0.0])
    """
    return [0.0 if power == math.inf else age**-power for age in ages]


def less_than_1(base: float, power: float) -> float:
    """1 − base^power, to the last bits also where base^power is almost 1.

    Args:
        base: in [0, 1], or at least 1 with a negative power.
        power: positive for a base below 1.

    >>> less_than_1(0.5, 2.0), less_than_1(0.5, 2e-20), less_than_1(0.0, 1.0)
    (0.75, 1.3862943611198905e-20, 1.0)
    """
    result = base**power
    return 1 - result if result <= 0.5 else -math.expm1(power * math.log(base))
