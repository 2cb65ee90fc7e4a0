"""BEMA: exponential moving average with a correction for its lag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ckavg.schemes.base import Coefficients, Scheme, Timeline, require, require_finite


@dataclass(frozen=True, slots=True, kw_only=True)
class BEMA(Scheme):
    """Bias-corrected exponential moving average.

        at the first checkpoint with t_k ≥ τ:   θ_0 ← θ_k,  E ← θ_k
        at every visited checkpoint after it:   β_k = (ρ + γ t_k)^(−κ)        α_k = (ρ + γ t_k)^(−η)
                                                E ← (1 − β_k) E + β_k θ_k
                                                output E + α_k (θ_k − θ_0)

    t_k is the absolute optimizer step, not the age since the anchor or the burn-in.

    Attributes:
        eta: η ≥ 0, power of the correction; 0 is the strongest, α = 1.
        kappa: κ ≥ 0, power of the average; 0 means β = 1, no averaging.
        multiplier: γ, weight of the step in both schedules.
        lag: ρ; ρ + γ t must be at least 1 at every update.
        burn_in: τ ≥ 0 in optimizer steps.

    References:
        EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes, Algorithm 1.

    >>> BEMA(eta=1.0, kappa=0.5, lag=4.0).coefficients(Timeline((0, 12)))
    Coefficients(rule='bema', start=0, betas=(None, 0.25), alphas=(None, 0.0625))
    """

    name: ClassVar[str] = "bema"
    title: ClassVar[str] = "Bias-corrected EMA (BEMA)"
    reference: ClassVar[str] = "EMA Without the Lag, Algorithm 1"
    label_fields: ClassVar[tuple[str, ...]] = ("eta",)

    eta: float = 0.2
    kappa: float = 0.5
    multiplier: float = 1.0
    lag: float = 10.0
    burn_in: int = 0

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.eta >= 0, f"bema: eta is {self.eta:g}; it must be 0 (strongest correction) or more.")
        require(self.kappa >= 0, f"bema: kappa is {self.kappa:g}; it must be 0 (no averaging) or more.")
        require(self.burn_in >= 0, f"bema: burn-in is {self.burn_in}; it must be 0 or more optimizer steps.")

    @property
    def every_from(self) -> int | None:
        """Updates fall at (t − τ) mod φ = 0."""
        return self.burn_in or None

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β and α by absolute step, from the end of the burn-in."""
        start = next((index for index, step in enumerate(timeline.steps) if step >= self.burn_in), None)
        if start is None:
            last = timeline.steps[-1]
            require(False, f"bema: burn-in is {self.burn_in}, but the last checkpoint is at step {last}.")
            start = 0
        ages = [self.lag + self.multiplier * step for step in timeline.steps[start + 1 :]]
        require(
            all(age >= 1 for age in ages),
            f"bema: lag + multiplier × step falls to {min(ages, default=1):g}; it must be at least 1.",
            hint="Raise --lag, or make --multiplier positive.",
        )
        before = (None,) * (start + 1)
        return Coefficients(
            "bema",
            start,
            (*before, *(age**-self.kappa for age in ages)),
            (*before, *(age**-self.eta for age in ages)),
        )
