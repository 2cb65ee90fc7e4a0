"""Pass 1 from a sample: the path estimated from strips of every tensor, with its standard error.

A tensor's own path ℓ_p = a / σ is a ratio of two means over its elements: a, of the absolute differences up to some
step, and σ², of the squared deviations of θ_0. The strips lie one in each of equal parts of the tensor, and are taken
as if they were drawn at random. The jackknife takes the bias from the ratio and gives its variance: how much it moves
when one strip after another is left out (Efron and Stein, The Jackknife Estimate of Variance, 1981). Tensors are
independent.

The arithmetic is the CPU's whatever the device: it is little, and the pieces are too small to be sent anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ckavg.checkpoints.run import Run
from ckavg.engine.blocks import SampledBlock
from ckavg.engine.context import Context
from ckavg.engine.stream import by_tensor, stream
from ckavg.engine.tiles import TileReader
from ckavg.path.measure import is_extreme, moved, times_power
from ckavg.path.sampling import Sampling, cut_samples, plan_samples
from ckavg.path.table import PathLength, TensorPath, ZeroSigma, refuse_infinite, to_measure


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of some strips, in float64: the L1 distance of each step, Σ and Σ² of θ_0 less its first element; a row each.

    Attributes:
        length: elements of each strip.
        distances: (strips, K).
        shifted: (strips, 2), in units of 2^exponent.
        exponent: 0 but for extreme spreads.
        infinite: (strips,) how many infinities of θ_0 are not in them; None where there are none.
    """

    length: int
    distances: Tensor
    shifted: Tensor
    exponent: int = 0
    infinite: Tensor | None = None


def estimate(
    run: Run,
    fraction: float,
    *,
    exclude: tuple[str, ...] = (),
    zero_sigma: ZeroSigma = "exclude",
    allow_nonfinite: bool = False,
    context: Context | None = None,
    few: bool | None = None,
) -> PathLength:
    """Estimate the path length of a run from a fraction of each tensor.

    Args:
        run: the checkpoints, the anchor first.
        fraction: how much of each tensor is read, in (0, 1); of small tensors more.
        exclude: shell patterns of tensor names that do not count.
        zero_sigma: what becomes of tensors without spread; see `PathLength`.
        allow_nonfinite: tensors that hold NaN or infinity do not count, instead of ending the pass.
        context: how the pass runs.
        few: whether few long strips are read rather than many short ones; None: by where the run is.

    Raises:
        NonFiniteError: the sample holds NaN or infinity, and may not.
        TruncatedShardError, ReadError: a file changed or cannot be read.
    """
    context = context or Context()
    entries = to_measure(run.tensors, exclude)
    samples = plan_samples(run, entries, fraction, few=few)
    units = cut_samples(entries, samples)

    def make_worker(reader: TileReader) -> _Worker:
        return _Worker(run, reader, allow_nonfinite=allow_nonfinite)

    streamed = stream("path", run.checkpoints, units, make_worker, context)
    of_tensor = by_tensor(units, streamed.results)
    tensors = {name: _estimated(samples[name], of_tensor[name]) for name in entries}
    if not allow_nonfinite:
        refuse_infinite(tensors)
    return PathLength(run.steps, tensors, zero_sigma, streamed.bytes_read, fraction)


def _estimated(sampling: Sampling, parts: Sequence[_Sums]) -> TensorPath:
    """σ, distances and the variance of ℓ_p from the sums of the strips."""
    numel = sampling.numel
    lengths = torch.tensor([part.length for part in parts for _ in range(len(part.shifted))], dtype=torch.float64)
    is_whole = sampling.fraction == 1
    weights = lengths if is_whole else torch.tensor(sampling.weights, dtype=torch.float64)
    unit = max((part.exponent for part in parts if part.shifted[:, 1].any()), default=0)
    sums = torch.cat([torch.cat([part.distances, _in_unit(part, unit)], dim=1) for part in parts])
    sums[:, :-2] = sums[:, :-2].cumsum(dim=1)
    weighted = sums * (weights / lengths)[:, None]
    finite = weights
    if any(part.infinite is not None for part in parts):
        none = torch.zeros(len(weights), dtype=torch.float64)
        absent = torch.cat([none[: len(part.shifted)] if part.infinite is None else part.infinite for part in parts])
        finite = weights - weights * (absent / lengths)
    path, sigma = _path_and_sigma(weighted.sum(dim=0), weights.sum(), finite.sum(), numel, unit)
    if is_whole or sigma == 0:
        return _as_path(numel, path, sigma, torch.zeros_like(path))
    left_out = weighted.sum(dim=0) - weighted, weights.sum() - weights, finite.sum() - finite
    paths, sigmas = _path_and_sigma(*left_out, numel, unit)
    lengths_without = paths / sigmas.clamp(min=sigma / 1000)[:, None]
    strips, mean = len(weights), lengths_without.mean(dim=0)
    spread = (lengths_without - mean).square().sum(dim=0)
    variances = (strips - 1) / strips * spread * (1 - sampling.fraction)
    unbiased = strips * path - (strips - 1) * mean * sigma
    return _as_path(numel, unbiased, sigma, variances)


