"""Stage *health*: single values that one checkpoint has and its neighbours have not, too large or too small. Pure.

A spike is how far the value that sticks out most lies from both neighbours. In units of the mean change of its tensor
over the quieter of the two intervals, it is much the same along a sound run, however heavy the tails of a tensor are:
so it is compared with the median of the other checkpoints, and with how much those vary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence

from ckavg.health.values import Finding, TensorStatistics

_FACTOR = 3.0
"""How many times the median a spike must be, whatever the others are."""

_FACTOR_AT_AN_END = 6.0
"""The same of the first and the last checkpoint, whose change nothing says was taken back."""

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

_DIP = 2.0**24
"""How many times smaller than in both neighbours a value must be to have vanished. Values that cross zero come near it
by chance, the nearer the more there are: among 10⁸, to about 2⁻²⁰ of what they were."""

_DIPS_ARE_USUAL = 0.25
"""Part of the other checkpoints in which values may vanish until that tells nothing."""

_ALONE = 32.0
"""And how many times the mean change, so that it is a value and not the tensor that grew."""


def spikes(steps: Sequence[int], tensor: TensorStatistics, *, elsewhere: Collection[int]) -> list[Finding]:
    """The spikes of a tensor.

    Args:
        steps: optimizer step of every checkpoint.
        tensor: what was measured of it.
        elsewhere: indices of checkpoints that are told to be foreign in this tensor, and not told again.
    """
    if len(tensor.held) < 2:
        return []
    relative = _relative(tensor)
    inner = {place for place in range(1, len(tensor.held) - 1) if _is_spike(tensor, relative, place)}
    ends = {
        place
        for place, beside in ((0, 1), (len(tensor.held) - 1, len(tensor.held) - 2))
        if beside not in inner and _is_spike_at_end(tensor, place)
    }
    found = []
    for place in sorted(inner | ends):
        step = steps[tensor.held[place]]
        if tensor.held[place] not in elsewhere:
            usual = _usual(tensor, place)
            by = f"{tensor.spike[place] / usual:.3g} times the usual" if usual > 0 else "where nothing else moves"
            message = f"step {step}: a value of tensor {tensor.name!r} is off by {tensor.spike[place]:.3g}, {by}."
            found.append(Finding("spike", step, tensor.name, message))
    return found


def dips(steps: Sequence[int], tensor: TensorStatistics) -> list[Finding]:
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
    """Every spike in units of the mean change over the quieter interval beside it; 0 at both ends."""
    return [
        tensor.spike[place] / _scale(tensor, min(tensor.rest[place], tensor.rest[place + 1]))
        if 0 < place < len(tensor.held) - 1 and tensor.spike[place]
        else 0.0
        for place in range(len(tensor.held))
    ]


def _scale(tensor: TensorStatistics, distance: float) -> float:
    return max(distance / tensor.numel, _QUIET * tensor.precision * statistics.median(tensor.largest), 5e-324)


def _is_spike(tensor: TensorStatistics, relative: Sequence[float], place: int) -> bool:
    others = [relative[other] for other in range(1, len(relative) - 1) if other != place]
    return _may_be(tensor, place) and (
        _is_out_of_range(tensor, place, relative[place]) or _stands_out(relative[place], others, _FACTOR)
    )


def _is_spike_at_end(tensor: TensorStatistics, place: int) -> bool:
    """The same of the first or the last checkpoint, by the largest change of the one interval there is."""
    jumps = [change / _scale(tensor, rest) for change, rest in zip(tensor.change, tensor.rest, strict=True)][1:]
    own = jumps.pop(0 if place == 0 else -1)
    return _may_be(tensor, place) and (
        _is_out_of_range(tensor, place, own) or _stands_out(own, jumps, _FACTOR_AT_AN_END)
    )


def _may_be(tensor: TensorStatistics, place: int) -> bool:
    """Whether it is more than rounding."""
    return tensor.spike[place] > _ROUNDING * tensor.precision * statistics.median(tensor.largest)


def _is_out_of_range(tensor: TensorStatistics, place: int, relative: float) -> bool:
    beside = [tensor.largest[other] for other in (place - 1, place + 1) if 0 <= other < len(tensor.held)]
    return tensor.spike[place] > _OUT_OF_RANGE * max(beside) and relative > min(_ALONE, tensor.numel)


def _stands_out(value: float, others: Sequence[float], factor: float) -> bool:
    """Whether a value is far above the median of others, by a factor and by their own deviations on a log scale."""
    if len(others) < _FEWEST_OTHERS:
        return False
    median = statistics.median(others)
    if median == 0:
        return value > factor / _QUIET
    logs = [math.log(other / median) for other in others if other > 0]
    deviation = _NORMAL * statistics.median(abs(each) for each in logs)
    return math.log(value / median) > max(math.log(factor), _DEVIATIONS * deviation) if value > 0 else False


def _usual(tensor: TensorStatistics, place: int) -> float:
    """The median spike of the other checkpoints."""
    others = [spike for other, spike in enumerate(tensor.spike) if other != place]
    return statistics.median(others)
