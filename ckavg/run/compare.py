"""Stage *discover*: do all checkpoints hold the same tensors? Compares headers, and reports every difference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ckavg.errors import CkavgError, MismatchError
from ckavg.run.values import Checkpoint, Entry

_SHOWN = 8


def differences(checkpoints: Sequence[Checkpoint], *, anchor_is_init: bool) -> list[CkavgError]:
    """One error for each checkpoint whose tensors differ from those of the one before it.

    Args:
        checkpoints: ordered by step.
        anchor_is_init: the first one is a base model, which may be stored in another floating dtype than the run:
            every tensor is widened before it is used, so the values are the same.
    """
    errors: list[CkavgError] = []
    for place, (before, after) in enumerate(itertools.pairwise(checkpoints)):
        lines = _compare(before, after, any_float=anchor_is_init and place == 0)
        if lines:
            more = [f"and {len(lines) - _SHOWN} more tensors"] if len(lines) > _SHOWN else []
            errors.append(
                MismatchError(
                    "; ".join(lines[:_SHOWN] + more) + ".",
                    hint=_hint(checkpoints, place, anchor_is_init=anchor_is_init),
                )
            )
    return errors


def _hint(checkpoints: Sequence[Checkpoint], place: int, *, anchor_is_init: bool) -> str:
    if anchor_is_init and place == 0:
        return "The base model given with --init must have the tensors of the run."
    before, after = checkpoints[place : place + 2]
    keeps_more = len(checkpoints) - 1 - place > 1
    choice = (
        f"Start later with --from-step {after.step}" if keeps_more else f"Stop earlier with --to-step {before.step}"
    )
    return f"Every checkpoint must have the same tensors. {choice}."


def _compare(before: Checkpoint, after: Checkpoint, *, any_float: bool) -> list[str]:
    if before.entries.keys() == after.entries.keys() and all(
        (old := before.entries[name]).shape == new.shape and old.dtype == new.dtype
        for name, new in after.entries.items()
    ):
        return []
    lines = [
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


def _compatible(old: Entry, new: Entry, *, any_float: bool) -> bool:
    return old.dtype == new.dtype or (any_float and old.is_floating and new.is_floating)
