"""EMA with a power schedule, the baseline of Pathwise EMA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ckavg.schemes.base import Coefficients, Scheme, Timeline, require, require_finite


@dataclass(frozen=True, slots=True)
class EMA(Scheme):
    """EMA with a power schedule, whose momentum grows with the age of the run: the baseline.

        β_k = (a_k + τ)^(−γ)        E ← (1 − β_k) E + β_k θ_k

    with a_k the age in optimizer steps. γ = 1 is the flat average where every optimizer step was saved.

    Attributes:
        gamma: power γ ≥ 0; 0 gives the last checkpoint, larger values average over more checkpoints.
        tau: offset τ in optimizer steps; age + τ must be at least 1.

    References:
        Pathwise EMA, Eq. 1.

    Examples:
        >>> EMA(gamma=1.0).coefficients(Timeline((0, 1, 3))).betas
        (None, 0.5, 0.25)
    """

    name: ClassVar[str] = "ema"
    title: ClassVar[str] = "EMA with a power schedule"
    reference: ClassVar[str] = "Pathwise EMA, Eq. 1"
    label_fields: ClassVar[tuple[str, ...]] = ("gamma",)

    gamma: float = 0.15
    tau: float = 1.0

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.gamma >= 0, f"ema: gamma is {self.gamma:g}; it must be 0 or more.")

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β by age."""
        ages = timeline.ages[1:]
        require(
            all(age + self.tau >= 1 for age in ages),
            f"ema: tau is {self.tau:g}, so that age + tau falls below 1.",
            hint=f"The first checkpoint after the anchor has age {ages[0]}: tau must be at least {1 - ages[0]}.",
        )
        return Coefficients("ema", 0, (None, *((age + self.tau) ** -self.gamma for age in ages)))
