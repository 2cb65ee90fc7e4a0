"""Explicit weights: a linear combination of the checkpoints, given by the user."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ckavg.errors import SettingError, listed
from ckavg.schemes.base import Coefficients, Scheme, Timeline, require

TOLERANCE = 1e-9
"""How far the sum of the weights may be from 1 without `normalize`; they are divided by their sum."""

Stated = str | Sequence[float] | Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Weights(Scheme):
    """Explicit weights, one for each checkpoint.

        Σ_k w_k θ_k        Σ_k w_k = 1

    A weight may be negative, unless the model holds running statistics.

    Attributes:
        weights: a weight for every selected checkpoint, the anchor's first, such as `0.1,0.2,0.7`; or by step, with 0
            for the others, such as `500:0.3,1000:0.7`; or a JSON file with a list or an object.
        normalize: Divide the weights by their sum. Otherwise they must sum to 1, to 1e-9.

    References:
        Any; the weights are the user's.

    Examples:
        >>> Weights(weights=[1, 1, 2], normalize=True).coefficients(Timeline((0, 10, 20))).betas
        (None, 0.5, 0.5)
        >>> Weights(weights={10: 1.5, 20: -0.5}).coefficients(Timeline((0, 10, 20)))  # θ_1 − 0.5 (θ_2 − θ_1)
        ... # doctest: +ELLIPSIS
        Coefficients(rule='sum', start=1, betas=(None, None, -0.5), ...
    """

    name: ClassVar[str] = "weights"
    title: ClassVar[str] = "Explicit weights"
    reference: ClassVar[str] = "as stated"
    label_fields: ClassVar[tuple[str, ...]] = ("weights",)
    added_fields: ClassVar[tuple[str, ...]] = ("normalize",)
    in_sweep: ClassVar[bool] = False

    weights: Stated = ""
    normalize: bool = False

    def __post_init__(self) -> None:
        # Normalized, as the text of a record: equal weights must be equal schemes.
        steps, weights = _parsed(self.weights)
        require(all(map(math.isfinite, weights)), "weights: all must be finite numbers.")
        total = math.fsum(weights)
        if self.normalize:
            require(total != 0, "weights: they sum to 0, so they cannot be normalized.")
            weights = [weight / total for weight in weights]
        elif abs(total - 1) > TOLERANCE:
            raise SettingError(f"weights: they sum to {total:.10g}; they must sum to 1.", hint="Or add --normalize.")
        texts = [repr(float(weight)) for weight in weights]
        if steps:
            texts = [f"{step}:{text}" for step, text in sorted(zip(steps, texts, strict=True))]
        object.__setattr__(self, "weights", ",".join(texts))
        object.__setattr__(self, "normalize", False)

    @property
    def label(self) -> str:
        """`weights-` and the beginning of a hash of the weights, since there may be hundreds."""
        return f"weights-{hashlib.sha256(str(self.weights).encode()).hexdigest()[:8]}"

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β of the recursion with these weights; with a negative one, a sum of differences from the first weighted
        checkpoint.
        """
        weights = self._in_order(timeline.steps)
        start = next(index for index, weight in enumerate(weights) if weight)
        before = (None,) * (start + 1)
        if min(weights) < 0:
            total = math.fsum(weights)
            return Coefficients("sum", start, (*before, *(weight / total for weight in weights[start + 1 :])))
        sums = itertools.accumulate(weights)
        betas = [weight / total if weight else 0.0 for weight, total in zip(weights, sums, strict=True)]
        return Coefficients("ema", start, (*before, *betas[start + 1 :]))

    def _in_order(self, steps: tuple[int, ...]) -> list[float]:
        """The weight of every checkpoint."""
        named, weights = _parsed(self.weights)
        if not named:
            require(
                len(weights) == len(steps),
                f"weights: there are {len(weights)}, but {len(steps)} checkpoints are selected, the anchor included.",
                hint=f"Give one for each of the steps {listed([str(step) for step in steps], 12)}, or by step.",
            )
            return weights
        absent = [str(step) for step in named if step not in steps]
        require(
            not absent,
            f"weights: no checkpoint of step {listed(absent)} is selected.",
            hint=f"There are steps {listed([str(step) for step in steps], 12)}.",
        )
        by_step = dict(zip(named, weights, strict=True))
        return [by_step.get(step, 0.0) for step in steps]


def _parsed(stated: Stated) -> tuple[list[int], list[float]]:
    """The steps, if they are stated, and the weights."""
    parts: Iterable[tuple[object, ...]]
    if isinstance(stated, str):
        parts = [tuple(each.split(":")) for each in stated.split(",")]
    else:
        parts = stated.items() if isinstance(stated, Mapping) else [(weight,) for weight in stated]
    try:
        *steps, weights = zip(*parts, strict=True)
        named = [int(str(step)) for step in steps[0]] if steps else []
        values = [float(weight) for weight in weights]
    except (TypeError, ValueError, OverflowError) as error:
        raise SettingError(
            f"weights: {str(stated)[:60]!r} is not a list of weights.",
            hint="For example: --weights 0.1,0.2,0.7 or --weights 500:0.3,1000:0.7 or --weights FILE.json",
        ) from error
    require(len(steps) < 2 and len(set(named)) == len(named), "weights: a step has two weights.")
    return named, values
