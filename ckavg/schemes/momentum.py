"""EMA with a constant momentum, and its scaling rule."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

from ckavg.schemes.base import Coefficients, Scheme, Timeline, less_than_1, require, require_finite


def scaled_momentum(momentum: float, batch_scale: float) -> float:
    """The momentum ρ̂ = ρ^κ that does at batch size κB what ρ does at batch size B (How to Scale Your EMA, Def. 1.2).

    Args:
        momentum: ρ in [0, 1), per optimizer step.
        batch_scale: κ > 0.

    >>> round(scaled_momentum(0.9999, 8), 5)
    0.9992
    """
    scaled: float = momentum**batch_scale
    return scaled


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentumEMA(Scheme):
    """EMA with a constant momentum, scaled to the batch.

        ρ̂ = ρ^κ        β_k = 1 − ρ̂^Δ_k        E ← (1 − β_k) E + β_k θ_k

    with Δ_k the optimizer steps since the checkpoint before. β is formed as −expm1(κ Δ_k ln ρ).

    Attributes:
        momentum: constant momentum ρ in [0, 1), in place of a power.
        momentum_per: `step` for a momentum per optimizer step, `update` for β_k = 1 − ρ̂ at every checkpoint.
        batch_scale: factor κ > 0 by which the batch of this run is larger than that for which ρ was chosen.

    References:
        How to Scale Your EMA, Definitions 1.1 and 1.2.

    >>> MomentumEMA(momentum=0.5).coefficients(Timeline((0, 1, 3))).betas
    (None, 0.5, 0.75)
    """

    name: ClassVar[str] = "ema"
    title: ClassVar[str] = "EMA with a constant momentum"
    reference: ClassVar[str] = "How to Scale Your EMA, Definitions 1.1 and 1.2"
    label_fields: ClassVar[tuple[str, ...]] = ("momentum",)
    chosen_by: ClassVar[str] = "momentum"

    momentum: float = 0.9999
    momentum_per: Literal["step", "update"] = "step"
    batch_scale: float = 1.0

    def __post_init__(self) -> None:
        require_finite(self)
        require(0 <= self.momentum < 1, f"ema: momentum is {self.momentum:g}; it must be at least 0 and less than 1.")
        require(self.batch_scale > 0, f"ema: batch-scale is {self.batch_scale:g}; it must be more than 0.")
        per = self.momentum_per
        require(per in ("step", "update"), f"ema: momentum-per is {per!r}; it must be step or update.")

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β by the steps between checkpoints."""
        gaps = [after - before for before, after in itertools.pairwise(timeline.steps)]
        powers = [self.batch_scale * (gap if self.momentum_per == "step" else 1) for gap in gaps]
        return Coefficients("ema", 0, (None, *(less_than_1(self.momentum, power) for power in powers)))
