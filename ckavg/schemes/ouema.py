"""OUEMA: an exponential moving average of checkpoints, each corrected for the pull of the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ckavg.schemes.base import (
    Coefficients,
    Scheme,
    Timeline,
    burned_in,
    falling,
    less_than_1,
    require,
    require_finite,
    step_ages,
)


@dataclass(frozen=True, slots=True)
class OUEMA(Scheme):
    """Ornstein–Uhlenbeck EMA: correct every checkpoint for the pull of the start, then average.

        β_k = (ρ + γ t_k)^(−κ)        α_k = (ρ + γ t_k)^(−η)
        θ̃_k = (θ_k − α_k θ_0) / (1 − α_k)        E ← (1 − β_k) E + β_k θ̃_k

    t_k is the absolute optimizer step.

    Attributes:
        eta: power η > 0 of the correction; near 0 is the strongest, inf turns it off.
        kappa: power κ ≥ 0 of the average; 0 does not average (β = 1).
        multiplier: weight γ of the step in both schedules.
        lag: lag ρ, added to the step; ρ + γ t must be greater than 1 at every update.
        burn_in: optimizer step τ ≥ 0; the average begins at the first checkpoint at or after it, which becomes θ_0.

    References:
        EMA Without the Lag, Eq. 13.

    Examples:
        >>> coefficients = OUEMA(eta=1.0, kappa=0.5, lag=4.0).coefficients(Timeline((0, 12)))
        >>> coefficients.betas, coefficients.alphas
        ((None, 0.25), (None, 0.0625))
    """

    name: ClassVar[str] = "ouema"
    title: ClassVar[str] = "Ornstein–Uhlenbeck EMA (OUEMA)"
    reference: ClassVar[str] = "EMA Without the Lag, Eq. 13"
    label_fields: ClassVar[tuple[str, ...]] = ("eta",)
    added_fields: ClassVar[tuple[str, ...]] = ("burn_in",)

    eta: float = 0.2
    kappa: float = 0.5
    multiplier: float = 1.0
    lag: float = 10.0
    burn_in: int = 0

    def __post_init__(self) -> None:
        require_finite(self, but=("eta",))
        require(self.eta > 0, f"ouema: eta is {self.eta:g}; it must be more than 0: at 0 θ_k has no weight.")
        require(self.kappa >= 0, f"ouema: kappa is {self.kappa:g}; it must be 0 (no averaging) or more.")
        require(self.burn_in >= 0, f"ouema: burn-in is {self.burn_in}; it must be 0 or more optimizer steps.")

    @property
    def every_from(self) -> int | None:
        """Updates fall at (t − τ) mod φ = 0, as in BEMA."""
        return self.burn_in or None

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β and α by absolute step, from the end of the burn-in."""
        start = burned_in(self, self.burn_in, timeline)
        before = (None,) * (start + 1)
        ages = step_ages(timeline, start, lag=self.lag, multiplier=self.multiplier)
        require(
            all(age > 1 for age in ages),
            "ouema: lag + multiplier × step is 1; it must be more: with α = 1 θ_k has no weight.",
            hint="Raise --lag.",
        )
        alphas, left = falling(ages, self.eta), [less_than_1(age, -self.eta) for age in ages]
        betas = (*before, *falling(ages, self.kappa))
        return Coefficients("ouema", start, betas, (*before, *alphas), complements=(*before, *left))
