"""Stage *discover*: which stored bytes are the same. Reads weights, and only where nothing else tells.

Two files of one step, a head that may be the embedding, small files that training does not touch: what they are shows
in their bytes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckavg.checkpoints.run import FLOATING, Checkpoint, not_constant
from ckavg.errors import CkavgError
from ckavg.storage.local import storage_of

_AT_ONCE = 1 << 20
_SMALL = 16 << 20
"""Bytes of a part of the model that is looked at whole, in every checkpoint."""

_PEEK = 1 << 16


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    return one.entries.keys() == other.entries.keys() and all(_same(one, name, other, name) for name in one.entries)


def tied_copies(checkpoints: Sequence[Checkpoint], tied: Sequence[bool | None]) -> dict[str, str]:
    """Tensors that only some checkpoints store, as copies of another one: heads that are tied to the embedding.

    Args:
        checkpoints: ordered by step.
        tied: whether the config of each ties them; None where it does not say.
        read: reads their bytes.

    Returns:
        The tensor of which each is a copy, by name.
    """
    if len({id(each.entries) for each in checkpoints}) == 1:
        return {}
    everywhere = {name for name in checkpoints[-1].entries if all(name in each.entries for each in checkpoints)}
    somewhere = sorted({name for each in checkpoints for name in each.entries} - everywhere)
    if any(each is False for each in tied):
        return {}
    found = {}
    for name in somewhere:
        holders = [each for each in checkpoints if name in each.entries]
        candidates = (each for each in sorted(everywhere) if _may_be_copy(holders, name, each))
        original = next(
            (each for each in candidates if all(_same(holder, name, holder, each) for holder in holders)), None
        )
        if original is not None:
            found[name] = original
    return found


def constant_parts(checkpoints: Sequence[Checkpoint]) -> frozenset[str]:
    """The floating tensors of small parts beside the model that are the same in every checkpoint: normalizers, say."""
    last, *others = checkpoints[::-1]
    names: set[str] = set()
    for part in last.parts:
        of_part = [name for name, entry in last.entries.items() if last.shards[entry.shard].part == part]
        if not part.endswith(".safetensors/") or sum(last.entries[name].nbytes for name in of_part) > _SMALL:
            continue
        if all(_same(last, name, other, name) for other in others for name in of_part):
            names |= {name for name in of_part if last.entries[name].dtype in FLOATING}
    return frozenset(names)


def changing(checkpoints: Sequence[Checkpoint]) -> list[CkavgError]:
    """An error where a tensor that can only be copied begins otherwise in one checkpoint than in another."""
    names = [name for name, entry in checkpoints[-1].entries.items() if entry.must_be_constant]
    for name in names:
        holders = [each for each in checkpoints if name in each.entries]
        last = holders[-1]
        for other in holders[:-1]:
            if not _same(other, name, last, name, most=_PEEK):
                return [not_constant(name, other, last)]
    return []


def _may_be_copy(holders: Iterable[Checkpoint], name: str, other: str) -> bool:
    return all(
        (own := holder.entries[name]).numel > 1
        and (own.shape, own.dtype) == (holder.entries[other].shape, holder.entries[other].dtype)
        for holder in holders
    )


def _same(one: Checkpoint, name: str, other: Checkpoint, its_name: str, *, most: int | None = None) -> bool:
    first, second = one.entries.get(name), other.entries.get(its_name)
    if first is None or second is None or (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    paths = one.shards[first.shard].path, other.shards[second.shard].path
    end = first.nbytes if most is None else min(most, first.nbytes)
    return all(
        storage_of(paths[0]).read(paths[0], first.offset + start, first.offset + stop)
        == storage_of(paths[1]).read(paths[1], second.offset + start, second.offset + stop)
        for start in range(0, end, _AT_ONCE)
        for stop in (min(start + _AT_ONCE, end),)
    )
