"""PEMA: exponential moving average on the clock of the path that the weights travelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ckavg.schemes.base import Coefficients, Scheme, Timeline, require, require_finite


@dataclass(frozen=True, slots=True, kw_only=True)
class PEMA(Scheme):
    """Pathwise exponential moving average.

        β_k = (1 + T · ℓ_K · ℓ_k)^(−γ)        E ← (1 − β_k) E + β_k θ_k

    with T the span of the run in optimizer steps and ℓ the normalized path length. β at checkpoint k uses the path up
    to and including k, and folds in θ_k.

    Attributes:
        gamma: power γ ≥ 0; 0 gives the last checkpoint.

    References:
        Pathwise EMA, Eq. 3 and Algorithm 1.

    >>> PEMA(gamma=0.5).coefficients(Timeline((0, 3), (0.0, 1.0))).betas
    (None, 0.5)
    """

    name: ClassVar[str] = "pema"
    title: ClassVar[str] = "Pathwise EMA (PEMA)"
    reference: ClassVar[str] = "Pathwise EMA, Eq. 3 and Algorithm 1"
    needs_path: ClassVar[bool] = True
    label_fields: ClassVar[tuple[str, ...]] = ("gamma",)

    gamma: float = 0.15

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.gamma >= 0, f"pema: gamma is {self.gamma:g}; it must be 0 or more.")

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β by path length."""
        path = timeline.path_length
        require(path is not None, "pema: the path length was not measured.")
        path = path or ()
        clock = timeline.span * path[-1]
        return Coefficients("ema", 0, (None, *((1.0 + clock * length) ** -self.gamma for length in path[1:])))
