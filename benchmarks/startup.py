"""The time of a command outside its passes: the interpreter, imports, headers, and exit."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from benchmarks import measure
from benchmarks.cache import State
from benchmarks.contest import Arena, Say, attempt
from benchmarks.measure import Measured
from benchmarks.programs import MEAN, MERGEKIT_IMPORT, PEMA, Sample, ckavg
from benchmarks.table import Row, most, with_spread

HEADER: Row = ("start-up", "seconds", "peak MB")
_OFTEN = 2
NOTES = "Outside the passes: seconds of the whole command less those of its passes. Medians (least–most)."

_COMMANDS: Mapping[str, Sequence[str]] = {
    "python, nothing imported": ["-c", "pass"],
    "import numpy": ["-c", "import numpy"],
    "import torch": ["-c", "import torch"],
    "ckavg --help": ["-m", "ckavg", "--help"],
}


def measure_all(
    where: Arena, *, mergekit_python: str | None, repeats: int, say: Say
) -> tuple[dict[str, list[Measured]], dict[str, list[Sample]]]:
    """Run short commands and averages alternately, the short ones more often, after one untimed run of each."""
    commands = {name: (list(arguments), sys.executable) for name, arguments in _COMMANDS.items()}
    if mergekit_python:
        commands["import mergekit"] = (["-c", f"import {MERGEKIT_IMPORT}"], mergekit_python)
    averages = [ckavg(PEMA), ckavg(MEAN)]
    say("start-up, untimed")
    for arguments, python in commands.values():
        measure.run(arguments, python=python)
    short: dict[str, list[Measured]] = {name: [] for name in commands}
    whole: dict[str, list[Sample]] = {program.name: [] for program in averages}
    for turn in range(repeats):
        say(f"start-up, {turn + 1} of {repeats}")
        for name, (arguments, python) in [*commands.items()] * _OFTEN:
            short[name].append(measure.run(arguments, python=python))
        for program in averages:
            whole[program.name].append(attempt(program, where, State.WARM))
    return short, whole


def rows(short: Mapping[str, Sequence[Measured]], whole: Mapping[str, Sequence[Sample]]) -> list[Row]:
    """A line for each command."""
    lines: list[Row] = [
        (name, with_spread([one.seconds for one in measured], 2), most([one.peak_bytes for one in measured], 1e6))
        for name, measured in short.items()
    ]
    for name, samples in whole.items():
        outside = with_spread([one.outside_seconds for one in samples], 2)
        lines.append((f"{name}, outside the passes", outside, most([one.peak_bytes for one in samples], 1e6)))
    return lines
