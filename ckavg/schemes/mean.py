"""Means of the checkpoints, plain or weighted like a learning-rate decay; and the last checkpoint for comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from ckavg.schemes.base import Coefficients, Scheme, Timeline, require

Decay = Literal["none", "linear", "cosine", "minus-sqrt"]

_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus-sqrt": lambda x: 1 - math.sqrt(x),
}
"""The shape of a learning-rate decay, from 1 at x = 0 to 0 at x = 1."""


@dataclass(frozen=True, slots=True)
class Mean(Scheme):
    """Mean of the checkpoints: SWA; LAWA of the newest few; WSM with a decay.

    A model given as the anchor takes no part.

        E ← θ_0, then β_j = c_j / (c_0 + … + c_j)        E ← (1 − β_j) E + β_j θ_j

    counting the n checkpoints of the run from 0. The plain mean has c_j = 1 / n. With a decay, the mean is where
    training would have ended if it had applied the update before checkpoint j with the learning rate w_j of that decay:

        w_j = decay(j / n)        c_0 = 1 − w_1,   c_j = w_j − w_{j+1},   c_{n−1} = w_{n−1}

        linear        1 − x                 the plain mean again
        cosine        (1 + cos π x) / 2     most weight in the middle
        minus-sqrt    1 − √x                most weight on the oldest

    Attributes:
        decay: learning-rate decay that the weights imitate: `none` (equal weights), `linear` (the same), `cosine` or
            `minus-sqrt`.

    References:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization (SWA), 2018.
        Kaddour, Stop Wasting My Time! (LAWA), 2022.
        Tian et al., WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging, 2025 (c_j from w_j).

    Examples:
        >>> Mean().coefficients(Timeline((0, 10, 20))).betas
        (None, 0.5, 0.3333333333333333)
        >>> round(Mean(decay="minus-sqrt").coefficients(Timeline((0, 10, 20, 30))).betas[1], 4)  # c = 0.5, 0.2071, …
        0.2929
    """

    name: ClassVar[str] = "mean"
    title: ClassVar[str] = "Mean"
    reference: ClassVar[str] = "SWA, Izmailov et al. 2018; LAWA, Kaddour 2022; decays: WSM, Tian et al. 2025"
    label_fields: ClassVar[tuple[str, ...]] = ()

    decay: Decay = "none"

    def __post_init__(self) -> None:
        known = ("none", *_DECAYS)
        require(self.decay in known, f"mean: decay is {self.decay!r}; it must be one of {', '.join(known)}.")

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β, starting at the run's own first checkpoint."""
        start = int(timeline.anchor_is_init)
        visited = len(timeline.steps) - start
        return Coefficients("ema", start, (*(None,) * (start + 1), *self._betas(visited)))

    def _betas(self, visited: int) -> list[float]:
        if self.decay == "none":
            return [1 / count for count in range(2, visited + 1)]
        decay = _DECAYS[self.decay]
        rates = [decay(place / visited) for place in range(visited)] + [0.0]
        weights = [before - after for before, after in itertools.pairwise(rates)]
        return [weight / total for weight, total in zip(weights, itertools.accumulate(weights), strict=True)][1:]


@dataclass(frozen=True, slots=True)
class Last(Scheme):
    """The last checkpoint, for comparisons.

    Examples:
        >>> Last().coefficients(Timeline((0, 10, 20))).start
        2
    """

    name: ClassVar[str] = "last"
    title: ClassVar[str] = "Last checkpoint"
    reference: ClassVar[str] = "no averaging"
    has_verb: ClassVar[bool] = False
    label_fields: ClassVar[tuple[str, ...]] = ()

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """Start at the last checkpoint, without an update."""
        return Coefficients("ema", len(timeline.steps) - 1, (None,) * len(timeline.steps))
