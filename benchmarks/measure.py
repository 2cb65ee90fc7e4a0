"""Wall time and peak memory of whole commands, each in its own process.

The measuring process must stay small, so it must not import torch: the system counts memory inherited between `fork`
and `exec` towards the child's peak, so a child never seems smaller than its parent.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LINUX = sys.platform.startswith("linux")
_MAXRSS_UNIT = 1024 if _LINUX else 1
_INBLOCK_UNIT = 512


class CommandError(Exception):
    """A measured command ended with an error."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a command.

    Attributes:
        seconds: wall time from start to end, including the interpreter and its imports.
        peak_bytes: its peak resident memory.
        disk_bytes: bytes read from storage rather than the page cache; None if the system does not count them.
        stdout: what it printed.
        cpu_seconds: user and system time of its threads, which depends less on other work on the machine.
    """

    seconds: float
    peak_bytes: int
    disk_bytes: int | None
    stdout: str
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    least: float
    most: float


def spread(values: Iterable[float]) -> Spread:
    """Median and extremes.

    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, least=1.0, most=3.0)
    """
    ordered = sorted(values)
    return Spread(statistics.median(ordered), ordered[0], ordered[-1])


def run(
    arguments: Sequence[str], *, python: str = sys.executable, root: Path = ROOT, limit: float | None = None
) -> Measured:
    """Run a Python with arguments and measure it.

    Args:
        arguments: what follows it.
        python: which.
        root: the checkout whose `ckavg` and `benchmarks` it finds.
        limit: seconds after which it is killed; None: none.

    Raises:
        CommandError: it could not be started, took too long, or its exit status was not 0.
    """
    command = [python, *arguments]
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        begun = time.perf_counter()
        try:
            process = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        except OSError as error:
            raise CommandError(f"{python} cannot be run: {error.strerror}.") from error
        watch = threading.Timer(limit, process.kill) if limit else None
        try:
            if watch:
                watch.start()
            # Not process.wait(): only wait4 reports the usage of this child alone.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            if watch:
                watch.cancel()
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if limit and process.returncode == -signal.SIGKILL and seconds >= limit:
            raise CommandError(f"{' '.join(command)}\ntook longer than {limit:.0f} s.")
        if process.returncode:
            said = _text(stderr.fileno()).strip()
            raise CommandError(f"{' '.join(command)}\nended with status {process.returncode}:\n{said}")
        return Measured(
            seconds,
            usage.ru_maxrss * _MAXRSS_UNIT,
            usage.ru_inblock * _INBLOCK_UNIT if _LINUX else None,
            _text(stdout.fileno()),
            usage.ru_utime + usage.ru_stime,
        )


def _text(handle: int) -> str:
    os.lseek(handle, 0, os.SEEK_SET)
    with os.fdopen(os.dup(handle), encoding="utf-8", errors="replace") as opened:
        return opened.read()
