"""1 minus a power close to 1, compared with 60 decimal digits."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckavg.schemes import OUEMA, MomentumEMA, Timeline


def left(base: float, power: Decimal) -> Decimal:
    """1 − base^power."""
    with localcontext(prec=60):
        return 1 - Decimal(base) ** power


def relative_error(got: float | None, want: Decimal) -> float:
    assert got is not None
    return float(abs(Decimal(got) / want - 1))


@given(
    away=st.floats(2.0**-52, 0.999),
    scale=st.floats(1e-18, 8),
    gap=st.integers(1, 10**6),
)
def test_beta_of_a_momentum(away: float, scale: float, gap: int) -> None:
    momentum = 1 - away
    (_, beta) = MomentumEMA(momentum=momentum, batch_scale=scale).coefficients(Timeline((0, gap))).betas
    assert relative_error(beta, left(momentum, Decimal(scale) * gap)) < 1e-13


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-12, 1e-30])
def test_a_momentum_that_a_small_batch_takes_to_1(scale: float) -> None:
    """ρ^κ is 1 in float64: the average would stay at the anchor."""
    scheme = MomentumEMA(momentum=0.9999999999999, batch_scale=scale, momentum_per="update")
    assert relative_error(scheme.coefficients(Timeline((0, 7))).betas[1], left(scheme.momentum, Decimal(scale))) < 1e-13


@given(eta=st.floats(1e-20, 3), step=st.integers(0, 10**7), lag=st.floats(1.0000001, 100))
def test_what_the_correction_of_ouema_divides_by(eta: float, step: int, lag: float) -> None:
    coefficients = OUEMA(eta=eta, lag=lag).coefficients(Timeline((0, step + 1)))
    want = left(lag + step + 1, -Decimal(eta))
    assert relative_error(coefficients.complement(1), want) < 1e-14
