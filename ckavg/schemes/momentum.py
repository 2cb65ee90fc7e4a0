"""EMA with a constant momentum, and its scaling rule."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ckavg.errors import SettingError
from ckavg.schemes.base import Coefficients, Scheme, Timeline, less_than_1, require, require_finite


def scaled_momentum(momentum: float, batch_scale: float) -> float:
    """The momentum ρ̂ = ρ^κ that has the effect at batch size κB of ρ at batch size B (How to Scale Your EMA, Def. 1.2).

    Args:
        momentum: ρ in [0, 1), per optimizer step.
        batch_scale: κ > 0.

    >>> round(scaled_momentum(0.9999, 8), 5)
    0.9992
    """
    scaled: float = momentum**batch_scale
    return scaled


@dataclass(frozen=True, slots=True)
class MomentumEMA(Scheme):
    """EMA with a constant momentum, scaled to the batch.

        ρ̂ = ρ^κ        β_k = 1 − ρ̂^Δ_k        E ← (1 − β_k) E + β_k θ_k

    with Δ_k the optimizer steps since the previous checkpoint. β is computed as −expm1(κ Δ_k ln ρ). If κ changes along
    the run (progressive scaling), κ Δ_k is the sum of κ over these steps.

    Attributes:
        momentum: constant momentum ρ in [0, 1), instead of a power.
        momentum_per: `step` for a momentum per optimizer step, `update` for β_k = 1 − ρ̂ at every checkpoint.
        batch_scale: factor κ > 0 by which the batch of this run is larger than that for which ρ was chosen; for a
            later change, the optimizer step after which it applies and the factor, such as `1000:4`.

    References:
        How to Scale Your EMA, Definitions 1.1, 1.2 and 3.2.

    Examples:
        >>> MomentumEMA(momentum=0.5, batch_scale="1,2:3").coefficients(Timeline((0, 1, 3))).betas  # 0.5^1, 0.5^(1 + 3)
        (None, 0.5, 0.9375)
    """

    name: ClassVar[str] = "ema"
    title: ClassVar[str] = "EMA with a constant momentum"
    reference: ClassVar[str] = "How to Scale Your EMA, Definitions 1.1 and 1.2"
    label_fields: ClassVar[tuple[str, ...]] = ("momentum",)
    chosen_by: ClassVar[str] = "momentum"
    repeatable: ClassVar[tuple[str, ...]] = ("batch_scale",)

    momentum: float = 0.9999
    momentum_per: Literal["step", "update"] = "step"
    batch_scale: float | str = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.batch_scale, str) and "," not in self.batch_scale:
            object.__setattr__(self, "batch_scale", _batch_scales(self.batch_scale)[0][1])
        require_finite(self)
        require(0 <= self.momentum < 1, f"ema: momentum is {self.momentum:g}; it must be at least 0 and less than 1.")
        for _, scale in _batch_scales(self.batch_scale):
            require(0 < scale < math.inf, f"ema: batch-scale is {scale:g}; it must be more than 0, and finite.")
        per = self.momentum_per
        require(per in ("step", "update"), f"ema: momentum-per is {per!r}; it must be step or update.")

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β from the steps between checkpoints."""
        pairs = itertools.pairwise(timeline.steps)
        powers = [self._power(before if self.momentum_per == "step" else after - 1, after) for before, after in pairs]
        return Coefficients("ema", 0, (None, *(less_than_1(self.momentum, power) for power in powers)))

    def _power(self, before: int, after: int) -> float:
        """The sum of κ over the optimizer steps from one to another."""
        scales = _batch_scales(self.batch_scale)
        begins = [before, *(min(max(step, before), after) for step, _ in scales[1:]), after]
        return sum(
            scale * (end - begin) for (_, scale), (begin, end) in zip(scales, itertools.pairwise(begins), strict=True)
        )


def _batch_scales(scales: float | str) -> list[tuple[int, float]]:
    """Every κ with the step after which it applies, ascending: `1,1000:4` is 1 from 0 on, and 4 after 1000."""
    if not isinstance(scales, str):
        return [(0, scales)]
    try:
        first, *later = scales.split(",")
        changes = [
            (0, float(first)),
            *((int(step), float(scale)) for step, scale in (each.split(":") for each in later)),
        ]
    except ValueError as error:
        raise SettingError(
            f"ema: batch-scale is {scales!r}; it must be a number, then STEP:SCALE for each change.",
            hint="For example: --batch-scale 1 --batch-scale 1000:4",
        ) from error
    steps = [step for step, _ in changes[1:]]
    require(
        steps == sorted(set(steps)) and min(steps, default=1) > 0,
        f"ema: batch-scale is {scales!r}; its steps must ascend from 1 on.",
    )
    return changes
