"""Runs programs alternately on one run, each from the same state of the page cache, and checks their results.

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
"""Relative tolerance of ℓ: float32 sums of some 10⁷ terms in another order."""

Say = Callable[[str], None]
Turns = dict[str, list[Sample]]
"""The samples of each program by its name. Samples at the same index are from the same round."""


class WrongResultError(Exception):
    """A program's result is wrong, so its time means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """A run to measure on.

    Attributes:
        run: its directory.
        scratch: for the results, which are deleted after the check.
        expected: directory of the expected averages, by their names.
        path_length: the expected ℓ.
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
    """Compute the expected averages of a run, under `scratch`."""
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
    if state is State.WARM:  # the system may also have evicted the libraries
        measure.run(["-c", f"import {program.imports}"], python=program.python)
    cache.prepare(state, weight_files(where.run))
    sample = sample_of(program, measure.run(program.arguments(where.run, out), python=program.python))
    _check(program, sample, where, out)
    _clear(where, out)
    return sample


def race(
    contests: Mapping[State, Sequence[Program]], where: Arena, *, repeats: Mapping[State, int], say: Say
) -> dict[State, Turns]:
    """Measure programs in rounds: each program once per round, one right after the other.

    Args:
        contests: the programs by the state they start from.
        where: the run.
        repeats: number of rounds by state.
        say: called with progress messages.
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
    """Remove earlier results, and the cached path, which would save ckavg a part of its work."""
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
