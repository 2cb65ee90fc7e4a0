"""Averages of one source that are read together: each checkpoint that any of them visits is read once a pass.

Every average keeps its own run, so that its record is the same as if it were formed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from ckavg.averaging.plan import Plan, start_of
from ckavg.checkpoints.run import Run, TensorInfo, distinct_tables, holds_float64
from ckavg.engine.blocks import BLOCK, TILE
from ckavg.engine.context import COMPILED_FROM_BYTES
from ckavg.engine.distributed import worker_threads
from ckavg.engine.remote import HELD_BYTES
from ckavg.path.plan import PathPlan, PathReading
from ckavg.storage.base import RemotePath
from ckavg.storage.remote import Fetching, plan_fetching


@dataclass(frozen=True, slots=True)
class Reading:
    """Averages that are formed together.

    Attributes:
        plans: of the averages; at least one.
        run: all checkpoints that any of them visits, by step.
        places: for each plan, the indices in `run` of the checkpoints that it visits.
    """

    plans: tuple[Plan, ...]
    run: Run
    places: tuple[tuple[int, ...], ...]

    @property
    def paths(self) -> PathReading | None:
        """What pass 1 measures, each path once; None if no average needs one."""
        own = {places: plan.path for plan, places in zip(self.plans, self.places, strict=True) if plan.path}
        return PathReading(tuple(own.values()), tuple(own)) if own else None

    @property
    def path_bytes(self) -> int:
        """Bytes that pass 1 reads; 0 if no average needs the path, or all is cached."""
        paths = self.paths
        return paths.nbytes(self.run) if paths else 0

    @property
    def to_replay(self) -> tuple[int, ...]:
        """Indices of the checkpoints that pass 2 reads, in order."""
        own = zip(self.plans, self.places, strict=True)
        return tuple(sorted({place for plan, places in own for place in places[start_of(plan.run, plan.scheme) :]}))

    @property
    def replay_bytes(self) -> int:
        """Bytes that pass 2 reads: averaged tensors, and copied ones of checkpoints that have an output."""
        written = {
            places[index] for plan, places in zip(self.plans, self.places, strict=True) for index in plan.outputs
        }
        floating = [name for name, entry in self.run.tensors.items() if entry.is_floating]
        copied = sum(entry.nbytes for entry in self.run.tensors.values() if not entry.is_floating)
        tables = distinct_tables([self.run.checkpoints[place] for place in self.to_replay])
        averaged = sum(count * sum(table[name].nbytes for name in floating) for table, count in tables)
        return averaged + len(written) * copied


def readings(plans: Sequence[Plan]) -> list[Reading]:
    """Group the averages that can be read together: those whose runs have the same tensors.

    There is one group unless the tensors of the source change along the way: then several selections may be valid,
    each on its own.
    """
    groups: list[list[Plan]] = []
    for plan in plans:
        group = next((group for group in groups if _is_alike(group[0], plan)), None)
        if group is None:
            groups.append([plan])
        else:
            group.append(plan)
    return [_merge(group) for group in groups]


def _is_alike(one: Plan, other: Plan) -> bool:
    same = one.run.tensors is other.run.tensors or _table(one.run) == _table(other.run)
    return same and one.products == other.products


def _table(run: Run) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    def signature(entry: TensorInfo) -> tuple[str, tuple[int, ...], bool]:
        return entry.dtype, entry.shape, entry.kept

    return {name: signature(entry) for name, entry in run.tensors.items()}


def _merge(plans: Sequence[Plan]) -> Reading:
    run = plans[0].run
    if all(plan.run is run for plan in plans):
        return Reading(tuple(plans), run, (tuple(range(len(run.checkpoints))),) * len(plans))
    known = {(each.step, each.path): each for plan in plans for each in plan.run.checkpoints}
    keys = sorted(known, key=lambda key: key[0])
    index = {key: place for place, key in enumerate(keys)}
    places = [tuple(index[each.step, each.path] for each in plan.run.checkpoints) for plan in plans]
    union = Run(run.source, run.selection, tuple(known[key] for key in keys), ())
    return Reading(tuple(plans), union, tuple(places))


def fetching_of(plans: Sequence[Plan]) -> Fetching | None:
    """What these plans download, and how; None for a run on this machine."""
    fetched: dict[RemotePath, float] = {}
    for reading in readings(plans):
        paths, to_replay = reading.paths, reading.to_replay
        path_read, sample = (paths.to_read, paths.sample) if paths and paths.nbytes(reading.run) else ((), 0.0)
        for place in range(len(reading.run.checkpoints)):
            _add(fetched, reading.run, place, sample * (place in path_read) + (place in to_replay))
    return plan_fetching(fetched, other_bytes=sum(plan.write_bytes for plan in plans)) if fetched else None


def fetching_of_path(run: Run, path: PathPlan) -> Fetching | None:
    """What measuring a path downloads, and how; None for a run on this machine."""
    fetched: dict[RemotePath, float] = {}
    to_read = path.to_read if path.nbytes else ()
    for place in range(len(run.checkpoints)):
        _add(fetched, run, place, path.sample * (place in to_read))
    return plan_fetching(fetched, other_bytes=0) if fetched else None


def _add(fetched: dict[RemotePath, float], run: Run, place: int, count: float) -> None:
    """Add how often each remote weight file of a checkpoint is read; a file read in part counts as a fraction."""
    checkpoint = run.checkpoints[place]
    used: dict[int, int] = {}
    for entry in (
        checkpoint.entries.values() if checkpoint.is_distributed else ()
    ):  # skips the optimizer's bytes between them
        for which, begin, end in entry.ranges(0, entry.numel):
            used[which] = used.get(which, 0) + end - begin
    for number, shard in enumerate(checkpoint.shards):
        if isinstance(shard.path, RemotePath):
            part = used.get(number, 0) / shard.nbytes if checkpoint.is_distributed else 1.0
            fetched[shard.path] = fetched.get(shard.path, 0.0) + count * part


_LIBRARIES = 235_000_000
"""Python, torch and the other libraries before anything is read, measured on Linux with torch for the CPU."""

_PLOT = 45_000_000
"""matplotlib and the plot in a card."""

_COMPILER = 90_000_000
"""llvmlite, and what is compiled with it."""

_PER_ENTRY = 450
"""A tensor in the table of a checkpoint: its name, its shape and the dictionary entry."""

_PER_PIECE = 300
"""A piece of a tensor that several processes saved."""

_PER_DISTANCE = 100
"""One number of the path, by tensor and checkpoint, and its line in `path.json`."""

_PER_BLOCK, _PER_BLOCK_READ = 400, 64
"""A block and its result; for each checkpoint, the hash of its bytes and a distance."""

_STATE_TILES = 3
_RAW_BYTES_OF_ELEMENT = 8


def memory_bytes(plans: Sequence[Plan]) -> int:
    """Estimated peak memory of carrying out plans of one source together on the CPU, in bytes.

    Every thread has two buffers for stored bytes, the widened tile, and the tiles of each average's state. The tables
    of checkpoints and blocks, the side files and the libraries come on top.

    Args:
        plans: carried out together; at least one.
    """
    runs = list({id(plan.run): plan.run for plan in plans}.values())
    checkpoints = [checkpoint for run in runs for checkpoint in run.checkpoints]
    tiles = (1 + _STATE_TILES * len(plans)) * TILE * (8 if holds_float64(checkpoints) else 4)
    buffers = worker_threads() * (2 * TILE * _RAW_BYTES_OF_ELEMENT + tiles)
    entries = (entry for table, _ in distinct_tables(checkpoints) for entry in table.values())
    known = sum(_PER_ENTRY + _PER_PIECE * len(entry.pieces) for entry in entries)
    with_path = {id(plan.run): plan.run for plan in plans if plan.path}
    known += _PER_DISTANCE * sum(len(run.tensors) * len(run.checkpoints) for run in with_path.values())
    for run in runs:
        blocks = sum(-(-entry.numel // BLOCK) for entry in run.tensors.values() if entry.is_floating)
        known += blocks * (_PER_BLOCK + _PER_BLOCK_READ * len(run.checkpoints))
    pairs = [(plan.run, pair) for plan in plans if plan.products for pair in plan.products.pairs]
    # For one pair: all checkpoints in float64, the columns of the sum, and the same again if they are truncated.
    known += max((3 * 8 * len(run.checkpoints) * sum(pair.numel) for run, pair in pairs), default=0)
    by_run = {id(plan.run): plan for plan in plans}.values()
    beside = sum(len(data) for plan in by_run for data in plan.side_files.values())
    headers = sum(len(shard.header) for plan in by_run for shard in plan.weights.shards)
    fetching = fetching_of(plans)
    window = min(HELD_BYTES, fetching.streamed_bytes) if fetching is not None else 0
    drawn = any(plan.options.plot for plan in plans) and find_spec("matplotlib")
    is_compiled = any(reading.replay_bytes >= COMPILED_FROM_BYTES for reading in readings(plans))
    libraries = _LIBRARIES + (_PLOT if drawn else 0)
    libraries += _COMPILER if is_compiled and find_spec("llvmlite") else 0
    return libraries + buffers + known + 2 * (beside + headers) + window
