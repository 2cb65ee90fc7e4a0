"""Stage *discover*: do all checkpoints hold the same tensors? Compares headers, and reports every difference."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ckavg.checkpoints.run import Checkpoint, TensorInfo
from ckavg.errors import CkavgError, MismatchError, UnsupportedFormatError, listed

_SHOWN = 8
_EMPTY = 10
"""One tensor without elements in so many is more than chance."""


_KINDS = {"model": "a whole model", "file": "a whole model", "adapter": "an adapter", "pipeline": "models in folders"}


def differences(
    checkpoints: Sequence[Checkpoint], *, anchor_is_init: bool, common_only: bool = False
) -> list[CkavgError]:
    """One error for each checkpoint whose tensors differ from those of the one before it.

    Args:
        checkpoints: ordered by step.
        anchor_is_init: the first one is a base model, which may be stored in another floating dtype than the run:
            every tensor is widened before it is used, so the values are the same.
        common_only: a tensor may be missing; where two checkpoints have it, shape and dtype must agree all the same.
    """
    errors: list[CkavgError] = []
    for place, (before, after) in enumerate(itertools.pairwise(checkpoints)):
        if _KINDS[before.kind] != _KINDS[after.kind]:
            errors.append(
                MismatchError(
                    f"step {after.step} is {_KINDS[after.kind]}, but step {before.step} is {_KINDS[before.kind]}.",
                    hint=_hint(checkpoints, place, anchor_is_init=anchor_is_init),
                )
            )
            continue
        lines = _compare(before, after, any_float=anchor_is_init and place == 0, common_only=common_only)
        if lines:
            more = [f"and {len(lines) - _SHOWN} more tensors"] if len(lines) > _SHOWN else []
            errors.append(
                MismatchError(
                    "; ".join(lines[:_SHOWN] + more) + ".",
                    hint=_hint(checkpoints, place, anchor_is_init=anchor_is_init),
                )
            )
    return errors


def ungathered(checkpoints: Sequence[Checkpoint]) -> list[CkavgError]:
    """An error where weights were saved in pieces of which these files hold none: tensors without any elements."""
    for checkpoint in {id(each.entries): each for each in reversed(checkpoints)}.values():  # equal tables are one
        floating = {name: entry for name, entry in checkpoint.entries.items() if entry.is_floating}
        empty = [name for name, entry in floating.items() if entry.shape == (0,)]
        if not empty or (_EMPTY * len(empty) < len(floating) and not any(name.endswith("weight") for name in empty)):
            continue
        where = shlex.quote(str(checkpoint.directory))
        return [
            UnsupportedFormatError(
                f"{checkpoint.path} holds {len(empty)} tensors without elements, of {len(floating)}: {listed(empty)}.",
                hint="They were saved without being gathered (DeepSpeed ZeRO-3). Where the checkpoint holds their "
                f"pieces, in a folder such as global_step{checkpoint.step}, put them together: "
                f"python {where}/zero_to_fp32.py {where} {where} --safe_serialization",
            )
        ]
    return []


@dataclass(frozen=True, slots=True)
class Common:
    """Checkpoints whose tensors are those that are averaged, and those of the last one that are copied.

    Attributes:
        checkpoints: in the order given.
        copied: tensors of the last checkpoint that not all of them have.
        dropped: tensors that not all of them have, nor the last.
        averaged: how many floating tensors are left to average.
    """

    checkpoints: tuple[Checkpoint, ...]
    copied: tuple[str, ...]
    dropped: tuple[str, ...]
    averaged: int


def common_part(checkpoints: Sequence[Checkpoint]) -> Common:
    """Leave out of the average what not every checkpoint has. What the last one has of it is marked to be copied."""
    last = checkpoints[-1].entries
    in_all = {name for name in last if all(name in each.entries for each in checkpoints)}
    everywhere = {name for each in checkpoints for name in each.entries}
    dropped = tuple(sorted(everywhere - last.keys()))
    copied = tuple(sorted(last.keys() - in_all))
    if copied or dropped:
        checkpoints = [
            dataclasses.replace(
                each,
                entries={
                    name: entry if name in in_all else dataclasses.replace(entry, kept=True)
                    for name, entry in each.entries.items()
                    if name in last
                },
            )
            for each in checkpoints
        ]
    averaged = sum(checkpoints[-1].entries[name].is_floating for name in in_all)
    return Common(tuple(checkpoints), copied, dropped, averaged)


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
            f"step {longer.step}: the names of all tensors begin with {prefix[0]!r}, and are those of step "
            f"{shorter.step} otherwise: a trainer has wrapped the model"
        ]
    lines: list[str] = []
    if not common_only:
        lines += [
            f"step {after.step}: tensor {name!r} is missing, but there at step {before.step}"
            for name in before.entries
            if name not in after.entries
        ]
        lines += [
            f"step {after.step}: tensor {name!r} is new, not there at step {before.step}"
            for name in after.entries
            if name not in before.entries
        ]
    for name, new in after.entries.items():
        if name not in before.entries:
            continue
        old = before.entries[name]
        if old.shape != new.shape:
            lines.append(f"step {after.step}: tensor {name!r} is {new.shape}, but {old.shape} at step {before.step}")
        elif not _compatible(old, new, any_float=any_float):
            lines.append(f"step {after.step}: tensor {name!r} is {new.dtype}, but {old.dtype} at step {before.step}")
    return lines


def _prefix_between(before: Checkpoint, after: Checkpoint) -> tuple[str, bool] | None:
    """What the names of one checkpoint begin with, and those of the other do not, where they are alike but for that;
    and whether it is the later one whose names are longer.
    """
    for shorter, longer, is_after in ((before, after, True), (after, before, False)):
        first = max(shorter.entries, key=len)
        for name in longer.entries:
            prefix = name.removesuffix(first)
            if prefix and name.endswith(first) and {prefix + each for each in shorter.entries} == longer.entries.keys():
                return prefix, is_after
    return None


def _compatible(old: TensorInfo, new: TensorInfo, *, any_float: bool) -> bool:
    return old.dtype == new.dtype or (any_float and old.is_floating and new.is_floating)
