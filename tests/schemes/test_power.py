"""The power-function EMA of EDM2: exponent and width, and the weights of any steps, against their closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckavg.averaging.rules import effective_weights
from ckavg.errors import SettingError
from ckavg.schemes import PowerEMA, PowerExponentEMA, Timeline
from ckavg.schemes.power import exponent_of

STEPS = st.lists(st.integers(0, 10**6), min_size=2, max_size=20, unique=True).map(sorted)


def closed(steps: Sequence[int], exponent: float) -> list[float]:
    """The integral of t^γ between two checkpoints, as a part of all of it; the anchor has what lies before it."""
    parts = [(step / steps[-1]) ** (exponent + 1) for step in steps]
    return [parts[0], *(after - before for before, after in itertools.pairwise(parts))]


@pytest.mark.parametrize(("width", "exponent"), [(0.05, 16.9722), (0.10, 6.9372), (0.15, 3.5579)])
def test_exponent_of_a_width(width: float, exponent: float) -> None:
    assert exponent_of(width) == pytest.approx(exponent, rel=0, abs=5e-5)


@given(width=st.floats(1e-6, 0.2886))
def test_there_and_back(width: float) -> None:
    gamma = exponent_of(width)
    assert gamma > 0
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(width, rel=1e-12)


@given(steps=STEPS, exponent=st.floats(0, 30))
def test_weights_to_1e_9(steps: list[int], exponent: float) -> None:
    weights = effective_weights(PowerExponentEMA(exponent=exponent).coefficients(Timeline(tuple(steps))))
    assert weights == pytest.approx(closed(steps, exponent), rel=0, abs=1e-9)


@pytest.mark.parametrize(("asked", "realised"), [(0.05, 0.0477), (0.10, 0.0990), (0.15, 0.1494)])
def test_realised_width_at_18_equal_intervals(asked: float, realised: float) -> None:
    steps = tuple(range(0, 1801, 100))
    weights = effective_weights(PowerEMA(sigma_rel=asked).coefficients(Timeline(steps)))
    mean = math.fsum(weight * step for weight, step in zip(weights, steps, strict=True))
    variance = math.fsum(weight * (step - mean) ** 2 for weight, step in zip(weights, steps, strict=True))
    assert math.sqrt(variance) / 1800 == pytest.approx(realised, rel=0, abs=6e-5)  # the last is 0.14945
    assert weights[0] == 0


@pytest.mark.parametrize("width", [0.0, -0.1, 0.2887, math.nan, math.inf])
def test_widths_that_no_exponent_has(width: float) -> None:
    with pytest.raises(SettingError):
        PowerEMA(sigma_rel=width)
