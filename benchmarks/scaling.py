"""Time and memory by number of checkpoints and by size of the model: time should grow linearly, memory not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks import measure
from benchmarks.cache import State
from benchmarks.contest import Arena, Say, arena, attempt
from benchmarks.programs import MEAN, PEMA, Sample, ckavg
from benchmarks.synthetic import LEAST_MEGABYTES, shorten
from benchmarks.table import Row, median, most, with_spread

HEADER: Row = (
    "scaling",
    "checkpoints",
    "MB each",
    "GB read",
    "seconds",
    "s per GB",
    "passes, s",
    "s per further GB",
    "peak MB",
)
NOTES = """\
From the page cache. s per GB: seconds of the whole command by GB read; PEMA reads twice. Passes: without the start-up,
which does not grow. s per further GB: what was added since the line above, by what was read beyond it. Medians
(least–most). Peak: the most of all turns, 10⁶ bytes."""

PROGRAMS = (ckavg(PEMA), ckavg(MEAN))

Size = tuple[int, int]
"""Number of checkpoints, and megabytes of each."""


def sizes(checkpoints: int, megabytes: int) -> tuple[list[Size], list[Size]]:
    """A quarter, half and all of the checkpoints; and half of them at a quarter, half and all of their size.

    >>> sizes(24, 470)
    ([(6, 470), (12, 470), (24, 470)], [(12, 117), (12, 235), (12, 470)])
    >>> sizes(3, 20)
    ([(2, 20), (3, 20)], [(2, 20)])
    """
    half = max(2, checkpoints // 2)
    by_number = [(max(2, checkpoints // part), megabytes) for part in (4, 2, 1)]
    by_size = [(half, max(LEAST_MEGABYTES, megabytes // part)) for part in (4, 2, 1)]
    return list(dict.fromkeys(by_number)), list(dict.fromkeys(by_size))


def measure_all(whole: Arena, size: Size, *, repeats: int, say: Say) -> dict[Size, dict[str, list[Sample]]]:
    """Measure parts of a synthetic run, and runs of smaller checkpoints that are built beside it.

    Args:
        whole: the run.
        size: its size.
        repeats: number of rounds.
        say: called with progress messages.

    Returns:
        The samples of each program by its name, by the size of the run.
    """
    by_number, by_size = sizes(*size)
    arenas = {
        each: whole if each == size else _prepare(whole, size, each, say)
        for each in dict.fromkeys([*by_number, *by_size])
    }
    samples: dict[Size, dict[str, list[Sample]]] = {each: {one.name: [] for one in PROGRAMS} for each in arenas}
    for turn in range(repeats):
        for each, where in arenas.items():
            for program in PROGRAMS:
                say(f"{program.name}, {each[0]} checkpoints of {each[1]} MB, {turn + 1} of {repeats}")
                samples[each][program.name].append(attempt(program, where, State.WARM))
    return samples


def rows(samples: Mapping[Size, Mapping[str, Sequence[Sample]]], size: Size) -> list[Row]:
    """For each program, lines by number of checkpoints, then by their size."""
    by_number, by_size = sizes(*size)
    return [
        _row(program.name, each, samples[each][program.name], samples[before][program.name] if before else None)
        for program in PROGRAMS
        for line in (by_number, by_size)
        for before, each in zip([None, *line], line, strict=False)
    ]


def _prepare(whole: Arena, size: Size, part: Size, say: Say) -> Arena:
    number, megabytes = part
    say(f"preparing {number} checkpoints of {megabytes} MB")
    run = whole.scratch / f"{number}x{megabytes}"
    if megabytes == size[1]:
        shorten(whole.run, run, checkpoints=number)
    else:
        built = ["--checkpoints", str(number), "--megabytes", str(megabytes)]
        measure.run(["-m", "benchmarks.synthetic", str(run), *built])
    return arena(run, whole.scratch, [PEMA, MEAN])


def _row(name: str, size: Size, own: Sequence[Sample], before: Sequence[Sample] | None) -> Row:
    read = own[0].bytes_read / 1e9
    fewer = before[0].bytes_read / 1e9 if before else 0.0
    added = [one.seconds - less.seconds for one, less in zip(own, before or own, strict=True)]
    return (
        name,
        str(size[0]),
        str(size[1]),
        f"{read:.2f}",
        with_spread([one.seconds for one in own], 2),
        median([one.seconds / read for one in own], 3),
        median([one.seconds - one.outside_seconds for one in own], 2),
        median([seconds / (read - fewer) for seconds in added], 3) if before else "",
        most([one.peak_bytes for one in own], 1e6),
    )
