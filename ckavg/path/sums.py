"""Pass 1, the arithmetic: sums of a tile by chunk with torch, formed in one fixed order.

Differences are taken in float32 (float64 for float64 checkpoints), and 16 of them are added up so; everything else is
in float64.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from ckavg.engine.blocks import CHUNK, COLUMNS

_SUMMED_IN_WORK_DTYPE = CHUNK // COLUMNS
EXTREME = 400
"""Exponents beyond which, either way, squares of float64 numbers are formed in another unit."""

_LARGE = 2.0**1000
MOST_ROWS = 16
"""Steps whose lanes are kept until they are summed: 1 MiB each in a tile of a whole block."""

MOMENTS = 4
"""What follows the distances of a path in a row: Σ and Σ² of θ_0 about its first element, in units of 2^exponent, then
that exponent, which is 0 but for extreme spreads, and how many infinities are not in them."""


class TileDistances:
    """The L1 distances of a tile by chunk.

    Args:
        lanes: (steps kept at once, chunks, lanes) memory to compute in.
        careful: as of `moved`.
    """

    def __init__(self, lanes: Tensor, *, careful: bool) -> None:
        self._lanes = lanes
        self._careful = careful
        self._filled = 0
        self._rows: list[Tensor] = []

    def add(self, before: Tensor, after: Tensor, out: Tensor) -> None:
        """Take the next pair; `out` is memory to compute in, which may be that of `before`."""
        _sum(_in_lanes(moved(before, after, out, careful=self._careful)), dim=1, out=self._lanes[self._filled])
        self._filled += 1
        if self._filled == len(self._lanes):
            self._add_up()

    def rows(self) -> list[Tensor]:
        """(steps, chunks) float64, in pieces."""
        if self._filled:
            self._add_up()
        return self._rows

    def _add_up(self) -> None:
        self._rows.append(_sum(self._lanes[: self._filled], dim=2, dtype=torch.float64))
        self._filled = 0


def moments(anchor: Tensor, first: float, size: int) -> Tensor:
    """(MOMENTS, chunks) float64 of a tile of θ_0.

    Args:
        anchor: (n,) whole chunks of float32 or float64.
        first: the first finite element of its tensor.
        size: elements of the tile; what lies behind them is 0.
    """
    shifted = anchor.to(torch.float64, copy=True)
    shifted[:size] -= first
    exponents, infinite = shifted.new_zeros(2, len(anchor) // CHUNK)
    if anchor.dtype == torch.float64 and is_extreme(_largest(_in_lanes(shifted))):
        shifted, exponents, infinite = _scaled_shift(anchor, first, size)
    total = _sum(_sum(_in_lanes(shifted), dim=1), dim=1)
    squares = _sum(_sum(_in_lanes(shifted.square_()), dim=1), dim=1)
    return torch.stack([total, squares, exponents, infinite])


def _scaled_shift(anchor: Tensor, first: float, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """θ_0 less its first element in a unit for each chunk, its exponent, and how many infinities are left out."""
    infinite = torch.isinf(anchor)
    values = anchor.masked_fill(infinite, first)
    values[size:] = first
    lanes = _in_lanes(values)
    large = 2.0 * (_largest(lanes).clamp(min=abs(first)) > _LARGE).double()  # no difference may overflow
    unit = torch.exp2(-large)[:, None, None]
    shifted = lanes * unit - first * unit
    exponents = torch.frexp(_largest(shifted)).exponent.double()
    exponents = torch.where(exponents.abs() > EXTREME, exponents, 0.0)
    for part in (exponents / 2).floor(), (exponents / 2).ceil():
        shifted = shifted * torch.exp2(-part)[:, None, None]
    return shifted.view(-1), exponents + large, _in_lanes(infinite).sum(dim=(1, 2)).double()


def moved(before: Tensor, after: Tensor, out: Tensor, *, careful: bool) -> Tensor:
    """|after − before|.

    Args:
        before, after: weights of two checkpoints, of one shape and dtype.
        out: where it goes; it may be `before`.
        careful: whether there may be infinities; what is the same one on both sides has not moved.
    """
    same = torch.isinf(after) & (after == before) if careful else None
    torch.sub(after, before, out=out).abs_()
    return out if same is None else out.masked_fill_(same, 0.0)


def times_power(values: Tensor, exponent: int) -> Tensor:
    """The values times 2^exponent, in two steps: the power itself may be beyond float64."""
    return values * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def scaled(value: float, exponent: int) -> float:
    """The value times 2^exponent, infinite where that is too large."""
    return math.ldexp(value, exponent) if math.frexp(value)[1] + exponent <= sys.float_info.max_exp else math.inf


def is_extreme(largest: Tensor) -> bool:
    """Whether squares of values may be too large or too small for float64, by the largest absolute values of each."""
    regular = (largest == 0) | ((largest > 2.0**-EXTREME) & (largest < 2.0**EXTREME))
    return not bool(regular.all())


def _largest(lanes: Tensor) -> Tensor:
    """(chunks,) the largest absolute value of each chunk; NaN where it holds any."""
    return lanes.abs().amax(dim=(1, 2))


def _in_lanes(values: Tensor) -> Tensor:
    return values.view(-1, _SUMMED_IN_WORK_DTYPE, COLUMNS)


def _sum(values: Tensor, dim: int, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Sum over a dimension of 2ⁿ elements, always in the same order.

    On a GPU, torch's order hangs on the shape of the whole, and so on the tile: halves are added there instead.
    """
    if values.device.type == "cpu":
        return torch.sum(values, dim, dtype=dtype, out=out)
    total = sum_by_halves(values if dtype is None else values.to(dtype), dim)
    return total if out is None else out.copy_(total)


def sum_by_halves(values: Tensor, dim: int) -> Tensor:
    """Sum over a dimension of 2ⁿ elements: its second half added to its first, until one is left."""
    while values.shape[dim] > 1:
        first, second = values.chunk(2, dim)
        values = first + second
    return values.squeeze(dim)
