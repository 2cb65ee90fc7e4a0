"""Properties of every average: it is affine, its weights sum to 1, and constant weights stay constant."""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckavg.averaging.rules import RULES, effective_weights
from ckavg.schemes import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    PEMA,
    SCHEMES,
    Coefficients,
    Last,
    Mean,
    MomentumEMA,
    PowerEMA,
    PowerExponentEMA,
    Scheme,
    Timeline,
    Weights,
)
from ckavg.schemes.base import Rule

POWERS = st.floats(0, 2)
GAPS = st.lists(st.integers(1, 5000), min_size=1, max_size=20)
FACTORS = st.lists(st.floats(1e-6, 1), min_size=1, max_size=20)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    gaps = draw(GAPS)
    moves = draw(st.lists(st.floats(0, 1), min_size=len(gaps), max_size=len(gaps)))
    first = draw(st.integers(0, 10_000))
    steps = tuple(first + passed for passed in accumulate(gaps, initial=0))
    return Timeline(steps, tuple(accumulate(moves, initial=0.0)))


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    drawn: Scheme = draw(
        st.one_of(
            st.builds(EMA, gamma=POWERS, tau=st.floats(1, 100)),
            st.builds(MomentumEMA, momentum=st.floats(0, 0.999), batch_scale=st.floats(0.1, 8)),
            st.builds(
                PEMA,
                gamma=POWERS,
                pairing=st.sampled_from(("same", "next")),
                clock=st.sampled_from(("steps", "updates")),
            ),
            st.builds(
                BEMA,
                eta=POWERS | st.just(math.inf),
                kappa=POWERS,
                multiplier=st.floats(0, 3),
                lag=st.floats(1, 100),
                form=st.sampled_from(("paper", "author")),
            ),
            st.builds(OUEMA, eta=st.floats(0.1, 2), kappa=POWERS, multiplier=st.floats(0, 3), lag=st.floats(2, 100)),
            st.builds(DEMA, kappa=POWERS, multiplier=st.floats(0, 3), lag=st.floats(1, 100)),
            st.builds(PowerEMA, sigma_rel=st.floats(0.01, 0.288)),
            st.builds(PowerExponentEMA, exponent=st.floats(0, 30)),
            st.builds(Mean, decay=st.sampled_from(("none", "linear", "cosine", "minus-sqrt"))),
            st.just(Last()),
        )
    )
    return drawn


@st.composite
def coefficients(draw: st.DrawFn) -> Coefficients:
    betas = draw(FACTORS)
    alphas = draw(st.lists(st.floats(0, 1), min_size=len(betas), max_size=len(betas)))
    start = draw(st.integers(0, 2))
    none = (None,) * (start + 1)
    rule: Rule = draw(st.sampled_from(("ema", "bema", "ouema", "dema", "sum")))
    if rule == "ouema":
        alphas = [alpha / 2 for alpha in alphas]
    corrected = rule in ("bema", "ouema")
    return Coefficients(rule, start, none + tuple(betas), none + tuple(alphas) if corrected else None)


def replayed(chosen: Coefficients, run: Tensor) -> Tensor:
    state = RULES[chosen.rule](chosen, torch.empty_like(run[0]))
    for index, theta in enumerate(run):
        state.take(index, theta)
    return state.output(len(run) - 1, run[-1]).clone()


@given(chosen=coefficients(), seed=st.integers(0, 2**32 - 1))
def test_replay_equals_the_weighted_sum(chosen: Coefficients, seed: int) -> None:
    run = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(chosen.betas), 17)))
    explicit = torch.tensor(effective_weights(chosen), dtype=torch.float64) @ run
    torch.testing.assert_close(replayed(chosen, run), explicit, rtol=0, atol=1e-13)


@given(chosen=coefficients())
def test_weights_sum_to_1(chosen: Coefficients) -> None:
    assert sum(effective_weights(chosen)) == pytest.approx(1, abs=1e-12)


