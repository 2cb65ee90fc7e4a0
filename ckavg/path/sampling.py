"""Stage *path*: which strips of a tensor to read for an estimate. Pure, and the same on every machine."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckavg.checkpoints.run import Run, TensorInfo
from ckavg.engine.blocks import CHUNK, TILE, SampledBlock

MANY = 1 << 16
"""About how many strips of a model to read. Weights of one row of a matrix move alike, so many short strips tell more
than few long ones: the error falls with the square root of their number, whatever their length."""

MANY_FAR = 1 << 12
"""The same for a remote run, where each strip of each checkpoint is a request."""

UNIT, UNIT_FAR = 32, 1024
"""Elements of the shortest strip, for a local and a remote run."""

_FEWEST = 8


@dataclass(frozen=True, slots=True)
class Sampling:
    """The strips of one tensor.

    Attributes:
        numel: elements of the tensor.
        starts: first element of each strip, ascending.
        length: elements of each strip.
        weights: how many elements each strip stands for; they sum to `numel`.
    """

    numel: int
    starts: tuple[int, ...]
    length: int
    weights: tuple[float, ...]

    @property
    def elements(self) -> int:
        """Elements to read."""
        return len(self.starts) * self.length

    @property
    def fraction(self) -> float:
        """The fraction of the tensor to read, in (0, 1]."""
        return self.elements / self.numel


def plan_samples(
    run: Run, entries: Mapping[str, TensorInfo], fraction: float, *, few: bool | None = None
) -> dict[str, Sampling]:
    """The strips of the tensors of a run; with `few`, or for a remote run, fewer and longer ones."""
    many, unit = (MANY_FAR, UNIT_FAR) if (run.home != run.source if few is None else few) else (MANY, UNIT)
    return choose_samples({name: entry.numel for name, entry in entries.items()}, fraction, many=many, unit=unit)


def choose_samples(
    sizes: Mapping[str, int], fraction: float, *, many: int = MANY, unit: int = UNIT
) -> dict[str, Sampling]:
    """Choose strips of all tensors: one of the same length at a random place in each of equal parts of a tensor.

    There are about 65,536 strips in all, and at least 8 of a tensor, so that its error can be estimated. If that would
    be half of a tensor or more, all of it is read. The places depend only on names and sizes.

    Args:
        sizes: number of elements of each tensor, at least 1.
        fraction: how much of each to read, in (0, 1).
        many: about how many strips there are in all.
        unit: the length of a strip is a multiple of this many elements.

    >>> chosen = choose_samples({"w": 8_000_000, "norm": 512}, 0.01)
    >>> chosen["w"].length, len(chosen["w"].starts), chosen["norm"]
    (32, 2500, Sampling(numel=512, starts=(0,), length=512, weights=(512.0,)))
    """
    strips = fraction * sum(sizes.values()) / many
    length = min(CHUNK, math.ceil(strips / unit) * unit)
    return {
        name: _sample(name, numel, max(_FEWEST, math.ceil(fraction * numel / length)), length)
        for name, numel in sizes.items()
    }


def _sample(name: str, numel: int, count: int, length: int) -> Sampling:
    if 2 * count * length >= numel:
        return Sampling(numel, (0,), numel, (float(numel),))
    slots = numel // length
    choose = random.Random(f"{name}:{numel}")  # noqa: S311 - a sample, not a secret
    bounds = [place * slots // count for place in range(count + 1)]
    spans = list(itertools.pairwise(bounds))
    return Sampling(
        numel,
        tuple(length * choose.randrange(low, high) for low, high in spans),
        length,
        tuple(numel * (high - low) / slots for low, high in spans),
    )


def cut_samples(entries: Mapping[str, TensorInfo], samples: Mapping[str, Sampling]) -> tuple[SampledBlock, ...]:
    """The strips of all tensors as units of work, in the order of their bytes in the files."""
    in_file_order = sorted(samples, key=lambda name: (entries[name].shard, entries[name].offset))
    return tuple(unit for name in in_file_order for unit in _units(name, samples[name]))


def _units(name: str, sampling: Sampling) -> Iterator[SampledBlock]:
    if sampling.length > TILE:  # a tensor that is read whole
        for start in range(0, sampling.numel, TILE):
            stop = min(start + TILE, sampling.numel)
            yield SampledBlock(name, start, stop, (start,), stop - start)
        return
    most = TILE // sampling.length
    for place in range(0, len(sampling.starts), most):
        starts = sampling.starts[place : place + most]
        yield SampledBlock(name, starts[0], starts[-1] + sampling.length, starts, sampling.length)
