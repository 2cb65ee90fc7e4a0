"""What pass 1 will read, before it reads anything. Looks at file times and the cached table alone."""

from __future__ import annotations

import dataclasses
import math
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
    """How the path length of a run is had.

    Attributes:
        exclude: shell patterns of tensor names that do not count.
        names: the tensors that count.
        cached: what was measured before.
        sample: the fraction of each tensor that is read; 1 where the path is exact.
        nbytes: bytes of checkpoints that pass 1 reads; 0 where all is cached.
    """

    exclude: tuple[str, ...]
    names: tuple[str, ...]
    cached: CachedPath
    sample: float
    nbytes: int

    def to_json(self) -> list[Any]:
        """The same as JSON values, for another process."""
        cached = [dict(self.cached.sigmas), list(map(dict, self.cached.distances)), list(self.cached.fingerprints)]
        return [self.exclude, self.names, *cached, self.sample, self.nbytes]

    @classmethod
    def from_json(cls, values: list[Any]) -> PathPlan:
        """The same from such values."""
        exclude, names, sigmas, distances, fingerprints, sample, nbytes = values
        cached = CachedPath(sigmas, tuple(distances), tuple(fingerprints))
        return cls(tuple(exclude), tuple(names), cached, float(sample), int(nbytes))

    @property
    def needs_sigma(self) -> bool:
        """Whether σ of θ_0 is to be measured."""
        return self.sample < 1 or not all(name in self.cached.sigmas for name in self.names)

    @property
    def steps(self) -> tuple[int, ...]:
        """The j whose distance from θ_{j−1} to θ_j is to be measured, in order."""
        is_known = [self.sample == 1 and all(name in known for name in self.names) for known in self.cached.distances]
        return tuple(step for step, known in enumerate(is_known, start=1) if not known)

    @property
    def to_read(self) -> tuple[int, ...]:
        """Indices of the checkpoints that must be read, in order."""
        ends = {index for step in self.steps for index in (step - 1, step)}
        return tuple(sorted(ends | {0} if self.needs_sigma else ends))


@dataclass(frozen=True, slots=True)
class Visit:
    """What pass 1 does with a tile of one checkpoint; checkpoints count by their place among those that are read.

    Attributes:
        place: of the checkpoint.
        is_anchor: whether its σ is measured.
        pairs: from which earlier checkpoints its distance is measured, and whether each of them is done with then.
        is_held: whether a distance from it is measured later.
    """

    place: int
    is_anchor: bool
    pairs: tuple[tuple[int, bool], ...]
    is_held: bool


@dataclass(frozen=True, slots=True)
class PathReading:
    """What pass 1 measures in one reading, for the paths of one or more selections from a run.

    Attributes:
        plans: how each path is had; of the same tensors.
        places: of each path, the indices of its checkpoints in the run.
    """

    plans: tuple[PathPlan, ...]
    places: tuple[tuple[int, ...], ...]

    @classmethod
    def single(cls, plan: PathPlan) -> PathReading:
        """For the path of all checkpoints of a run."""
        return cls((plan,), (tuple(range(len(plan.cached.distances) + 1)),))

    @property
    def anchors(self) -> tuple[int, ...]:
        """Indices of the checkpoints whose σ is to be measured, in order."""
        own = zip(self.plans, self.places, strict=True)
        return tuple(sorted({places[0] for plan, places in own if plan.needs_sigma}))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The (i, j) whose distance is to be measured, by j and then by i; there may be others between them."""
        own = zip(self.plans, self.places, strict=True)
        pairs = {(places[step - 1], places[step]) for plan, places in own for step in plan.steps}
        return tuple(sorted(pairs, key=lambda pair: (pair[1], pair[0])))

    @property
    def visits(self) -> tuple[Visit, ...]:
        """What happens at each checkpoint that is read, in order."""
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
        """The fraction of each tensor that is read; 1 where what is measured is exact."""
        return min(plan.sample for plan in self.plans)

    def nbytes(self, run: Run) -> int:
        """Bytes of checkpoints of a run that are read."""
        plan = self.plans[0]
        return plan.nbytes if len(self.plans) == 1 else _bytes_read(run, self.to_read, plan.names, self.sample)


def plan_path(
    run: Run, *, exclude: Sequence[str] = (), sample: float = 1.0, cached: CachedPath | None = None
) -> PathPlan:
    """Say how the path will be had: from the cache, measured, or estimated from a fraction of each tensor.

    An exact path that is cached is taken even where an estimate was asked for: it costs nothing.

    Args:
        run: the checkpoints, the anchor first.
        exclude: shell patterns of tensor names that do not count.
        sample: the fraction of each tensor that is read, in (0, 1]; 1 is exact.
        cached: what was measured before; None: what the cache holds.

    Raises:
        SettingError: the fraction is not in (0, 1].
    """
    check_sample(sample)
    tensors = to_measure(run.tensors, exclude)
    exact = PathPlan(tuple(exclude), tuple(tensors), cached or load_cached_path(run), 1.0, 0)
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
    """Refuse what is not a fraction.

    Raises:
        SettingError: it is not in (0, 1].
    """
    if not (math.isfinite(sample) and 0 < sample <= 1):
        raise SettingError(f"sample is {sample:g}; it must be a fraction in (0, 1], such as 0.01.")
