"""Stage *discover*: do all checkpoints hold the same tensors? Compares headers, and reports every difference.

Reads weights only if nothing else decides: two files of one step, a head that may be the embedding, small files that
training does not change.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Sequence

from ckavg.checkpoints.pieces import overlapping, spread
from ckavg.checkpoints.run import FLOATING, Checkpoint, not_constant
from ckavg.errors import CkavgError, MismatchError, UnsupportedFormatError, listed
from ckavg.storage.local import storage_of

_SHOWN = 8
_EMPTY = 10
"""Weights are ungathered if at least one in this many tensors is empty."""

_AT_ONCE, _PEEK = 1 << 20, 1 << 16
_SMALL = 16 << 20
"""Largest part of the model, in bytes, to read whole in every checkpoint."""

_KINDS = {"model": "a whole model", "file": "a whole model", "adapter": "an adapter", "pipeline": "models in folders"}


def differences(
    checkpoints: Sequence[Checkpoint], *, anchor_is_init: bool, common_only: bool = False
) -> list[CkavgError]:
    """One error for each checkpoint whose tensors differ from those of the one before it.

    Args:
        checkpoints: ordered by step.
        anchor_is_init: the first one is a base model, which may have another floating dtype than the run: every tensor
            is widened before use, so the values are the same.
        common_only: a tensor may be missing; if two checkpoints have it, shape and dtype must be equal.
    """
    errors: list[CkavgError] = []
    for place, (before, after) in enumerate(itertools.pairwise(checkpoints)):
        if _KINDS[before.kind] != _KINDS[after.kind]:
            lines = [f"step {after.step} is {_KINDS[after.kind]}, but step {before.step} is {_KINDS[before.kind]}"]
        else:
            lines = _compare(before, after, any_float=anchor_is_init and place == 0, common_only=common_only)
        if lines:
            more = [f"and {len(lines) - _SHOWN} more tensors"] if len(lines) > _SHOWN else []
            hint = _hint(checkpoints, place, anchor_is_init=anchor_is_init)
            errors.append(MismatchError("; ".join(lines[:_SHOWN] + more) + ".", hint=hint))
    return errors


def ungathered(checkpoints: Sequence[Checkpoint]) -> list[CkavgError]:
    """An error for weights that were saved without being gathered: many tensors have no elements."""
    for checkpoint in {
        id(each.entries): each for each in reversed(checkpoints)
    }.values():  # equal tables are the same object
        floating = {name: entry for name, entry in checkpoint.entries.items() if entry.is_floating}
        empty = [name for name, entry in floating.items() if entry.shape == (0,)]
        if not empty or (_EMPTY * len(empty) < len(floating) and not any(name.endswith("weight") for name in empty)):
            continue
        where = shlex.quote(str(checkpoint.directory))
        return [
            UnsupportedFormatError(
                f"{checkpoint.path} holds {len(empty)} tensors without elements, of {len(floating)}: {listed(empty)}.",
                hint="They were saved without being gathered (DeepSpeed ZeRO-3). If the checkpoint holds their "
                f"pieces, in a folder such as global_step{checkpoint.step}, join them: "
                f"python {where}/zero_to_fp32.py {where} {where} --safe_serialization",
            )
        ]
    return []


def common_part(checkpoints: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[CkavgError], list[str]]:
    """Leave out tensors that not every checkpoint has; those of the last checkpoint are marked to be copied.

    Returns:
        The checkpoints; an error if nothing is left to average; warnings about copied and dropped tensors.
    """
    last = checkpoints[-1].entries
    in_all = {name for name in last if all(name in each.entries for each in checkpoints)}
    copied = sorted(last.keys() - in_all)
    dropped = sorted({name for each in checkpoints for name in each.entries} - last.keys())
    if copied or dropped:
        checkpoints = [
            dataclasses.replace(each, entries={name: entry for name, entry in each.entries.items() if name in last})
            for each in checkpoints
        ]
    errors: list[CkavgError] = []
    if not any(last[name].is_floating for name in in_all):
        hint = "Choose others with --steps or --skip-step."
        errors.append(MismatchError("No floating tensor is in all checkpoints.", hint=hint))
    step = checkpoints[-1].step
    texts = (
        (copied, f"Not in every checkpoint, so copied from step {step} instead of averaged"),
        (dropped, f"Not in every checkpoint, nor at step {step}, so left out"),
    )
    warnings = [
        f"{text}: {len(names)} tensor{'s' if len(names) > 1 else ''} ({listed(names)})."
        for names, text in texts
        if names
    ]
    return [each.with_copied(copied) for each in checkpoints], errors, warnings


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    return one.entries.keys() == other.entries.keys() and all(_same(one, name, other, name) for name in one.entries)


def tied_copies(checkpoints: Sequence[Checkpoint], tied: Sequence[bool | None]) -> dict[str, str]:
    """Tensors that only some checkpoints store, as copies of another tensor: heads tied to the embedding.

    Args:
        checkpoints: ordered by step.
        tied: whether the config of each ties them; None if it does not say.

    Returns:
        The original of each copy, by name.
    """
    if any(each is False for each in tied) or len({id(each.entries) for each in checkpoints}) == 1:
        return {}
    everywhere = {name for name in checkpoints[-1].entries if all(name in each.entries for each in checkpoints)}
    found = {}
    for name in sorted({name for each in checkpoints for name in each.entries} - everywhere):
        holders = [each for each in checkpoints if name in each.entries]
        if any(each.entries[name].numel <= 1 for each in holders):
            continue
        for original in sorted(everywhere):
            if all(_same(holder, name, holder, original) for holder in holders):
                found[name] = original
                break
    return found


def constant_parts(checkpoints: Sequence[Checkpoint]) -> frozenset[str]:
    """The floating tensors of small parts beside the model, such as normalizers, that are equal in all checkpoints."""
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
    """An error if a tensor that can only be copied has different first bytes in two checkpoints."""
    names = [name for name, entry in checkpoints[-1].entries.items() if entry.must_be_constant]
    for name in names:
        holders = [each for each in checkpoints if name in each.entries]
        last = holders[-1]
        for other in holders[:-1]:
            if not _same(other, name, last, name, most=_PEEK):
                return [not_constant(name, other, last)]
    return []


def _hint(checkpoints: Sequence[Checkpoint], place: int, *, anchor_is_init: bool) -> str:
    before, after = checkpoints[place : place + 2]
    if anchor_is_init and place == 0:
        if after.kind == "adapter" != before.kind:
            return (
                "The anchor of an adapter is the untrained adapter, not the base model. Save it before training, with "
                "model.save_pretrained(DIRECTORY), and name that with --init; or leave out --init."
            )
        return "The base model given with --init must have the tensors of the run."
    keeps_more = len(checkpoints) - 1 - place > 1
    choice = (
        f"Start later with --from-step {after.step}" if keeps_more else f"Stop earlier with --to-step {before.step}"
    )
    return f"Every checkpoint must have the same tensors. {choice}. --common-only averages those that all of them have."


def _compare(before: Checkpoint, after: Checkpoint, *, any_float: bool, common_only: bool) -> list[str]:
    if before.entries is after.entries or (
        before.entries.keys() == after.entries.keys()
        and all(
            (old := before.entries[name]).shape == new.shape and old.dtype == new.dtype
            for name, new in after.entries.items()
        )
    ):
        return []
    prefix = _prefix_between(before, after)
    if prefix is not None:
        longer, shorter = (after, before) if prefix[1] else (before, after)
        return [
            f"step {longer.step}: the names of all tensors begin with {prefix[0]!r}, and are otherwise those of step "
            f"{shorter.step}: a trainer has wrapped the model"
        ]
    lines: list[str] = []
    if not common_only:
        lines += [
            f"step {after.step}: tensor {name!r} is missing, but present at step {before.step}"
            for name in before.entries
            if name not in after.entries
        ]
        lines += [
            f"step {after.step}: tensor {name!r} is new, absent at step {before.step}"
            for name in after.entries
            if name not in before.entries
        ]
    for name, new in after.entries.items():
        if name not in before.entries:
            continue
        old = before.entries[name]
        if old.shape != new.shape:
            lines.append(f"step {after.step}: tensor {name!r} is {new.shape}, but {old.shape} at step {before.step}")
        elif old.dtype != new.dtype and not (any_float and old.is_floating and new.is_floating):
            lines.append(f"step {after.step}: tensor {name!r} is {new.dtype}, but {old.dtype} at step {before.step}")
    return lines


def _same(one: Checkpoint, name: str, other: Checkpoint, its_name: str, *, most: int | None = None) -> bool:
    first, second = one.entries.get(name), other.entries.get(its_name)
    if first is None or second is None or (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    end = first.numel if most is None else min(-(-most // first.item_bytes), first.numel)
    step = _AT_ONCE // first.item_bytes
    return all(
        _read(one, name, start, min(start + step, end)) == _read(other, its_name, start, min(start + step, end))
        for start in range(0, end, step)
    )


def _read(checkpoint: Checkpoint, name: str, start: int, stop: int) -> bytes:
    """The bytes of elements `start` to `stop` of a tensor."""
    entry = checkpoint.entries[name]
    if not entry.pieces:
        ((path, begin, end),) = checkpoint.ranges(name, start, stop)
        return storage_of(path).read(path, begin, end)
    target = bytearray((stop - start) * entry.item_bytes)
    found = zip(overlapping(entry.pieces, start, stop), checkpoint.ranges(name, start, stop), strict=True)
    for (piece, first, last), (path, begin, end) in found:
        data = storage_of(path).read(path, begin, end)
        spread(piece, first, last, memoryview(data), memoryview(target), at=start, item=entry.item_bytes)
    return bytes(target)


def _prefix_between(before: Checkpoint, after: Checkpoint) -> tuple[str, bool] | None:
    """The prefix by which all names of one checkpoint differ from those of the other, if that is the only difference;
    and whether the later one has it.
    """
    for shorter, longer, is_after in ((before, after, True), (after, before, False)):
        first = max(shorter.entries, key=len)
        for name in longer.entries:
            prefix = name.removesuffix(first)
            if prefix and name.endswith(first) and {prefix + each for each in shorter.entries} == longer.entries.keys():
                return prefix, is_after
    return None
