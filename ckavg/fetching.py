"""What work on a run that is not on this machine fetches of it, told before it is fetched."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ckavg.path.plan import PathPlan
from ckavg.path.table import to_measure
from ckavg.plan import Plan, start_of
from ckavg.run.values import Fetching, Run


def fetching_of(plans: Sequence[Plan]) -> Fetching | None:
    """What carrying out these plans fetches, and how; None for a run on this machine."""
    run = plans[0].run
    if run.remote is None:
        return None
    path = next((plan.path for plan in plans if plan.path), None)
    readings = _readings(run, path, min(start_of(run, plan.scheme) for plan in plans))
    return run.remote.plan(readings, other_bytes=sum(plan.write_bytes for plan in plans))


def fetching_of_path(run: Run, path: PathPlan) -> Fetching | None:
    """What measuring a path fetches, and how; None for a run on this machine."""
    return (
        run.remote.plan(_readings(run, path, len(run.checkpoints)), other_bytes=0) if run.remote is not None else None
    )


def _readings(run: Run, path: PathPlan | None, start: int) -> dict[Path, float]:
    """How often each weight file is read: in pass 1, and from checkpoint number `start` on in pass 2."""
    readings: dict[Path, float] = {}
    to_read: Collection[int] = ()
    if path is not None and path.nbytes:
        entries = to_measure(run.tensors, path.exclude)
        to_read = (
            path.recalled.known.left_to_measure(entries).to_read if path.sample == 1 else range(len(run.checkpoints))
        )
    for index, checkpoint in enumerate(run.checkpoints):
        count = (path.sample if path is not None and index in to_read else 0.0) + (index >= start)
        for shard in checkpoint.shards:
            readings[shard.path] = readings.get(shard.path, 0.0) + count
    return readings