def _as_path(numel: int, path: Tensor, sigma: Tensor, variances: Tensor) -> TensorPath:
    """From means of the absolute differences up to each step to their sums in each step."""
    distances = torch.diff(path, prepend=path.new_zeros(1)).clamp(min=0) * numel
    return TensorPath(numel, float(sigma), tuple(distances.tolist()), tuple(variances.tolist()))


def _in_unit(part: _Sums, unit: int) -> Tensor:
    """(strips, 2) `shifted` in units of 2^unit."""
    if part.exponent == unit or not part.shifted[:, 1].any():
        return part.shifted
    down = 2.0 ** max(part.exponent - unit, -500)
    return part.shifted * torch.tensor([down, down * down], dtype=torch.float64)


def _path_and_sigma(weighted: Tensor, weight: Tensor, finite: Tensor, numel: int, unit: int) -> tuple[Tensor, Tensor]:
    """Means of the absolute differences up to each step, and σ with ddof = 1 over all elements.

    Args:
        weighted: (…, K + 2) sums: the differences up to each step, then θ_0 and its square in units of 2^unit.
        weight: (…) how many elements the sums stand for.
        finite: (…) the same of those of θ_0 and its square.
        numel: elements of the tensor.
        unit: see there.
    """
    first, second = (weighted[..., place] / finite.clamp(min=1e-300) for place in (-2, -1))
    variance = (second - first.square()).clamp(min=0)
    sigma = (variance * numel / max(numel - 1, 1)).sqrt()
    return weighted[..., :-2] / weight[..., None], times_power(sigma, unit)


class _Worker:
    """The sample of one unit after another, in one thread."""

    def __init__(self, run: Run, reader: TileReader, *, allow_nonfinite: bool) -> None:
        self._run = run
        self._allow_nonfinite = allow_nonfinite
        self._reader = reader

    def __call__(self, unit: SampledBlock) -> _Sums:
        sums = self._sum(unit, torch.float32)
        if not bool(torch.isfinite(sums.distances).all() and torch.isfinite(sums.shifted).all()):
            for start, stop in () if self._allow_nonfinite else unit.ranges:
                self._reader.refuse_nonfinite(unit.name, start, stop)
            return self._sum(unit, torch.float64, careful=True)
        return sums

    def _sum(self, unit: SampledBlock, dtype: torch.dtype, *, careful: bool = False) -> _Sums:
        if self._run.is_wide(unit.name):
            dtype = torch.float64
        shape = len(unit.starts), unit.length
        before, after = (torch.empty(shape, dtype=dtype) for _ in range(2))
        self._load(0, unit, before)
        shifted = before.double() - self._reader.first_finite(unit.name)
        infinite, exponent = None, 0
        if careful:
            shifted.masked_fill_(torch.isinf(before), 0.0)
            infinite = torch.isinf(before).sum(dim=1).double()
        if dtype == torch.float64 and is_extreme(largest := shifted.abs().amax()):
            exponent = math.frexp(float(largest))[1]
            shifted = times_power(shifted, -exponent)
        moments = torch.stack([shifted.sum(dim=1), shifted.square().sum(dim=1)], dim=1)
        distances = []
        for index in range(1, len(self._run.checkpoints)):
            self._load(index, unit, after)
            distances.append(moved(before, after, careful=careful).sum(dim=1, dtype=torch.float64))
            before, after = after, before
        return _Sums(unit.length, torch.stack(distances, dim=1), moments, exponent, infinite)

    def _load(self, index: int, unit: SampledBlock, out: Tensor) -> None:
        self._reader.gather(index, unit.name, unit.starts, out)
