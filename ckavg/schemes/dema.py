"""DEMA: twice an exponential moving average minus the average of that average; the lag cancels to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ckavg.schemes.base import Coefficients, Scheme, Timeline, burned_in, falling, require, require_finite, step_ages


@dataclass(frozen=True, slots=True)
class DEMA(Scheme):
    """Double EMA: twice an average minus its own average, which cancels the lag.

        β_k = (ρ + γ t_k)^(−κ)        output 2 e_1 − e_2
        e_1 ← (1 − β_k) e_1 + β_k θ_k        e_2 ← (1 − β_k) e_2 + β_k e_1

    with the new e_1 in the second update. t_k is the absolute optimizer step.

    Attributes:
        kappa: power κ ≥ 0 of both averages; 0 does not average (β = 1).
        multiplier: weight γ of the step.
        lag: lag ρ, added to the step; ρ + γ t must be at least 1 at every update.
        burn_in: optimizer step τ ≥ 0; the average begins at the first checkpoint at or after it.

    References:
        EMA Without the Lag, Eq. 14–16.

    Examples:
        >>> DEMA(kappa=0.5, lag=4.0).coefficients(Timeline((0, 12))).betas
        (None, 0.25)
    """

    name: ClassVar[str] = "dema"
    title: ClassVar[str] = "Double EMA (DEMA)"
    reference: ClassVar[str] = "EMA Without the Lag, Eq. 14–16"
    label_fields: ClassVar[tuple[str, ...]] = ("kappa",)
    added_fields: ClassVar[tuple[str, ...]] = ("burn_in",)

    kappa: float = 0.5
    multiplier: float = 1.0
    lag: float = 10.0
    burn_in: int = 0

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.kappa >= 0, f"dema: kappa is {self.kappa:g}; it must be 0 (no averaging) or more.")
        require(self.burn_in >= 0, f"dema: burn-in is {self.burn_in}; it must be 0 or more optimizer steps.")

    @property
    def every_from(self) -> int | None:
        """Updates fall at (t − τ) mod φ = 0, as in BEMA."""
        return self.burn_in or None

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β by absolute step, from the end of the burn-in."""
        start = burned_in(self, self.burn_in, timeline)
        ages = step_ages(timeline, start, lag=self.lag, multiplier=self.multiplier)
        return Coefficients("dema", start, (*(None,) * (start + 1), *falling(ages, self.kappa)))
