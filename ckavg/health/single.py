"""Stage *health*: single values that one checkpoint has and its neighbours have not, too large or too small. Pure.

A spike is how far the value that sticks out most lies outside of its two neighbours: an even drift has none. In units
of the mean change of its tensor over the two intervals, it is much the same along a sound run, however heavy the tails
of a tensor are: so it is compared with the median of the other checkpoints, and with how much those vary.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence

from ckavg.health.values import Finding, TensorStatistics

_FACTOR = 4.0
"""How many times the median a spike must be, whatever the others are."""

_FACTOR_AT_AN_END = 16.0
"""The same of the first and the last checkpoint, whose change nothing says was taken back."""

_FEW_ELEMENTS = 1024
_FACTOR_OF_FEW = 2.0
"""Of fewer elements than that, the one that sticks out most varies more, and both factors are so many times larger."""

_DEVIATIONS = 8.0
"""And how many deviations above it on a scale of powers, where the others vary: in a tensor of rare large updates."""

_NORMAL = 1.4826
"""Median absolute deviation to standard deviation."""

_FEWEST_OTHERS = 3
"""Fewer others than that are no measure; then only the range of all values is."""

_FEWEST_ELEMENTS = 16
"""Elements of which a mean change is a measure."""

_ROUNDING = 4.0
"""A change of so many units of the last place at the largest value is never a spike: rounding to and fro."""

_QUIET = 0.125
"""Least mean change that a spike is measured by, in units of the precision at the largest value: below, most elements
of a 16-bit tensor have not moved at all, and the few that did are no measure."""

_OUT_OF_RANGE = 8.0
"""How many times the largest value of both neighbours a change must be to be out of their range."""

_OUT_OF_RANGE_OF_FEW = 2.0**20
"""The same where there are too few elements for a mean change."""

_DIP = 2.0**24
"""How many times smaller than in both neighbours a value must be to have vanished. Values that cross zero come near it
by chance, the nearer the more there are: among 10⁸, to about 2⁻²⁰ of what they were."""

_DIPS_ARE_USUAL = 0.25
"""Part of the other checkpoints in which values may vanish until that tells nothing."""

_ALONE = 32.0
"""And how many times the mean change, so that it is a value and not the tensor that grew."""


def single_values(steps: Sequence[int], tensor: TensorStatistics) -> list[Finding]:
    """The values of a tensor that one checkpoint alone has: too large, or else too small.

    Args:
        steps: optimizer step of every checkpoint.
        tensor: what was measured of it.
    """
    found = _spikes(steps, tensor)
    told = {finding.step for finding in found}
    return found + [dip for dip in _dips(steps, tensor) if dip.step not in told]


def _spikes(steps: Sequence[int], tensor: TensorStatistics) -> list[Finding]:
    if len(tensor.held) < 2:
        return []
    relative = _relative(tensor)
    last = len(tensor.held) - 1
    found = {
        place: by for place in range(1, last) if (by := _judged(tensor, place, relative[1:last], place - 1, _FACTOR))
    }
    jumps = [change / _scale(tensor, rest) for change, rest in zip(tensor.change, tensor.rest, strict=True)][1:]
    for place, beside, own in ((0, 1, 0), (last, last - 1, last - 1)):
        if beside not in found and (by := _judged(tensor, place, jumps, own, _FACTOR_AT_AN_END)):
            found[place] = by
    return [
        Finding(
            "spike",
            steps[tensor.held[place]],
            tensor.name,
            f"step {steps[tensor.held[place]]}: a value of tensor {tensor.name!r} is off by {tensor.spike[place]:.3g}, "
            f"{by}.",
        )
        for place, by in sorted(found.items())
    ]


def _dips(steps: Sequence[int], tensor: TensorStatistics) -> list[Finding]:
    """Values of a tensor that are almost 0 in one checkpoint alone, as with a damaged exponent."""
    has_dip = [dip > _DIP for dip in tensor.dip]
    if sum(has_dip) - 1 > _DIPS_ARE_USUAL * (len(has_dip) - 1):
        return []
    return [
        Finding(
            "dip",
            steps[index],
            tensor.name,
            f"step {steps[index]}: a value of tensor {tensor.name!r} is {dip:.3g} times smaller than in the "
            "checkpoints beside it.",
        )
        for index, dip, is_dip in zip(tensor.held, tensor.dip, has_dip, strict=True)
        if is_dip
    ]


def _relative(tensor: TensorStatistics) -> list[float]:
    """Every spike in units of the mean change over both intervals beside it, their geometric mean; 0 at both ends."""
    return [
        tensor.spike[place] / _scale(tensor, math.sqrt(tensor.rest[place]) * math.sqrt(tensor.rest[place + 1]))
        if 0 < place < len(tensor.held) - 1
        else 0.0
        for place in range(len(tensor.held))
    ]


def _scale(tensor: TensorStatistics, distance: float) -> float:
    """A mean change; not less than rounding makes."""
    least = _QUIET * tensor.precision * statistics.median(tensor.largest)
    return max(distance / tensor.numel, least, sys.float_info.min)


def _judged(tensor: TensorStatistics, place: int, relative: Sequence[float], own: int, factor: float) -> str | None:
    """By how much the value that sticks out most of a checkpoint does; None if it is no spike.

    Args:
        tensor: what was measured of it.
        place: which checkpoint of those that hold it.
        relative: spikes, or changes, in units of the mean change.
        own: which of them is that of the checkpoint.
        factor: how many times the median of the others it must be.
    """
    spike = tensor.spike[place]
    factor *= _FACTOR_OF_FEW if tensor.numel < _FEW_ELEMENTS else 1.0
    if spike <= _ROUNDING * tensor.precision * statistics.median(tensor.largest):
        return None
    largest = max(tensor.largest[other] for other in (place - 1, place + 1) if 0 <= other < len(tensor.held))
    is_small = tensor.numel < _FEWEST_ELEMENTS
    usual = statistics.median(other for at, other in enumerate(tensor.spike) if at != place)
    if (
        not is_small
        and spike > usual
        and (by := _over_median(relative[own], [*relative[:own], *relative[own + 1 :]], factor))
    ):
        return f"{by:.3g} times as far as is usual"
    if spike > (_OUT_OF_RANGE_OF_FEW if is_small else _OUT_OF_RANGE) * largest and (
        is_small or relative[own] > min(_ALONE, tensor.numel)
    ):
        return "far out of the range of all values beside it"
    return None


def _over_median(value: float, others: Sequence[float], factor: float) -> float | None:
    """How many times the median a value is, if that is by far more than usual: by a factor, and by how others vary."""
    if len(others) < _FEWEST_OTHERS or value == 0:
        return None
    median = max(statistics.median(others), 1.0)
    logs = [math.log(max(other, 1.0) / median) for other in others]
    deviation = _NORMAL * statistics.median(abs(each) for each in logs)
    return value / median if math.log(value / median) > max(math.log(factor), _DEVIATIONS * deviation) else None
