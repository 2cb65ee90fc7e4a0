"""Compares two results, or a result and a checkpoint: recipe, weights by step, distance by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.averaging.recipe import differences, recorded_recipe
from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.run import Checkpoint, TensorInfo
from ckavg.engine.blocks import Block, cut_blocks
from ckavg.engine.context import Context, OnProgress
from ckavg.errors import MismatchError, RecordError, listed
from ckavg.output.fetched import here
from ckavg.output.output_path import is_result
from ckavg.output.record import Record, read_record
from ckavg.storage.atomic import resolved

if TYPE_CHECKING:
    from ckavg.engine.tiles import TileReader


@dataclass(frozen=True, slots=True)
class TensorDistance:
    """The distance between the tensors of one name.

    Attributes:
        name: of the tensor.
        distance: ‖a − b‖₂, in float64.
        norm: ‖a‖₂.
        relative: ‖a − b‖₂ / ‖a‖₂; 0 if both are 0; None if it is not finite.
    """

    name: str
    distance: float | None
    norm: float | None
    relative: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """The differences between two results, or between a result and a checkpoint.

    Attributes:
        recipe: name and both values of each setting that differs.
        weights: step and both weights of every step that either has, None where it has not; empty if one of the two is
            a checkpoint.
        tensors: the floating tensors, the farthest apart first.
        total: the distance of all floating tensors together.
        unequal: other tensors that differ in any byte.
        bytes_read: bytes read of both.
    """

    recipe: tuple[tuple[str, Any, Any], ...]
    weights: tuple[tuple[int, float | None, float | None], ...]
    tensors: tuple[TensorDistance, ...]
    total: TensorDistance
    unequal: tuple[str, ...]
    bytes_read: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self) | {
            "recipe": {name: {"a": one, "b": other} for name, one, other in self.recipe},
            "weights": [{"step": step, "a": one, "b": other} for step, one, other in self.weights],
        }


def compare(one: Path | str, other: Path | str, *, on_progress: OnProgress | None = None) -> Difference:
    """Compare two results, or a result with a checkpoint, reading each once.

    Args:
        one, other: directories of results, snapshots or checkpoints; at least one is a result. A result at an address
            is downloaded.
        on_progress: called from time to time in this thread.

    Raises:
        RecordError: neither is a result, or a record is invalid.
        MismatchError: their tensors have different names, shapes or dtypes.
        ReadError, CorruptFileError, TruncatedShardError: weights cannot be read.
    """
    with here(Path(one), on_progress) as a, here(Path(other), on_progress) as b:
        return _compare(a, b, on_progress)


def _compare(one: Path, other: Path, on_progress: OnProgress | None) -> Difference:
    records = [read_record(path) if is_result(resolved(path)) else None for path in (one, other)]
    known = [record for record in records if record is not None]
    if not known:
        raise RecordError(
            f"Neither {one} nor {other} is a result of ckavg.", hint="Give at least one result, such as averaged/mean."
        )
    pairs = zip((one, other), records, strict=True)
    a, b = (read_checkpoint(path, 0 if record is None else record.output.step) for path, record in pairs)
    _check_same_tensors(a, b)
    recipe, weights = [], []
    if len(known) == len(records):
        recipe = differences(*map(recorded_recipe, known))
        weights = _weights(*known)
    tensors, unequal, bytes_read = _distances(a, b, Context(on_progress=on_progress))
    total = _distance("", [_square(each.distance) for each in tensors], [_square(each.norm) for each in tensors])
    return Difference(tuple(recipe), tuple(weights), tuple(tensors), total, tuple(unequal), bytes_read)


def _check_same_tensors(a: Checkpoint, b: Checkpoint) -> None:
    names = sorted(a.entries.keys() ^ b.entries.keys())
    if names:
        raise MismatchError(
            f"Only one of {a.path} and {b.path} has these tensors: {listed(names)}.",
            hint="Compare results of the same model.",
        )

    def layout(entry: TensorInfo) -> object:
        return entry.shape, entry.dtype if not entry.is_floating else "floating"

    names = sorted(name for name, entry in a.entries.items() if layout(entry) != layout(b.entries[name]))
    if names:
        raise MismatchError(
            f"{len(names)} tensors have different shapes or dtypes in {a.path} and {b.path}: {listed(names)}.",
            hint="Compare results of the same model.",
        )


def _weights(one: Record, other: Record) -> list[tuple[int, float | None, float | None]]:
    by_step = [dict(zip(each.steps, each.weights, strict=True)) for each in (one, other)]
    return [(step, by_step[0].get(step), by_step[1].get(step)) for step in sorted({*one.steps, *other.steps})]


def _distances(a: Checkpoint, b: Checkpoint, context: Context) -> tuple[list[TensorDistance], list[str], int]:
    """The floating tensors, the farthest apart first; the other tensors that differ; and the bytes read."""
    from ckavg.engine.stream import by_tensor, stream

    blocks = cut_blocks(a.entries)
    streamed = stream("difference", [a, b], blocks, lambda reader: _worker(a, reader), context)
    sums = by_tensor(blocks, streamed.results) | {name: [] for name, each in a.entries.items() if not each.numel}
    tensors = [
        _distance(name, *zip(*parts, strict=True)) if parts else TensorDistance(name, 0.0, 0.0, 0.0)
        for name, parts in sums.items()
        if a.entries[name].is_floating
    ]
    unequal = sorted(
        name for name, parts in sums.items() if not a.entries[name].is_floating and any(each for each, _ in parts)
    )
    tensors.sort(key=lambda each: (-math.inf if each.relative is None else -each.relative, each.name))
    return tensors, unequal, streamed.bytes_read


def _worker(a: Checkpoint, reader: TileReader) -> Callable[[Block], tuple[float, float]]:
    """A function that sums (a − b)² and a² over a block in float64; for other tensors it counts differing tiles."""
    import torch

    from ckavg.engine.blocks import TILE

    one, other = (torch.empty(TILE, dtype=torch.float64) for _ in range(2))

    def measure(block: Block) -> tuple[float, float]:
        entry, distance, norm = a.entries[block.name], [], []
        for start, stop in block.tiles(TILE):
            if not entry.is_floating:
                place = block.name, start * entry.item_bytes, stop * entry.item_bytes
                distance.append(float(not torch.equal(reader.raw(0, *place).clone(), reader.raw(1, *place))))
                continue
            x, y = one[: stop - start], other[: stop - start]
            reader.load(0, block.name, start, x)
            reader.load(1, block.name, start, y)
            norm.append(float(x.square().sum()))
            distance.append(float((x - y).square().sum()))
        return math.fsum(distance), math.fsum(norm)

    return measure


def _distance(name: str, distances: Iterable[float], norms: Iterable[float]) -> TensorDistance:
    """The distance from sums of squares."""
    distance, norm = (math.sqrt(math.fsum(parts)) for parts in (distances, norms))
    relative = distance / norm if norm else 0.0 if distance == 0 else math.inf
    finite = [each if math.isfinite(each) else None for each in (distance, norm, relative)]
    return TensorDistance(name, *finite)


def _square(value: float | None) -> float:
    return math.inf if value is None else value**2
