"""Stage *health*: what is measured of a piece of a tensor, checkpoint after checkpoint, and put together for the whole.

Differences are taken in float32 (float64 where any checkpoint is). A thread holds three pieces at a time, whatever the
number of checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ckavg.engine.tiles import TORCH_DTYPES
from ckavg.health.plan import PIECE, Tensor
from ckavg.health.values import TensorStatistics
from ckavg.path.measure import is_extreme, scaled, times_power

NAN, INFINITE, LARGEST, DISTANCE, REST, CHANGE, SPIKE, DIP, ACROSS = range(9)
_LARGEST_OF_ALL = [LARGEST, CHANGE, SPIKE, DIP]
_SUMS = [NAN, INFINITE, DISTANCE, REST, ACROSS]

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
"""Integers as wide as each floating dtype: without the sign bit, they are in the order of the absolute values."""

_TINY = 2.0**-40
"""Part of the largest value below which another one is looked at: among 10⁸ weights, the smallest is about 2⁻³⁰."""

_DOMINATES = 0.5
"""Part of a float32 sum from which on its largest term leaves too few digits to the others."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Of the numbers that are no infinities: how many, their mean, and the sum of their squared deviations from that.

    The latter two are in units of 2^exponent, which is 1 but for extreme numbers.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    exponent: int = 0

    def __add__(self, other: Moments) -> Moments:
        """Those of both together, in the larger unit."""
        if not self.count or not other.count:
            return self if self.count else other
        unit = max(self.exponent, other.exponent)
        (mean, squares), (its_mean, its_squares) = self._in_unit(unit), other._in_unit(unit)
        apart, total = its_mean - mean, self.count + other.count
        squares += its_squares + apart * apart * (self.count * other.count / total)
        return Moments(total, mean + apart * (other.count / total), squares, unit)

    def _in_unit(self, exponent: int) -> tuple[float, float]:
        down = self.exponent - exponent
        return math.ldexp(self.mean, down), math.ldexp(self.squares, 2 * down)

    @property
    def sigma(self) -> float:
        """Standard deviation, ddof = 1; 0 for a single number."""
        return scaled(math.sqrt(self.squares / (self.count - 1)), self.exponent) if self.count > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a piece.

    Attributes:
        rows: (9, checkpoints) float64, the rows as numbered above.
        moments: of the piece in the first checkpoint.
    """

    rows: NDArray[np.float64]
    moments: Moments


Load = Callable[[int], torch.Tensor]
"""From the place of a checkpoint among those that hold a tensor to the bytes of a piece there, as stored: (n,)."""


class PieceStatistics:
    """Measures one piece after another, in one thread."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        self._bits = torch.empty(PIECE * 8, dtype=torch.uint8)

    def measure(self, tensor: Tensor, size: int, load: Load) -> Measured:
        """Measure a piece of a floating tensor in all checkpoints that hold it.

        Args:
            tensor: of which it is a piece.
            size: its number of elements.
            load: reads it.
        """
        x, d, spare = self._workspace(tensor, size)
        last = len(tensor.held) - 1
        rows = np.zeros((9, last + 1))
        moments = Moments()
        finite: list[bool] = []
        masked: torch.Tensor | None = None
        tiny: list[int | None] = []
        for place in range(last + 1):
            now, before, earlier = x[place % 3], x[(place - 1) % 3], x[(place - 2) % 3]
            stored = load(place).view(TORCH_DTYPES[tensor.entries[place].dtype])
            now.copy_(stored)
            tiny.append(self._look_at(stored, now, rows[:, place]))
            finite.append(not rows[NAN, place] and not rows[INFINITE, place])
            if place == 0:
                masked = torch.isinf(now) if rows[INFINITE, 0] else None
                moments = _moments(now, masked)
                continue
            if masked is not None:
                masked &= now == before
            careful = not (finite[place] and finite[place - 1])
            total, rest, change = _compare(now, before, d[place % 2], careful=careful)
            rows[[DISTANCE, REST, CHANGE, SPIKE], place] = total, rest, change, change
            rows[DIP, place - 1] = _dip(tiny[place - 1], before, (now,) if place == 1 else (now, earlier))
            if place == 1:
                rows[SPIKE, 0] = change
                continue
            careful = not all(finite[place - 2 :])
            rows[ACROSS, place - 1] = _distance(now, earlier, spare, careful=careful)
            rows[SPIKE, place - 1] = _spike(d[0], d[1], spare, careful=careful)
        if masked is not None:
            rows[INFINITE] -= int(masked.sum())
        if last:
            rows[DIP, last] = _dip(tiny[last], x[last % 3], (x[(last - 1) % 3],))
        return Measured(rows, moments)

    def _look_at(self, stored: torch.Tensor, values: torch.Tensor, column: NDArray[np.float64]) -> int | None:
        """Note the largest absolute value and count what is not finite; the place of a tiny value, if there is one."""
        bits = stored.view(_BITS[stored.dtype])
        positive = torch.iinfo(bits.dtype).max
        spare = self._bits[: stored.nbytes].view(bits.dtype)
        absolute = torch.bitwise_and(bits, positive, out=spare)
        largest = float(absolute.amax().view(stored.dtype))
        if not math.isfinite(largest):
            finite = values[torch.isfinite(values)]
            column[NAN] = int(torch.isnan(values).sum())
            column[INFINITE] = len(values) - len(finite) - column[NAN]
            largest = float(finite.abs().amax()) if len(finite) else 0.0
        column[LARGEST] = largest
        least = absolute.amin()
        if not least:
            absolute.masked_fill_(absolute == 0, positive)  # which is a NaN
            least = absolute.amin()
        smallest = float(least.view(stored.dtype))
        return int(absolute.argmin()) if 0 < smallest < _TINY * largest else None

    def _workspace(self, tensor: Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Three pieces of weights, two of differences, and one to compute in."""
        wide = any(entry.dtype == "F64" for entry in tensor.entries)
        dtype = torch.float64 if wide else torch.float32
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.empty(6, PIECE, dtype=dtype)
        buffers = self._buffers[dtype][:, :size]
        return buffers[:3], buffers[3:5], buffers[5]


class Gathered:
    """The statistics of one tensor, put together from its pieces in their order."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._rows = np.zeros((9, len(tensor.held)))
        self._count = 0
        self._moments = Moments()

    def add(self, size: int, piece: Measured) -> None:
        """Take the next piece."""
        rows = piece.rows
        self._rows[_SUMS] += rows[_SUMS]
        self._rows[_LARGEST_OF_ALL] = np.maximum(self._rows[_LARGEST_OF_ALL], rows[_LARGEST_OF_ALL])
        self._moments += piece.moments
        self._count += size

    def result(self) -> TensorStatistics:
        """The statistics of the whole tensor."""
        rows = [tuple(row) for row in self._rows.tolist()]
        return TensorStatistics(
            name=self._tensor.name,
            numel=self._count,
            precision=max(torch.finfo(TORCH_DTYPES[entry.dtype]).eps for entry in self._tensor.entries),
            held=self._tensor.held,
            mean=scaled(self._moments.mean, self._moments.exponent),
            sigma=self._moments.sigma,
            nan=tuple(map(int, rows[NAN])),
            infinite=tuple(map(int, rows[INFINITE])),
            largest=rows[LARGEST],
            distance=rows[DISTANCE],
            rest=rows[REST],
            change=rows[CHANGE],
            spike=rows[SPIKE],
            dip=rows[DIP],
            across=rows[ACROSS],
        )


def _spike(before: torch.Tensor, after: torch.Tensor, across: torch.Tensor, *, careful: bool) -> float:
    """How far a value lies outside of its neighbours: |a| + |b| − |a + b| is 2 min(|a|, |b|) or 0, by the signs.

    Args:
        before, after: (n,) |x_k − x_{k−1}| and |x_{k+1} − x_k|.
        across: (n,) |x_{k+1} − x_{k−1}|; used up.
        careful: whether some weights are not finite, so that the three do not belong together.
    """
    twice = torch.sub(before, across, out=across).add_(after)
    largest = float(twice.amax())
    if careful or not math.isfinite(largest):
        largest = float(torch.minimum(twice, 2 * torch.minimum(before, after).double()).amax())
    return max(0.0, largest / 2)


def _dip(tiny: int | None, values: torch.Tensor, beside: tuple[torch.Tensor, ...]) -> float:
    """How many times a tiny value is the lesser of what the same element is in the checkpoints beside it."""
    if tiny is None:
        return 0.0
    others = min(abs(float(each[tiny])) for each in beside)
    return others / abs(float(values[tiny])) if math.isfinite(others) else 0.0


def _compare(
    after: torch.Tensor, before: torch.Tensor, out: torch.Tensor, *, careful: bool
) -> tuple[float, float, float]:
    """Fill `out` with |after − before|; its sum, its sum without the largest, and the largest."""
    total = _distance(after, before, out, careful=careful)
    change = float(out.amax())
    if change <= _DOMINATES * total:
        return total, total - change, change
    rest = out.to(torch.float64, copy=True)
    rest[rest.argmax()] = 0.0
    others = float(rest.sum())
    return others + change, others, change


def _distance(after: torch.Tensor, before: torch.Tensor, out: torch.Tensor, *, careful: bool) -> float:
    """Fill `out` with |after − before|, at most the largest number there is, and return its sum.

    Args:
        after, before: (n,) weights.
        out: (n,) of the same dtype.
        careful: whether some of them are not finite; those count as unchanged.
    """
    if not careful:
        total = float(torch.sub(after, before, out=out).abs_().sum())
        if math.isfinite(total):
            return total
    wide = after.to(torch.float64, copy=True).sub_(before).abs_()
    wide.masked_fill_(~(torch.isfinite(after) & torch.isfinite(before)), 0.0)
    total = float(wide.sum())
    out.copy_(wide.clamp_(max=torch.finfo(out.dtype).max))
    return total


def _moments(values: torch.Tensor, masked: torch.Tensor | None) -> Moments:
    """Those about the first element: exactly no deviation where all are equal. Without what is masked."""
    values = values if masked is None else values[~masked]
    if not len(values):
        return Moments()
    wide = values.to(torch.float64, copy=True)
    exponent = 0
    if values.dtype == torch.float64 and is_extreme(largest := wide.abs().amax()):
        exponent = math.frexp(float(largest))[1]
        wide = times_power(wide, -exponent)
    first = float(wide[0])
    shifted = wide.sub_(first)
    mean = float(shifted.mean())
    return Moments(len(values), first + mean, float(shifted.sub_(mean).square_().sum()), exponent)
