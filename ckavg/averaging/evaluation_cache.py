"""Cached evaluations, kept beside the results, so that the same weights are not evaluated twice.

The key is the SHA-256 of a result's weight files, or the fingerprint of a checkpoint (`checkpoints/fingerprints.py`),
with the command and the names of the metric and its standard error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ckavg.averaging.evaluation import Criterion
from ckavg.checkpoints.fingerprints import fingerprint
from ckavg.checkpoints.run import Checkpoint, Run
from ckavg.output.record import Evaluation, Output
from ckavg.path.cache import cache_files
from ckavg.storage.table import load_table, not_believed, save_table

NAME = "evaluations.json"

_FORMAT = 1
_MOST_BYTES = 1 << 26
_KEY_LETTERS = 64

Values = dict[str, tuple[float, float | None, str]]
"""Value, standard error and amount of data by key."""


@dataclass(frozen=True, slots=True)
class EvaluationCache:
    """The cached evaluations of a run by one criterion.

    Attributes:
        criterion: the command and the metric.
        files: where the cache may be; the first that can be written is used.
        values: the cached values.
        warnings: about files that were damaged or edited.
    """

    criterion: Criterion
    files: tuple[Path, ...]
    values: Values = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def load(cls, run: Run, criterion: Criterion, *, anew: bool = False) -> EvaluationCache:
        """Load the cache of a run; with `anew`, an empty one. A file that was damaged or edited counts as empty."""
        files = cache_files(run, NAME)
        if anew:
            return cls(criterion, files)
        loaded = {file: _load(file) for file in files}
        warnings = tuple(not_believed(file, "evaluated") for file, values in loaded.items() if values is None)
        values = {key: value for each in reversed(loaded.values()) for key, value in (each or {}).items()}
        return cls(criterion, files, values, warnings)

    def key_of_result(self, output: Output, weight_files: tuple[str, ...]) -> str:
        """The key of a result or a snapshot, from its record and the names of its weight files."""
        return self._key("weights", sorted((name, output.sha256[name]) for name in weight_files))

    def key_of_checkpoint(self, checkpoint: Checkpoint) -> str | None:
        """The key of a checkpoint; None if it has no fingerprint, since a later change would go unnoticed."""
        known = fingerprint(checkpoint)
        return None if known is None else self._key("checkpoint", known)

    def _key(self, *what: object) -> str:
        asked = [*what, self.criterion.command, self.criterion.metric, self.criterion.stderr]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def get(self, key: str | None) -> Evaluation | None:
        """The cached evaluation of a key; None if there is none."""
        if key is None or key not in self.values:
            return None
        value, stderr, data = self.values[key]
        criterion = self.criterion
        return Evaluation(criterion.command, value, "", criterion.metric or "", stderr, criterion.goal, data=data)

    def add(self, key: str | None, evaluation: Evaluation) -> None:
        """Cache an evaluation that succeeded, in the file too, keeping what other processes have added meanwhile."""
        if key is None or evaluation.value is None or evaluation.problem:
            return
        self.values[key] = (evaluation.value, evaluation.stderr, evaluation.data)
        for file in self.files:
            values = (_load(file) or {}) | {key: self.values[key]}
            known = {key: each if each[2] else each[:2] for key, each in values.items()}
            table = {"format": _FORMAT, "evaluations": known}
            with contextlib.suppress(OSError):  # the file there may belong to somebody else
                save_table(file, table)
                return


def _load(file: Path) -> Values | None:
    """The values in a file; empty if it cannot be read, None if it was damaged or edited."""
    table = load_table(file, _FORMAT, most_bytes=_MOST_BYTES, follow=False)
    if not table:
        return None if table is None else {}
    if table.keys() != {"format", "evaluations"}:
        return None
    try:
        return {_checked_key(key): _checked(*pair) for key, pair in table["evaluations"].items()}
    except (ValueError, OverflowError, AttributeError, TypeError, KeyError):
        return None


def _checked_key(key: str) -> str:
    if len(key) != _KEY_LETTERS:
        raise ValueError(key)
    return key


def _checked(value: float, stderr: float | None, data: str = "") -> tuple[float, float | None, str]:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(value)
    if stderr is not None and (type(stderr) not in (int, float) or not 0 <= stderr < math.inf):
        raise ValueError(stderr)
    if not isinstance(data, str) or len(data) > _KEY_LETTERS:
        raise ValueError(data)
    return float(value), None if stderr is None else float(stderr), data
