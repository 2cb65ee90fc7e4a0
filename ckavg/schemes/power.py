"""EMA with a power-function profile (EDM2): its width is a constant fraction of the run."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

from ckavg.schemes.base import Coefficients, Scheme, Timeline, less_than_1, require, require_finite

_WIDEST = 12**-0.5
"""σ_rel of the flat average over all steps, γ = 0."""


@dataclass(frozen=True, slots=True)
class PowerEMA(Scheme):
    """Power-function EMA (EDM2): the weight of step t grows as t^γ, so the average widens with the run.

        β_k = 1 − (t_{k−1} / t_k)^(γ + 1)        E ← (1 − β_k) E + β_k θ_k

    t_k is the absolute optimizer step. An anchor at step 0 drops out, since β_1 = 1. γ follows from the width:

        σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3))

    Attributes:
        sigma_rel: width of the average: the standard deviation σ_rel of its age, relative to the run, in (0, 0.2887).

    References:
        Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2), 2024, Section 3.

    Examples:
        >>> [round(beta, 4) for beta in PowerEMA(sigma_rel=0.10).coefficients(Timeline((0, 100, 200))).betas[1:]]
        [1.0, 0.9959]
    """

    name: ClassVar[str] = "power"
    title: ClassVar[str] = "Power-function EMA"
    reference: ClassVar[str] = "EDM2, Karras et al. 2024, Section 3"
    label_fields: ClassVar[tuple[str, ...]] = ("sigma_rel",)

    sigma_rel: float = 0.10

    def __post_init__(self) -> None:
        require_finite(self)
        valid = 0 < self.sigma_rel < _WIDEST
        require(valid, f"power: sigma-rel is {self.sigma_rel:g}; it must be more than 0 and less than {_WIDEST:.4f}.")

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β by absolute step."""
        return _by_exponent(timeline, exponent_of(self.sigma_rel))


@dataclass(frozen=True, slots=True)
class PowerExponentEMA(Scheme):
    """The same, with γ instead of the width.

    Attributes:
        exponent: γ ≥ 0 of the profile t^γ, instead of a width; 0 is the flat average over all steps.

    References:
        Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2), 2024, Section 3.

    Examples:
        >>> PowerExponentEMA(exponent=1.0).coefficients(Timeline((0, 1, 2))).betas
        (None, 1.0, 0.75)
    """

    name: ClassVar[str] = "power"
    title: ClassVar[str] = "Power-function EMA"
    reference: ClassVar[str] = "EDM2, Karras et al. 2024, Section 3"
    label_fields: ClassVar[tuple[str, ...]] = ("exponent",)
    chosen_by: ClassVar[str] = "exponent"

    exponent: float = 6.94

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.exponent >= 0, f"power: exponent is {self.exponent:g}; it must be 0 or more.")

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β by absolute step."""
        return _by_exponent(timeline, self.exponent)


def exponent_of(sigma_rel: float) -> float:
    """The exponent γ of a relative width in (0, 0.2887), the positive root of

        γ³ + 7γ² + (16 − σ⁻²) γ + (12 − σ⁻²) = 0

    >>> round(exponent_of(0.05), 4), round(exponent_of(0.10), 4), round(exponent_of(0.15), 4)
    (16.9722, 6.9372, 3.5579)
    """
    square = sigma_rel**-2
    gamma, after = math.inf, 1 / sigma_rel  # above the root, where the cubic is convex: Newton's steps only fall
    while after < gamma:
        gamma = after
        value = ((gamma + 7) * gamma + 16 - square) * gamma + 12 - square
        after = gamma - value / ((3 * gamma + 14) * gamma + 16 - square)
    return gamma


def _by_exponent(timeline: Timeline, exponent: float) -> Coefficients:
    steps = timeline.steps
    require(steps[0] >= 0, f"power: the first step is {steps[0]}; it must be 0 or more.")
    ratios = [before / after for before, after in itertools.pairwise(steps)]
    return Coefficients("ema", 0, (None, *(less_than_1(ratio, exponent + 1) for ratio in ratios)))
