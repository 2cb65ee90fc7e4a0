"""Stage *path*: what pass 1 will read, before it reads anything. Looks at file times and the kept table alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ckavg.checkpoints.run import Run
from ckavg.errors import SettingError
from ckavg.path.cache import Recalled, recall
from ckavg.path.sampling import plan_samples
from ckavg.path.table import to_measure


@dataclass(frozen=True, slots=True)
class PathPlan:
    """How a run's path will be had.

    Attributes:
        exclude: shell patterns of tensor names that do not count.
        recalled: what is known from before.
        sample: the fraction of each tensor that is read; 1 where the path is exact.
        nbytes: bytes of checkpoints that pass 1 reads; 0 where all is known.
    """

    exclude: tuple[str, ...]
    recalled: Recalled
    sample: float
    nbytes: int


def plan_path(run: Run, *, exclude: Sequence[str] = (), sample: float = 1.0) -> PathPlan:
    """Say how the path will be had: known from before, measured, or estimated from a fraction of each tensor.

    An exact path that is known already is taken even where an estimate was asked for: it costs nothing.

    Raises:
        SettingError: the fraction is not in (0, 1].
    """
    check_sample(sample)
    recalled = recall(run)
    entries = to_measure(run.tensors, exclude)
    to_read = recalled.known.left_to_measure(entries).to_read
    if sample == 1 or not to_read:
        nbytes = sum(run.checkpoints[index].entries[name].nbytes for index in to_read for name in entries)
        return PathPlan(tuple(exclude), recalled, 1.0, nbytes)
    strips = plan_samples(run, entries, sample)
    nbytes = sum(
        point.entries[name].item_bytes * each.elements for point in run.checkpoints for name, each in strips.items()
    )
    return PathPlan(tuple(exclude), recalled, sample, nbytes)


def check_sample(sample: float) -> None:
    """Refuse what is not a fraction.

    Raises:
        SettingError: it is not in (0, 1].
    """
    if not (math.isfinite(sample) and 0 < sample <= 1):
        raise SettingError(f"sample is {sample:g}; it must be a fraction in (0, 1], such as 0.01.")
