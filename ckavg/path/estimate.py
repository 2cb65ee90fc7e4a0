"""Pass 1 on a sample: estimate the path from strips of every tensor, with its standard error.

A tensor's own path ℓ_p = a / σ is a ratio of two means over its elements: a, of the absolute differences up to some
step, and σ², of the squared deviations of θ_0. A tensor is divided into equal parts with one strip in each; the strips
count as drawn at random. The jackknife removes the bias of the ratio and gives its variance: how much the ratio moves
when one strip at a time is left out (Efron and Stein, The Jackknife Estimate of Variance, 1981). Tensors are
independent.

It always computes on the CPU: the strips are too small to be worth sending to a GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckavg.checkpoints.run import Run
from ckavg.engine.blocks import SampledBlock
from ckavg.engine.context import Context
from ckavg.engine.stream import by_tensor, stream
from ckavg.engine.tiles import TileReader
from ckavg.path.cache import CachedPath
from ckavg.path.plan import PathPlan, PathReading
from ckavg.path.sampling import Sampling, cut_samples, plan_samples
from ckavg.path.sums import is_extreme, moved, times_power
from ckavg.path.table import PathLength, TensorPath, TensorPaths, ZeroSigma, refuse_infinite, to_measure


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over strips, a row each, in float64: the L1 distance of each step, Σ and Σ² of θ_0 minus its first element.

    Attributes:
        length: elements of each strip.
        distances: (strips, K).
        shifted: (strips, 2), in units of 2^exponent.
        exponent: 0 except for extreme spreads.
        infinite: (strips,) how many infinities of θ_0 are left out of the sums; None if there are none.
    """

    length: int
    distances: Tensor
    shifted: Tensor
    exponent: int = 0
    infinite: Tensor | None = None

    def to_json(self) -> list[Any]:
        """As JSON values."""
        infinite = None if self.infinite is None else self.infinite.tolist()
        return [self.length, self.distances.tolist(), self.shifted.tolist(), self.exponent, infinite]

    @classmethod
    def from_json(cls, values: list[Any]) -> _Sums:
        """From JSON values."""
        length, distances, shifted, exponent, infinite = values
        return cls(length, _tensor(distances), _tensor(shifted), exponent, infinite and _tensor(infinite))


def _to_json(sums: tuple[_Sums, ...]) -> list[Any]:
    return [each.to_json() for each in sums]


def _from_json(rows: list[Any]) -> tuple[_Sums, ...]:
    return tuple(map(_Sums.from_json, rows))


