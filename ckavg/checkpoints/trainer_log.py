"""Stage *discover*: what a trainer wrote beside a checkpoint. Reads one small JSON file and does not trust it; opens no
weight file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

from ckavg.checkpoints.run import Checkpoint
from ckavg.storage.base import AnyPath
from ckavg.storage.local import read_object

TRAINER_STATE = "trainer_state.json"
"""The file in which transformers' Trainer keeps `global_step` and `log_history`."""

LARGEST = 64 * 2**20
"""Bytes; a log of a few hundred thousand entries is smaller, and what is larger is not read for advice."""


def read_trainer_state(directory: AnyPath) -> dict[str, Any]:
    """The trainer state of a checkpoint directory, empty where it is no JSON object.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is not JSON, no plain file, or very large.
    """
    return read_object(directory / TRAINER_STATE, LARGEST)


def logged_losses(state: Mapping[str, Any]) -> dict[int, set[float]]:
    """The losses of a log by optimizer step; a run that was resumed may have logged a step twice."""
    losses: dict[int, set[float]] = {}
    history = state.get("log_history")
    for entry in history if isinstance(history, list) else ():
        if isinstance(entry, dict):
            step, loss = entry.get("step"), entry.get("loss")
            if type(step) is int and type(loss) is float and math.isfinite(loss):
                losses.setdefault(step, set()).add(loss)
    return losses


def contradiction(before: Mapping[int, set[float]], after: Mapping[int, set[float]]) -> int | None:
    """The first step at which two logs have no loss in common, so that they are of two runs; None if there is none.

    A trainer keeps its log from one checkpoint to the next: of one run, the later log holds all of the earlier one.
    """
    return min((step for step in before.keys() & after.keys() if not before[step] & after[step]), default=None)


def learning_rates(checkpoint: Checkpoint) -> tuple[tuple[int, float], ...]:
    """The learning rates that the trainer had logged when it saved a checkpoint: (optimizer step, rate), by step.

    They are those of the entries of `log_history` that hold a `step` and a `learning_rate`; of several for one step,
    the last counts. Empty where there is no such log, where it is malformed or very large, or where the checkpoint is
    a single file: what lies beside that need not be of its run. Never raises.
    """
    if checkpoint.kind == "file":
        return ()
    try:
        history = read_trainer_state(checkpoint.path).get("log_history")
    except (OSError, ValueError):
        return ()
    if not isinstance(history, list):
        return ()
    rates: dict[int, float] = {}
    for entry in history:
        if isinstance(entry, dict):
            step, rate = entry.get("step"), entry.get("learning_rate")
            if type(step) is int and step >= 0 and _is_rate(rate):
                rates[step] = float(rate)
    return tuple(sorted(rates.items()))


def _is_rate(value: object) -> TypeGuard[int | float]:
    """Whether it is finite and not negative; JSON as Python reads it knows NaN, infinity and integers of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
