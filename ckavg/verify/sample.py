"""Stage *verify*: which elements are computed again, and how they are read: one by one, from wherever they lie."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckavg.checkpoints.run import Checkpoint, TensorInfo
from ckavg.engine.reader import Files

Array = NDArray[np.float64]

OF_EACH = 8
"""Elements of each tensor, where it has as many and the budget allows."""

_PAGE = 4096
_MOST_BYTES = 16 << 20

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "<u1",
    "C64": "<u8", "F8_E4M3": "<u1", "F8_E5M2": "<u1", "F8_E8M0": "<u1", "F8_E4M3FNUZ": "<u1", "F8_E5M2FNUZ": "<u1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawn:
    """Elements of one tensor: their places in row-major order, ascending."""

    name: str
    places: tuple[int, ...]


def draw(entries: Mapping[str, TensorInfo], elements: int, seed: int) -> list[Drawn]:
    """Draw elements at random, without repetition: some of every tensor, the others by its size.

    Args:
        entries: the tensors.
        elements: how many in all; fewer where there are not as many. Where there are more tensors than that, one of
            each of as many tensors.
        seed: the same seed draws the same elements of the same tensors.
    """
    generator = random.Random(seed)  # noqa: S311 - it guards nothing
    sizes = {name: entry.numel for name, entry in sorted(entries.items()) if entry.numel}
    if len(sizes) > elements:
        sizes = {name: sizes[name] for name in sorted(generator.sample(list(sizes), elements))}
    counts = _shared(sizes, elements)
    return [Drawn(name, tuple(sorted(generator.sample(range(sizes[name]), count)))) for name, count in counts.items()]


def _shared(sizes: Mapping[str, int], elements: int) -> dict[str, int]:
    """How many elements of each tensor."""
    if not sizes:
        return {}
    each = min(OF_EACH, elements // len(sizes))
    counts = {name: min(size, each) for name, size in sizes.items()}
    left = {name: size - counts[name] for name, size in sizes.items()}
    while (budget := elements - sum(counts.values())) > 0 and any(left.values()):
        total = sum(left.values())
        # At least one for somebody in each round, so that it comes to an end.
        for name in sorted(left, key=lambda name: -left[name]):
            more = min(left[name], max(1, left[name] * budget // total), elements - sum(counts.values()))
            counts[name] += more
            left[name] -= more
            if sum(counts.values()) == elements:
                break
    return counts


def bytes_to_gather(entry: TensorInfo, drawn: Drawn) -> int:
    """How much is read: a small tensor whole, where storage would read most of its pages for single elements anyway."""
    whole = entry.nbytes <= min(_PAGE * len(drawn.places), _MOST_BYTES)
    return entry.nbytes if whole else entry.item_bytes * len(drawn.places)


def gather(files: Files, checkpoint: Checkpoint, drawn: Drawn) -> NDArray[np.generic]:
    """Read elements of a tensor of a checkpoint: (n,) as they are stored, as bits where numpy has no such numbers.

    Raises:
        TruncatedShardError, ReadError: the bytes are not there.
    """
    entry = checkpoint.entries[drawn.name]
    item = entry.item_bytes
    buffer = bytearray(bytes_to_gather(entry, drawn))
    if len(buffer) == entry.nbytes:
        path = checkpoint.shards[entry.shard].path
        files.read_into(path, entry.offset, memoryview(buffer), on_miss=lambda: None)
        return np.frombuffer(buffer, dtype=_DTYPES[entry.dtype])[list(drawn.places)]
    offsets = [entry.offset + place * item for place in drawn.places]
    path = checkpoint.shards[entry.shard].path
    announced = False

    def announce() -> None:
        nonlocal announced
        if not announced:  # all of them at the first that is not in memory, so that they are fetched together
            announced = True
            for offset in offsets:
                files.announce(path, offset, item)

    files.read_each(path, offsets, memoryview(buffer), on_miss=announce)
    return np.frombuffer(buffer, dtype=_DTYPES[entry.dtype])


def widened(stored: NDArray[np.generic], dtype: str) -> Array:
    """Floating elements in float64, exactly."""
    if dtype == "BF16":
        return np.asarray((stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64))
    return np.asarray(stored.astype(np.float64))


def where(entry: TensorInfo, place: int) -> str:
    """The index of an element, as one types it: `[3, 0]`; nothing for a scalar."""
    indices: Sequence[int] = [int(each) for each in np.unravel_index(place, entry.shape)] if entry.shape else []
    return str(list(indices)) if indices else ""
