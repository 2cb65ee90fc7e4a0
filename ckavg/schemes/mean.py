"""The plain mean of the checkpoints, and the last one of them: what every scheme is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ckavg.schemes.base import Coefficients, Scheme, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean(Scheme):
    """The mean of the selected checkpoints, all with one weight; a model given as the anchor is not among them.

        E ← θ_1, then β_k = 1 / k        E ← (1 − β_k) E + β_k θ_k

    counting the checkpoints of the run from 1. Over the newest few it is known as LAWA.

    References:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization (SWA), 2018.
        Kaddour, Stop Wasting My Time! (LAWA), 2022.

    >>> Mean().coefficients(Timeline((0, 10, 20))).betas
    (None, 0.5, 0.3333333333333333)
    """

    name: ClassVar[str] = "mean"
    title: ClassVar[str] = "Mean"
    reference: ClassVar[str] = "SWA, Izmailov et al. 2018; LAWA, Kaddour 2022"
    label_fields: ClassVar[tuple[str, ...]] = ()

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β = 1/k, from the run's own first checkpoint on."""
        start = int(timeline.anchor_is_init)
        counted = range(2, len(timeline.steps) - start + 1)
        return Coefficients("ema", start, (*(None,) * (start + 1), *(1 / count for count in counted)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Last(Scheme):
    """The last checkpoint as it is, for comparisons.

    >>> Last().coefficients(Timeline((0, 10, 20))).start
    2
    """

    name: ClassVar[str] = "last"
    title: ClassVar[str] = "Last checkpoint"
    reference: ClassVar[str] = "no averaging"
    label_fields: ClassVar[tuple[str, ...]] = ()

    def coefficients(self, timeline: Timeline) -> Coefficients:
        """Begin with the last checkpoint, and end there."""
        return Coefficients("ema", len(timeline.steps) - 1, (None,) * len(timeline.steps))
