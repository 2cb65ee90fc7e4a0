"""Measurements as plain text. Reads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.contest import Pair, Sample
from benchmarks.measure import Measured, Spread, spread

Row = tuple[str, ...]

SPEED_HEADER: Row = ("", "seconds", "GB/s", "pass 1", "pass 2", "obvious ÷ this", "peak MB")
START_HEADER: Row = ("start-up", "seconds", "peak MB")
MEMORY_HEADER: Row = ("memory", "peak MB", "above imports")


def render(header: Row, rows: Iterable[Row]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right.

    >>> print(render(("", "seconds"), [("one", "1.0")]))
         seconds
    one      1.0
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def speed_rows(rooflines: Sequence[Sample], pairs: dict[str, list[Pair]]) -> list[Row]:
    """One row for each program: the roofline, then the obvious loop and ckavg for every scheme."""
    rows = [_speed("reading alone", rooflines, "")]
    for scheme, raced in pairs.items():
        rows.append(_speed(f"obvious loop, {scheme}", [pair.obvious for pair in raced], "1"))
        # Pair by pair: what else the machine was doing then slowed both.
        faster = spread(pair.obvious.seconds / pair.ckavg.seconds for pair in raced)
        rows.append(_speed(f"ckavg {scheme}", [pair.ckavg for pair in raced], _number(faster, 1)))
    return rows


def start_rows(starts: dict[str, list[Measured]]) -> list[Row]:
    """One row for each short command."""
    return [
        (name, _number(spread(one.seconds for one in measured), 2), _peak(measured))
        for name, measured in starts.items()
    ]


def memory_rows(imports: Sequence[Measured], memory: dict[int, list[Sample]]) -> list[Row]:
    """One row for each number of checkpoints, against a process that imports the libraries and does nothing."""
    floor = max(one.peak_bytes for one in imports)
    rows: list[Row] = [("imports alone", _peak(imports), "")]
    for number, samples in memory.items():
        above = max(sample.peak_bytes for sample in samples) - floor
        rows.append((f"ckavg pema, {number} checkpoints", _peak(samples), f"{above / 1e6:.0f}"))
    return rows


def _speed(name: str, samples: Sequence[Sample], ratio: str) -> Row:
    passes = ([one.path_seconds for one in samples], [one.replay_seconds for one in samples])
    times_read = sum(None not in seconds for seconds in passes)
    return (
        name,
        _number(spread(one.seconds for one in samples), 2),
        _rate(samples, [one.seconds for one in samples], 1),
        *(_rate(samples, seconds, times_read) for seconds in passes),
        ratio,
        _peak(samples),
    )


def _rate(samples: Sequence[Sample], seconds: Sequence[float | None], times_read: int) -> str:
    """GB/s, where the seconds are those of one of `times_read` passes; empty where there is no such pass."""
    rates = [one.bytes_read / times_read / 1e9 / took for one, took in zip(samples, seconds, strict=True) if took]
    return f"{spread(rates).median:.2f}" if rates else ""


def _peak(measured: Sequence[Sample] | Sequence[Measured]) -> str:
    return f"{max(one.peak_bytes for one in measured) / 1e6:.0f}"


def _number(values: Spread, digits: int) -> str:
    return f"{values.median:.{digits}f} ({values.least:.{digits}f}–{values.most:.{digits}f})"
