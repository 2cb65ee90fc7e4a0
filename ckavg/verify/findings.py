"""What a check found, and what all checks of a result came to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ckavg.engine.context import OnProgress, Pass, Progress
from ckavg.errors import CkavgError, short_repr

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


@dataclass(slots=True)
class Report:
    """What the checks of a result have found until now; each of them adds to it.

    Attributes:
        on_progress: who is told of the bytes done and to do.
        findings: in the order of the checks.
        files, bytes_read, elements, largest_deviation: as of `Verified`.
    """

    on_progress: OnProgress | None = None
    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    bytes_read: int = 0
    elements: int = 0
    largest_deviation: float = 0.0

    def add(self, check: Check, message: str, *, is_problem: bool) -> None:
        """Add a problem, for which the result cannot be relied on, or a warning, which a user should know."""
        self.findings.append(Finding(check, message, is_problem))

    def problem(self, check: Check, message: str) -> None:
        """Add a problem."""
        self.add(check, message, is_problem=True)

    def warning(self, check: Check, message: str) -> None:
        """Add a warning."""
        self.add(check, message, is_problem=False)

    @contextmanager
    def ending(self, check: Check) -> Iterator[None]:
        """Have an error end this check alone, as one more problem."""
        try:
            yield
        except CkavgError as error:
            self.problem(check, error.message)

    def listener(self, stage: Pass) -> Callable[[int, int], None]:
        """What takes the bytes done and the bytes to do of a stage."""
        listen = self.on_progress
        return (lambda done, total: listen(Progress(stage, done, total))) if listen else (lambda done, total: None)


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

    __repr__ = short_repr

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
        numbers = ("elements", "largest_deviation", "seed", "bytes_read", "seconds")
        return {
            "result": str(self.result),
            "ckavg_version": self.ckavg_version,
            "checks": list(self.checks),
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            **{name: getattr(self, name) for name in numbers},
        }
