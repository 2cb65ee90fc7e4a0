"""What pass 1 will read, before it reads anything. Looks at file times and the cached table alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ckavg.checkpoints.run import Run
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

    @property
    def needs_sigma(self) -> bool:
        """Whether σ of θ_0 is to be measured."""
        return not all(name in self.cached.sigmas for name in self.names)

    @property
    def steps(self) -> tuple[int, ...]:
        """The j whose distance from θ_{j−1} to θ_j is to be measured, in order."""
        distances = enumerate(self.cached.distances, start=1)
        return tuple(step for step, known in distances if not all(name in known for name in self.names))

    @property
    def to_read(self) -> tuple[int, ...]:
        """Indices of the checkpoints that must be read, in order."""
        if self.sample < 1:
            return tuple(range(len(self.cached.distances) + 1))
        ends = {index for step in self.steps for index in (step - 1, step)}
        return tuple(sorted(ends | {0} if self.needs_sigma else ends))


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
        nbytes = sum(run.checkpoints[index].entries[name].nbytes for index in exact.to_read for name in tensors)
        return PathPlan(exact.exclude, exact.names, exact.cached, 1.0, nbytes)
    samples = plan_samples(run, tensors, sample)
    nbytes = sum(
        point.entries[name].item_bytes * each.elements for point in run.checkpoints for name, each in samples.items()
    )
    return PathPlan(exact.exclude, exact.names, exact.cached, sample, nbytes)


def check_sample(sample: float) -> None:
    """Refuse what is not a fraction.

    Raises:
        SettingError: it is not in (0, 1].
    """
    if not (math.isfinite(sample) and 0 < sample <= 1):
        raise SettingError(f"sample is {sample:g}; it must be a fraction in (0, 1], such as 0.01.")
