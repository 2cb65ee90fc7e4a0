"""Stage *verify*, its values: what a check found, and what all of them came to. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Check = Literal["record", "files", "weights", "sources", "replay"]
"""The checks of a result, in the order in which they are made."""

HealthCheck = Literal["nonfinite", "foreign", "stale", "frozen"]
"""The checks of a run's weights, in the order in which their findings are listed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it was recorded, or as it should be in a sound run.

    Attributes:
        check: what found it.
        message: what is not as it should be, where, and what was expected.
        is_problem: whether the result cannot be relied on, or the run cannot be averaged; otherwise it is a warning.
        step: of the checkpoint of a run that it is about; None: of all of them, or a result.
        tensor: the tensor of a run that it is about; None: all of them, or a result.
    """

    check: Check | HealthCheck
    message: str
    is_problem: bool = True
    step: int | None = None
    tensor: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What came of checking a result.

    Attributes:
        result: the directory that was checked.
        title: what its record says it is, for people.
        ckavg_version: the version that made it.
        checks: what was checked.
        findings: all that is not as it was recorded, in the order of the checks.
        files: how many files were read in full.
        elements: how many elements were computed again; None without `replay`.
        largest_deviation: the largest difference from what was recomputed, in units of the last place; None likewise.
        seed: which elements were drawn; None likewise.
        bytes_read: bytes of the result and of its sources that were read.
        seconds: how long it took.
    """

    result: Path
    title: str
    ckavg_version: str
    checks: tuple[Check, ...]
    findings: tuple[Finding, ...]
    files: int
    elements: int | None
    largest_deviation: float | None
    seed: int | None
    bytes_read: int
    seconds: float

    @property
    def problems(self) -> tuple[str, ...]:
        """What makes the result unreliable; empty where all is as recorded."""
        return tuple(each.message for each in self.findings if each.is_problem)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What does not, but should be known."""
        return tuple(each.message for each in self.findings if not each.is_problem)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "result": str(self.result),
            "ckavg_version": self.ckavg_version,
            "checks": list(self.checks),
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "elements": self.elements,
            "largest_deviation": self.largest_deviation,
            "seed": self.seed,
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
        }
