"""Stage *discover*: what a trainer wrote beside a checkpoint. Reads one small JSON file and does not trust it; opens no
weight file.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any, TypeGuard

from ckavg.atomic import read_small
from ckavg.run.values import Checkpoint

TRAINER_STATE = "trainer_state.json"
"""The file in which transformers' Trainer keeps `global_step` and `log_history`."""

LARGEST = 64 * 2**20
"""Bytes; a log of a few hundred thousand entries is smaller, and what is larger is not read for advice."""


def read_trainer_state(directory: Path) -> dict[str, Any]:
    """The trainer state of a checkpoint directory, empty where it is no JSON object.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError, RecursionError: it is not JSON.
    """
    state = json.loads(read_small(directory / TRAINER_STATE, LARGEST))
    return state if isinstance(state, dict) else {}


def learning_rates(checkpoint: Checkpoint) -> tuple[tuple[int, float], ...]:
    """The learning rates that the trainer had logged when it saved a checkpoint: (optimizer step, rate), by step.

    They are those of the entries of `log_history` that hold a `step` and a `learning_rate`; of several for one step,
    the last counts. Empty where there is no such log, where it is malformed or very large, or where the checkpoint is
    a single file: what lies beside that need not be of its run. Never raises.
    """
    if checkpoint.kind == "file":
        return ()
    try:
        found = (checkpoint.path / TRAINER_STATE).stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            return ()
        history = read_trainer_state(checkpoint.path).get("log_history")
    except (OSError, ValueError, RecursionError):
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
