"""DEMA: twice an exponential moving average less the average of that average, which cancels the lag to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ckavg.schemes.base import Coefficients, Scheme, Timeline, falling, require, require_finite, step_ages


@dataclass(frozen=True, slots=True, kw_only=True)
class DEMA(Scheme):
    """Double EMA: twice an average less its own average, which cancels the lag.

        β_k = (ρ + γ t_k)^(−κ)        output 2 e_1 − e_2
        e_1 ← (1 − β_k) e_1 + β_k θ_k        e_2 ← (1 − β_k) e_2 + β_k e_1

    with the new e_1 in the second update. t_k is the absolute optimizer step.

    Attributes:
        kappa: power κ ≥ 0 of both averages; 0 does not average (β = 1).
        multiplier: weight γ of the step.
        lag: lag ρ, added to the step; ρ + γ t must be at least 1 at every update.

    References:
        EMA Without the Lag, Eq. 14–16.

    >>> DEMA(kappa=0.5, lag=4.0).coefficients(Timeline((0, 12))).betas
    (None, 0.25)
    """

    name: ClassVar[str] = "dema"
    title: ClassVar[str] = "Double EMA (DEMA)"
    reference: ClassVar[str] = "EMA Without the Lag, Eq. 14–16"
    label_fields: ClassVar[tuple[str, ...]] = ("kappa",)

    kappa: float = 0.5
    multiplier: float = 1.0
    lag: float = 10.0

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.kappa >= 0, f"dema: kappa is {self.kappa:g}; it must be 0 (no averaging) or more.")

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β by absolute step."""
        ages = step_ages(timeline, 0, lag=self.lag, multiplier=self.multiplier)
        return Coefficients("dema", 0, (None, *falling(ages, self.kappa)))
