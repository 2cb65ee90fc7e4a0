"""PEMA on a run larger than the page cache: how much of its second pass comes from the disk."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.balloon import balloon
from benchmarks.cache import State
from benchmarks.contest import Arena, Say, attempt
from benchmarks.programs import PEMA, Sample, ckavg
from benchmarks.table import Row, median, most, with_spread

HEADER: Row = (
    "small page cache",
    "seconds",
    "pass 1, GB/s",
    "pass 2, GB/s",
    "read, GB",
    "from disk, GB",
    "of two readings",
    "at best",
    "peak MB",
)
NOTES = """\
Another process holds so much memory that the page cache has room for a third of the run; it starts empty. Of two
readings: what came from the disk, program and libraries included, by twice the size of the run. At best: where all that
the cache can hold is not fetched a second time. Medians (least–most)."""

_ROOM = 1 / 3
_PROGRAMS_BYTES = 500_000_000
"""Memory of the measured program and the system, besides the page cache."""


def measure_all(where: Arena, *, repeats: int, say: Say) -> list[Sample]:
    """Measure PEMA with a page cache for a third of the run.

    Raises:
        OSError: memory could not be occupied.
    """
    samples = []
    for turn in range(repeats):
        say(f"pema with a small page cache, {turn + 1} of {repeats}")
        with balloon(int(where.run_bytes * _ROOM) + _PROGRAMS_BYTES):
            samples.append(attempt(ckavg(PEMA), where, State.COLD))
    return samples


def rows(samples: Sequence[Sample]) -> list[Row]:
    """One line."""
    fetched = [one.disk_bytes / one.bytes_read for one in samples if one.disk_bytes is not None]
    return [
        (
            ckavg(PEMA).name,
            with_spread([one.seconds for one in samples], 1),
            median([one.path_rate for one in samples], 2),
            median([one.replay_rate for one in samples], 2),
            f"{samples[0].bytes_read / 1e9:.1f}",
            most([one.disk_bytes for one in samples], 1e9, 1),
            with_spread(fetched, 2),
            f"{1 - _ROOM / 2:.2f}",
            most([one.peak_bytes for one in samples], 1e6),
        )
    ]