@given(scheme=schemes(), timeline=timelines())
def test_weights_of_every_scheme_sum_to_1(scheme: Scheme, timeline: Timeline) -> None:
    chosen = scheme.coefficients(timeline)
    assert all(beta is None or 0 < beta <= 1 for beta in chosen.betas)
    assert sum(effective_weights(chosen)) == pytest.approx(1, abs=1e-11)


def test_the_battery_has_every_scheme() -> None:
    drawn: set[type[Scheme]] = set()

    @settings(max_examples=300, database=None)
    @given(scheme=schemes())
    def draw(scheme: Scheme) -> None:
        drawn.add(type(scheme))

    draw()
    assert drawn == set(SCHEMES) - {Weights}


@given(weights=st.lists(st.floats(-3, 3), min_size=2, max_size=20), seed=st.integers(0, 2**32 - 1))
def test_explicit_weights_are_the_weights(weights: list[float], seed: int) -> None:
    """Whatever their signs and order; a sum near 0 would make them huge."""
    assume(abs(sum(weights)) > 0.1)
    want = np.array(weights) / math.fsum(weights)
    chosen = Weights(weights=weights, normalize=True).coefficients(Timeline(tuple(range(len(weights)))))
    assert effective_weights(chosen) == pytest.approx(want, abs=1e-12)
    run = np.random.default_rng(seed).normal(size=(len(weights), 7))
    assert replayed(chosen, torch.from_numpy(run)).numpy() == pytest.approx(want @ run, abs=1e-11)


@given(chosen=coefficients(), value=st.floats(-(2.0**100), 2.0**100, width=32))
def test_a_constant_run_is_a_fixed_point_to_the_bit(chosen: Coefficients, value: float) -> None:
    run = torch.full((len(chosen.betas), 3), value, dtype=torch.float32)
    assert torch.equal(replayed(chosen, run), run[0])


@given(chosen=coefficients(), seed=st.integers(0, 2**32 - 1), shift=st.floats(-10, 10), scale=st.floats(-10, 10))
def test_averaging_commutes_with_shift_and_scale(chosen: Coefficients, seed: int, shift: float, scale: float) -> None:
    run = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(chosen.betas), 5)))
    moved = replayed(chosen, scale * run + shift)
    torch.testing.assert_close(moved, scale * replayed(chosen, run) + shift, rtol=0, atol=1e-11)


@given(timeline=timelines())
def test_powers_at_their_ends(timeline: Timeline) -> None:
    """γ = 0 and κ = 0 do not average: all weight is on the last checkpoint, to the bit."""
    last = (0.0,) * (len(timeline.steps) - 1) + (1.0,)
    assert effective_weights(EMA(gamma=0.0).coefficients(timeline)) == last
    assert effective_weights(PEMA(gamma=0.0).coefficients(timeline)) == last


@given(count=st.integers(1, 30))
def test_power_1_is_the_flat_average(count: int) -> None:
    weights = effective_weights(EMA(gamma=1.0).coefficients(Timeline(tuple(range(count + 1)))))
    assert weights == pytest.approx([1 / (count + 1)] * (count + 1), abs=1e-14)


@given(
    seed=st.integers(0, 2**32 - 1),
    beta=st.floats(1e-6, 1),
    start=st.integers(0, 70),
    size=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_an_update_rounds_alike_wherever_a_tile_begins(
    seed: int, beta: float, start: int, size: int, dtype: torch.dtype
) -> None:
    """The result does not depend on the vector width, or on the remainder at the end of a tile."""
    generator = torch.Generator().manual_seed(seed)
    run = torch.randn(2, 200, generator=generator, dtype=torch.float64).to(dtype)
    step = Coefficients("ema", 0, (None, beta))
    part = slice(start, start + size)
    assert torch.equal(replayed(step, run[:, part].contiguous()), replayed(step, run)[part])
