"""Programs in turn over one run, each from the same state of the page cache; no time counts for a wrong result.

Imports no torch: see `benchmarks.measure`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cache, measure
from benchmarks.cache import State
from benchmarks.programs import Program, Sample, sample_of
from benchmarks.synthetic import weight_files

PATH_TOLERANCE = 1e-5
"""Relative, of ℓ: float32 sums of some 10⁷ terms, taken in another order."""

Say = Callable[[str], None]
Turns = dict[str, list[Sample]]
"""The samples of each program by its name; those of one place in the lists were taken in one turn."""


class WrongResultError(Exception):
    """A program's result is not what it must be, so that its time means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """A run to measure on.

    Attributes:
        run: its directory.
        scratch: for the results; they are deleted once they are checked.
        expected: directory of what the averages must be, by their names.
        path_length: what ℓ must be.
    """

    run: Path
    scratch: Path
    expected: Path
    path_length: tuple[float, ...]

    @property
    def run_bytes(self) -> int:
        """Size of all weight files."""
        return sum(file.stat().st_size for file in weight_files(self.run))


def arena(run: Path, scratch: Path, names: Sequence[str]) -> Arena:
    """Form what the averages of a run must be, under `scratch`."""
    expected = scratch / f"expected-{run.name}"
    measured = measure.run(["-m", "benchmarks.reference", str(run), str(expected), *names])
    lengths = json.loads(measured.stdout)["path_length"]
    return Arena(run=run, scratch=scratch, expected=expected, path_length=tuple(lengths))


def attempt(program: Program, where: Arena, state: State) -> Sample:
    """Measure one program once, check its result and delete it.

    Raises:
        WrongResultError: the result is wrong.
        CommandError: the program failed.
    """
    out = where.scratch / "result"
    _clear(where, out)
    if state is State.WARM:  # a system may have dropped the libraries, too
        measure.run(["-c", f"import {program.imports}"], python=program.python)
    cache.prepare(state, weight_files(where.run))
    sample = sample_of(program, measure.run(program.arguments(where.run, out), python=program.python))
    _check(program, sample, where, out)
    _clear(where, out)
    return sample


def race(
    contests: Mapping[State, Sequence[Program]], where: Arena, *, repeats: Mapping[State, int], say: Say
) -> dict[State, Turns]:
    """Measure programs in turn: in every turn, each of them once, one right after the other.

    Args:
        contests: the programs by the state they start from.
        where: the run.
        repeats: number of turns by state.
        say: told what is being done.
    """
    samples: dict[State, Turns] = {
        state: {program.name: [] for program in programs} for state, programs in contests.items()
    }
    for turn in range(max(repeats[state] for state in contests)):
        for state, programs in contests.items():
            for program in programs if turn < repeats[state] else ():
                say(f"{program.name}, {state.value}, {turn + 1} of {repeats[state]}")
                samples[state][program.name].append(attempt(program, where, state))
    return samples


def _clear(where: Arena, out: Path) -> None:
    """Remove what could pass for a new result, or save the program a part of its work: ckavg keeps the path."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(where.run / "averaged", ignore_errors=True)


def _check(program: Program, sample: Sample, where: Arena, out: Path) -> None:
    if sample.path_length is not None and not _close(where.path_length, sample.path_length):
        raise WrongResultError(
            f"{program.name}: the path length is {where.path_length}, but was measured as {sample.path_length}."
        )
    pairs = [("--pair", str(where.expected / name), str(out / place)) for name, place in program.results.items()]
    if not pairs:
        return
    try:
        measure.run(["-m", "benchmarks.agreement", *(word for pair in pairs for word in pair)])
    except measure.CommandError as error:
        raise WrongResultError(f"{program.name}: the weights are wrong. {error}") from error


def _close(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(
        math.isclose(one, other, rel_tol=PATH_TOLERANCE) for one, other in zip(first, second, strict=True)
    )
