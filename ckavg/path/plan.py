"""Plan what pass 1 reads. Looks only at file times and the cached table."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ckavg.checkpoints.run import Run, distinct_tables
from ckavg.errors import SettingError
from ckavg.path.cache import CachedPath, load_cached_path
from ckavg.path.sampling import plan_samples
from ckavg.path.table import to_measure


@dataclass(frozen=True, slots=True)
class PathPlan:
    """How the path length of a run is measured.

    Attributes:
        exclude: shell patterns of tensor names to leave out.
        names: the tensors that count, sorted.
        cached: what is cached.
        sample: the fraction of each tensor to read; 1 for an exact path.
        nbytes: bytes of checkpoints that pass 1 reads; 0 if all is cached.
    """

    exclude: tuple[str, ...]
    names: tuple[str, ...]
    cached: CachedPath
    sample: float
    nbytes: int

    def to_json(self) -> list[Any]:
        """As JSON values, for another process."""
        sigmas, *distances = (
            [None if math.isnan(each) else each for each in row] for row in (self.cached.sigmas, *self.cached.distances)
        )
        return [self.exclude, self.names, sigmas, distances, self.cached.fingerprints, self.sample, self.nbytes]

    @classmethod
    def from_json(cls, values: list[Any]) -> PathPlan:
        """From JSON values."""
        exclude, names, sigmas, distances, fingerprints, sample, nbytes = values
        sigmas, *distances = (
            array("d", (math.nan if each is None else each for each in row)) for row in (sigmas, *distances)
        )
        cached = CachedPath(sigmas, tuple(distances), tuple(fingerprints))
        return cls(tuple(exclude), tuple(names), cached, float(sample), int(nbytes))

    @property
    def needs_sigma(self) -> bool:
        """Whether σ of θ_0 must be measured."""
        return self.sample < 1 or any(map(math.isnan, self.cached.sigmas))

    @property
    def steps(self) -> tuple[int, ...]:
        """The j for which the distance from θ_{j−1} to θ_j must be measured, in order."""
        is_unknown = [self.sample < 1 or any(map(math.isnan, row)) for row in self.cached.distances]
        return tuple(step for step, is_asked in enumerate(is_unknown, start=1) if is_asked)

    @property
    def to_read(self) -> tuple[int, ...]:
        """Indices of the checkpoints that must be read, in order."""
        ends = {index for step in self.steps for index in (step - 1, step)}
        return tuple(sorted(ends | {0} if self.needs_sigma else ends))


@dataclass(frozen=True, slots=True)
class Visit:
    """What pass 1 does with a tile of one checkpoint. Checkpoints are numbered in the order of reading.

    Attributes:
        place: number of the checkpoint.
        is_anchor: whether to measure its σ.
        pairs: earlier checkpoints to measure the distance from, and whether each is no longer needed afterwards.
        is_held: whether a later distance starts from it.
    """

    place: int
    is_anchor: bool
    pairs: tuple[tuple[int, bool], ...]
    is_held: bool


@dataclass(frozen=True, slots=True)
class PathReading:
    """What pass 1 measures in one reading, for the paths of one or more selections of a run.

    Attributes:
        plans: how each path is measured; all of the same tensors.
        places: for each path, the indices of its checkpoints in the run.
    """

    plans: tuple[PathPlan, ...]
    places: tuple[tuple[int, ...], ...]

    @classmethod
    def single(cls, plan: PathPlan) -> PathReading:
        """The reading for one path over all checkpoints of a run."""
        return cls((plan,), (tuple(range(len(plan.cached.distances) + 1)),))

    @property
    def anchors(self) -> tuple[int, ...]:
        """Indices of the checkpoints whose σ must be measured, in order."""
        own = zip(self.plans, self.places, strict=True)
        return tuple(sorted({places[0] for plan, places in own if plan.needs_sigma}))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The (i, j) whose distance must be measured, by j and then by i; they need not be neighbours in the run."""
        own = zip(self.plans, self.places, strict=True)
        pairs = {(places[step - 1], places[step]) for plan, places in own for step in plan.steps}
        return tuple(sorted(pairs, key=lambda pair: (pair[1], pair[0])))

    @property
    def visits(self) -> tuple[Visit, ...]:
        """What to do at each checkpoint that is read, in order."""
        place = {index: place for place, index in enumerate(self.to_read)}
        pairs = [(place[first], place[second]) for first, second in self.pairs]
        last = dict(pairs)  # the pairs are in the order of their second checkpoint
        firsts: dict[int, list[int]] = {}
        for first, second in pairs:
            firsts.setdefault(second, []).append(first)
        anchors = {place[index] for index in self.anchors}
        return tuple(
            Visit(
                each,
                each in anchors,
                tuple((first, last[first] == each) for first in firsts.get(each, ())),
                each in last,
            )
            for each in place.values()
        )

    @property
    def to_read(self) -> tuple[int, ...]:
        """Indices of the checkpoints that must be read, in order."""
        return tuple(sorted({index for pair in self.pairs for index in pair} | {*self.anchors}))

    @property
    def sample(self) -> float:
        """The fraction of each tensor to read; 1 for an exact path."""
        return min(plan.sample for plan in self.plans)

    def nbytes(self, run: Run) -> int:
        """Bytes of the run's checkpoints to read."""
        plan = self.plans[0]
        return plan.nbytes if len(self.plans) == 1 else _bytes_read(run, self.to_read, plan.names, self.sample)


def plan_path(run: Run, *, exclude: Sequence[str] = (), sample: float = 1.0, anew: bool = False) -> PathPlan:
    """Plan the path: from the cache, measured, or estimated from a fraction of each tensor.

    A cached exact path is used even if an estimate was asked for: it costs nothing.

    Args:
        run: the checkpoints, the anchor first.
        exclude: shell patterns of tensor names to leave out.
        sample: the fraction of each tensor to read, in (0, 1]; 1 is exact.
        anew: as if nothing were cached.

    Raises:
        SettingError: the fraction is not in (0, 1].
    """
    check_sample(sample)
    names = tuple(sorted(to_measure(run.tensors, exclude)))
    cached = CachedPath.empty(run, names) if anew else load_cached_path(run, names)
    exact = PathPlan(tuple(exclude), names, cached, 1.0, 0)
    if sample == 1 or not exact.to_read:
        sample = 1.0
    plan = PathPlan(exact.exclude, exact.names, exact.cached, sample, 0)
    return dataclasses.replace(plan, nbytes=_bytes_read(run, plan.to_read, plan.names, sample))


def _bytes_read(run: Run, indices: Iterable[int], names: Iterable[str], sample: float) -> int:
    tensors = {name: run.tensors[name] for name in names}
    elements = {name: entry.numel for name, entry in tensors.items()}
    if sample < 1:
        elements = {name: each.elements for name, each in plan_samples(run, tensors, sample).items()}
    tables = distinct_tables([run.checkpoints[index] for index in indices])
    return sum(
        times * sum(table[name].item_bytes * count for name, count in elements.items()) for table, times in tables
    )


def check_sample(sample: float) -> None:
    """Refuse a sample that is not a fraction.

    Raises:
        SettingError: it is not in (0, 1].
    """
    if not (math.isfinite(sample) and 0 < sample <= 1):
        raise SettingError(f"sample is {sample:g}; it must be a fraction in (0, 1], such as 0.01.")