def _tensor(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


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
        fraction: how much of each tensor to read, in (0, 1); more of small tensors.
        exclude: shell patterns of tensor names to leave out.
        zero_sigma, allow_nonfinite, context, few: see `estimate_paths`.

    Raises:
        CkavgError: see `estimate_paths`.
    """
    names = tuple(sorted(to_measure(run.tensors, exclude)))
    plan = PathPlan(exclude, names, CachedPath.empty(run, names), fraction, 0)
    (path,) = estimate_paths(
        run, PathReading.single(plan), zero_sigma=zero_sigma, allow_nonfinite=allow_nonfinite, context=context, few=few
    )
    return path


def estimate_paths(
    run: Run,
    reading: PathReading,
    *,
    zero_sigma: ZeroSigma = "exclude",
    allow_nonfinite: bool = False,
    context: Context | None = None,
    few: bool | None = None,
    key: object = None,
) -> tuple[PathLength, ...]:
    """Estimate the paths of several selections of a run in one reading; each is the same as if estimated alone.

    Args:
        run: all checkpoints that any of them visits, by step.
        reading: which tensors count, how much of each to read, and which checkpoints each path visits.
        zero_sigma: how tensors without spread count; see `PathLength`.
        allow_nonfinite: leave out tensors that hold NaN or infinity, instead of raising.
        context: how the pass runs.
        few: read few long strips rather than many short ones; None: only for a remote run.
        key: identifies the checkpoints, if several processes estimate together.

    Raises:
        NonFiniteError: the sample holds NaN or infinity.
        TruncatedShardError, ReadError: a file changed or cannot be read.
    """
    context = context or Context()
    entries = {name: run.tensors[name] for name in reading.plans[0].names}
    samples = plan_samples(run, entries, reading.sample, few=few)
    units = cut_samples(entries, samples)

    def make_worker(reader: TileReader) -> _Worker:
        return _Worker(run, reading, reader, allow_nonfinite=allow_nonfinite)

    read = [run.checkpoints[index] for index in reading.to_read]
    journal = None
    if context.ranks.is_shared:
        request = repr((key, reading.places, reading.plans[0].names, reading.sample, few, allow_nonfinite))
        journal = context.ranks.journal("sample", hashlib.sha256(request.encode()).hexdigest(), _to_json, _from_json)
    streamed = stream("path", read, units, make_worker, context, journal)
    grouped = by_tensor(units, streamed.results)
    paths = []
    for number, places in enumerate(reading.places):
        tensors = TensorPaths.of(
            {name: _estimated(samples[name], [sums[number] for sums in grouped[name]]) for name in entries}
        )
        if not allow_nonfinite:
            refuse_infinite(tensors)
        steps = tuple(run.steps[index] for index in places)
        paths.append(PathLength(steps, tensors, zero_sigma, streamed.bytes_read, reading.sample))
    return tuple(paths)


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
    """The sums of each step from the means of the absolute differences up to each step."""
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
        finite: (…) the same for the sums of θ_0 and its square.
        numel: elements of the tensor.
        unit: the exponent of those units.
    """
    first, second = (weighted[..., place] / finite.clamp(min=1e-300) for place in (-2, -1))
    variance = (second - first.square()).clamp(min=0)
    sigma = (variance * numel / max(numel - 1, 1)).sqrt()
    return weighted[..., :-2] / weight[..., None], times_power(sigma, unit)


class _Worker:
    """Sums one unit of the sample after another, for each path, in one thread."""

    def __init__(self, run: Run, reading: PathReading, reader: TileReader, *, allow_nonfinite: bool) -> None:
        self._run = run
        place = {index: place for place, index in enumerate(reading.to_read)}
        self._visits = reading.visits
        self._paths = [[place[index] for index in places] for places in reading.places]
        self._allow_nonfinite = allow_nonfinite
        self._reader = reader

    def __call__(self, unit: SampledBlock) -> tuple[_Sums, ...]:
        of_paths = self._sum(unit, torch.float32)
        careful: list[_Sums] = []
        for number, sums in enumerate(of_paths):
            if not bool(torch.isfinite(sums.distances).all() and torch.isfinite(sums.shifted).all()):
                for start, stop in () if self._allow_nonfinite else unit.ranges:
                    self._reader.refuse_nonfinite(unit.name, start, stop, self._paths[number])
                careful = careful or self._sum(unit, torch.float64, careful=True)
                of_paths[number] = careful[number]
        return tuple(of_paths)

    def _sum(self, unit: SampledBlock, dtype: torch.dtype, *, careful: bool = False) -> list[_Sums]:
        if self._run.is_wide(unit.name):
            dtype = torch.float64
        free: list[Tensor] = []
        held: dict[int, Tensor] = {}
        anchors: dict[int, _Sums] = {}
        distances: dict[tuple[int, int], Tensor] = {}
        for visit in self._visits:
            tile = free.pop() if free else torch.empty(len(unit.starts), unit.length, dtype=dtype)
            self._reader.gather(visit.place, unit.name, unit.starts, tile)
            if visit.is_anchor:
                anchors[visit.place] = self._anchor(unit, visit.place, tile, careful=careful)
            for first, is_done in visit.pairs:
                out = held[first] if is_done else torch.empty_like(tile)
                moves = moved(held[first], tile, out, careful=careful)
                distances[first, visit.place] = moves.sum(dim=1, dtype=torch.float64)
                free += [held.pop(first)] if is_done else []
            if visit.is_held:
                held[visit.place] = tile
            else:
                free.append(tile)
        return [
            dataclasses.replace(
                anchors[places[0]],
                distances=torch.stack([distances[pair] for pair in itertools.pairwise(places)], dim=1),
            )
            for places in self._paths
        ]

    def _anchor(self, unit: SampledBlock, place: int, anchor: Tensor, *, careful: bool) -> _Sums:
        """The moments of an anchor, without any distance."""
        shifted = anchor.double() - self._reader.first_finite(unit.name, place)
        infinite, exponent = None, 0
        if careful:
            shifted.masked_fill_(torch.isinf(anchor), 0.0)
            infinite = torch.isinf(anchor).sum(dim=1).double()
        if anchor.dtype == torch.float64 and is_extreme(largest := shifted.abs().amax()):
            exponent = math.frexp(float(largest))[1]
            shifted = times_power(shifted, -exponent)
        moments = torch.stack([shifted.sum(dim=1), shifted.square().sum(dim=1)], dim=1)
        return _Sums(unit.length, moments[:, :0], moments, exponent, infinite)
