"""The programs that are measured: how each is called, what it must produce, and what it reports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks.expected import AVERAGES, SWEEP
from benchmarks.measure import Measured

PEMA, MEAN, BEMA = "pema-gamma0.15", "mean", "bema-eta0.2"
MERGEKIT_IMPORT = "mergekit.scripts.run_yaml"

_CKAVG = "torch, ckavg.cli"
_ROOFLINE = ("-m", "benchmarks.roofline")
QUIETLY = ("--force", "--json", "-q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program that reads every checkpoint of a run.

    Attributes:
        name: in the tables.
        arguments: for Python, from the run and the directory for results.
        results: path of each average below that directory, by the average's name.
        imports: the modules that dominate its start-up.
        python: the Python that runs it.
        alone: count only the seconds that it reports itself, without start-up.
    """

    name: str
    arguments: Callable[[Path, Path], list[str]]
    results: Mapping[str, str] = field(default_factory=dict)
    imports: str = "numpy"
    python: str = sys.executable
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured run of a program.

    Attributes:
        seconds: wall time of the whole command, including start-up and writing.
        peak_bytes: its peak resident memory.
        disk_bytes: bytes that came from storage; None if the system does not count them.
        bytes_read: bytes of checkpoints read.
        path_seconds: wall time of pass 1; None if there is none.
        replay_seconds: wall time of pass 2, which reads as much; None if there is none.
        path_length: ℓ at every checkpoint; None if it was not measured.
    """

    seconds: float
    peak_bytes: int
    disk_bytes: int | None
    bytes_read: int
    path_seconds: float | None
    replay_seconds: float | None
    path_length: tuple[float, ...] | None

    @property
    def rate(self) -> float:
        """GB/s of the whole command."""
        return self.bytes_read / 1e9 / self.seconds

    @property
    def path_rate(self) -> float | None:
        """GB/s of pass 1."""
        return self.bytes_read / 2e9 / self.path_seconds if self.path_seconds else None

    @property
    def replay_rate(self) -> float | None:
        """GB/s of pass 2."""
        passes = 2 if self.path_seconds else 1
        return self.bytes_read / passes / 1e9 / self.replay_seconds if self.replay_seconds else None

    @property
    def outside_seconds(self) -> float:
        """Time outside the passes: start-up, headers, the last files, exit."""
        return self.seconds - (self.path_seconds or 0.0) - (self.replay_seconds or 0.0)


def sample_of(program: Program, measured: Measured) -> Sample:
    """Parse the output of a program: a JSON object, or those of several averages under `averages`.

    >>> printed = '{"bytes_read": 8, "seconds": {"path": 1, "replay": 2, "total": 3}, "path_length": [0, 0.5]}'
    >>> sample = sample_of(obvious_loop(), Measured(4.0, 100, 0, printed))
    >>> sample.path_seconds, sample.outside_seconds, sample.path_length
    (1, 1.0, (0, 0.5))
    """
    printed = json.loads(measured.stdout)
    # All averages of a sweep have the bytes and seconds of its one reading; a PEMA has ℓ.
    objects = printed.get("averages", [printed])
    lengths = next((each["path_length"] for each in objects if each["path_length"]), None)
    seconds = objects[0]["seconds"]
    return Sample(
        seconds["total"] if program.alone else measured.seconds,
        measured.peak_bytes,
        measured.disk_bytes,
        objects[0]["bytes_read"],
        seconds["path"] if lengths else None,
        seconds["replay"],
        tuple(lengths) if lengths else None,
    )


def mapped_roofline() -> Program:
    """Only reads and sums files in the page cache."""
    return Program(name="reading alone, mapped", arguments=lambda run, out: [*_ROOFLINE, str(run)], alone=True)


def pread_roofline(threads: int) -> Program:
    """Only reads from the disk."""
    return Program(
        name=f"reading alone, {threads} threads",
        arguments=lambda run, out: [*_ROOFLINE, str(run), "--pread", str(threads)],
        alone=True,
    )


def obvious_loop() -> Program:
    """The obvious loop, for PEMA."""
    return Program(
        name="obvious loop, pema",
        arguments=lambda run, out: ["-m", "benchmarks.obvious_loop", str(run), str(out)],
        results={PEMA: "."},
        imports="torch, safetensors.torch",
    )


def mergekit(python: str = sys.executable) -> Program:
    """mergekit's `linear` merge."""
    return Program(
        name="mergekit linear",
        arguments=lambda run, out: ["-m", "benchmarks.mergekit_linear", str(run), str(out)],
        results={MEAN: "."},
        imports=MERGEKIT_IMPORT,
        python=python,
    )


def ckavg(result: str) -> Program:
    """The command of one scheme with its default settings, by the name of its result."""
    scheme = result.partition("-")[0]
    return Program(
        name=f"ckavg {scheme}",
        arguments=lambda run, out: ["-m", "ckavg", scheme, str(run), "--out", str(out), *QUIETLY],
        results={result: "."},
        imports=_CKAVG,
    )


def sweep() -> Program:
    """`ckavg sweep` over all averages."""
    return Program(
        name=f"ckavg sweep, {len(AVERAGES)} averages",
        arguments=lambda run, out: ["-m", "ckavg", "sweep", str(run), *SWEEP, "--out", str(out), *QUIETLY],
        results={name: name for name in AVERAGES},
        imports=_CKAVG,
    )


def find_mergekit(python: str | None) -> tuple[str, str] | None:
    """The Python that has mergekit, and mergekit's version.

    Args:
        python: where to look; None means this one.

    Returns:
        None if this Python has none, and no other was named.

    Raises:
        ValueError: the named Python has none.
    """
    if python is None and find_spec("mergekit") is None:
        return None
    found = sys.executable if python is None else str(Path(shutil.which(python) or python).absolute())
    asked = [found, "-c", "from importlib.metadata import version; print(version('mergekit'))"]
    try:
        version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{found} is no Python with mergekit.") from error
    return found, version
