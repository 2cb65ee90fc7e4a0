"""A finding of a check, and the outcome of all checks of a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ckavg.engine.context import OnProgress, Pass, Progress
from ckavg.errors import CkavgError, short_repr

Check = Literal["record", "files", "weights", "sources", "replay"]
"""The checks of a result, in the order in which they run."""

HealthCheck = Literal["nonfinite", "foreign", "stale", "frozen"]
"""The checks of a run's weights, in the order in which their findings are listed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference from the record, or from what a sound run has.

    Attributes:
        check: the check that found it.
        message: what is wrong, where, and what was expected.
        is_problem: whether the result is unreliable, or the run cannot be averaged; otherwise it is a warning.
        step: of the checkpoint concerned; None for all of them, or for a result.
        tensor: the tensor concerned; None for all of them, or for a result.
    """

    check: Check | HealthCheck
    message: str
    is_problem: bool = True
    step: int | None = None
    tensor: str | None = None


@dataclass(slots=True)
class Report:
    """The findings so far, to which each check adds.

    Attributes:
        on_progress: called with the bytes done and the total.
        findings: in the order of the checks.
        files, bytes_read, elements, largest_deviation: see `Verified`.
    """

    on_progress: OnProgress | None = None
    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    bytes_read: int = 0
    elements: int = 0
    largest_deviation: float = 0.0

    def add(self, check: Check, message: str, *, is_problem: bool) -> None:
        """Add a problem, which makes the result unreliable, or a warning."""
        self.findings.append(Finding(check, message, is_problem))

    def problem(self, check: Check, message: str) -> None:
        """Add a problem."""
        self.add(check, message, is_problem=True)

    def warning(self, check: Check, message: str) -> None:
        """Add a warning."""
        self.add(check, message, is_problem=False)

    @contextmanager
    def ending(self, check: Check) -> Iterator[None]:
        """Turn an error into a problem, which ends only this check."""
        try:
            yield
        except CkavgError as error:
            self.problem(check, error.message)

    def listener(self, stage: Pass) -> Callable[[int, int], None]:
        """A function that takes the bytes done and the total bytes of a stage."""
        listen = self.on_progress
        return (lambda done, total: listen(Progress(stage, done, total))) if listen else (lambda done, total: None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The outcome of checking a result.

    Attributes:
        result: the directory that was checked.
        title: its scheme and steps, in words.
        ckavg_version: the version that made it.
        checks: the checks that ran.
        findings: all differences from the record, in the order of the checks.
        files: how many files were read in full.
        elements: how many elements were computed again; None without `replay`.
        largest_deviation: the largest difference from them, in units in the last place; None without `replay`.
        seed: of the random choice of elements; None without `replay`.
        bytes_read: bytes read of the result and its sources.
        seconds: wall-clock time.
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

    __repr__ = short_repr

    @property
    def problems(self) -> tuple[str, ...]:
        """What makes the result unreliable; empty if it matches its record."""
        return tuple(each.message for each in self.findings if each.is_problem)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Other differences that a user should know."""
        return tuple(each.message for each in self.findings if not each.is_problem)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        numbers = ("elements", "largest_deviation", "seed", "bytes_read", "seconds")
        return {
            "result": str(self.result),
            "ckavg_version": self.ckavg_version,
            "checks": list(self.checks),
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            **{name: getattr(self, name) for name in numbers},
        }
