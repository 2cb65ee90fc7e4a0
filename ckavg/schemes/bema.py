"""BEMA: exponential moving average with a correction for its lag."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ckavg.schemes.base import Coefficients, Scheme, Timeline, burned_in, falling, require, require_finite, step_ages


@dataclass(frozen=True, slots=True)
class BEMA(Scheme):
    """Bias-corrected EMA: an average that does not lag behind.

        at the first checkpoint with t_k ≥ τ:   θ_0 ← θ_k,  E ← θ_k
        at every visited checkpoint after it:
            β_k = (ρ + γ t_k)^(−κ)        α_k = (ρ + γ t_k)^(−η)
            E ← (1 − β_k) E + β_k θ_k        output E + α_k (θ_k − θ_0)

    t_k is the absolute optimizer step, not the age since the anchor or the burn-in. The authors' offline code differs:
    with u = max(t − τ + ρ, 1) it takes β = (1 + γ u)^(−κ) and α = (1 + u)^(−η).

    Attributes:
        eta: power η ≥ 0 of the correction; 0 is the strongest (α = 1), inf turns it off.
        kappa: power κ ≥ 0 of the average; 0 does not average (β = 1).
        multiplier: weight γ of the step in both schedules.
        lag: lag ρ, added to the step; ρ + γ t must be at least 1 at every update.
        burn_in: optimizer step τ ≥ 0; the average begins at the first checkpoint at or after it.
        form: schedule of the `paper`, or of the `author`s' offline code.
        min_beta: a floor for β in [0, 1], which limits how wide the average grows.

    References:
        EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes, Algorithm 1.

    Examples:
        >>> coefficients = BEMA(eta=1.0, kappa=0.5, lag=4.0).coefficients(Timeline((0, 12)))
        >>> coefficients.betas, coefficients.alphas
        ((None, 0.25), (None, 0.0625))
    """

    name: ClassVar[str] = "bema"
    title: ClassVar[str] = "Bias-corrected EMA (BEMA)"
    reference: ClassVar[str] = "EMA Without the Lag, Algorithm 1"
    label_fields: ClassVar[tuple[str, ...]] = ("eta",)
    added_fields: ClassVar[tuple[str, ...]] = ("min_beta",)
    switches: ClassVar[Mapping[str, Mapping[str, float]]] = {"no_bias_correction": {"eta": math.inf}}

    eta: float = 0.2
    kappa: float = 0.5
    multiplier: float = 1.0
    lag: float = 10.0
    burn_in: int = 0
    form: Literal["paper", "author"] = "paper"
    min_beta: float = 0.0

    def __post_init__(self) -> None:
        require_finite(self, but=("eta",))
        require(self.form in ("paper", "author"), f"bema: form is {self.form!r}; it must be paper or author.")
        require(self.eta >= 0, f"bema: eta is {self.eta:g}; it must be 0 (strongest correction) or more.")
        require(self.kappa >= 0, f"bema: kappa is {self.kappa:g}; it must be 0 (no averaging) or more.")
        require(self.burn_in >= 0, f"bema: burn-in is {self.burn_in}; it must be 0 or more optimizer steps.")
        require(0 <= self.min_beta <= 1, f"bema: min-beta is {self.min_beta:g}; it must be from 0 to 1.")

    @property
    def every_from(self) -> int | None:
        """Updates fall at (t − τ) mod φ = 0."""
        return self.burn_in or None

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β and α by absolute step, from the end of the burn-in."""
        start = burned_in(self, self.burn_in, timeline)
        betas, alphas = self._schedule(timeline, start)
        betas = [max(beta, self.min_beta) for beta in betas]
        before = (None,) * (start + 1)
        return Coefficients("bema", start, (*before, *betas), (*before, *alphas))

    def _schedule(self, timeline: Timeline, start: int) -> tuple[list[float], list[float]]:
        if self.form == "author":
            ages = [max(step - self.burn_in + self.lag, 1.0) for step in timeline.steps[start + 1 :]]
            scaled = [1 + self.multiplier * age for age in ages]
            require(all(age >= 1 for age in scaled), "bema: multiplier is negative; it must be 0 or more.")
            return falling(scaled, self.kappa), falling([1 + age for age in ages], self.eta)
        ages = step_ages(timeline, start, lag=self.lag, multiplier=self.multiplier)
        return falling(ages, self.kappa), falling(ages, self.eta)
