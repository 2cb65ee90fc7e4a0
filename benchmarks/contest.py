"""The measurements: which commands run, in which order, and when their times count. Imports no torch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.measure import Measured
from benchmarks.synthetic import lengthen, weight_files

SCHEMES = ("pema", "ema", "bema")
PATH_TOLERANCE = 1e-5
"""Relative, of ℓ: float32 sums of some 10⁷ terms, taken in another order."""

Say = Callable[[str], None]


class WrongResultError(Exception):
    """ckavg and the obvious loop do not agree, so that neither's time means anything."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured run of a program that reads checkpoints.

    Attributes:
        seconds: wall time of the whole command.
        peak_bytes: its peak resident memory.
        bytes_read: bytes of checkpoints it read.
        path_seconds: wall time of pass 1 within it; None where there is none.
        replay_seconds: wall time of pass 2 within it, which reads as much; None where there is none.
        path_length: ℓ at every checkpoint; None where it is not measured.
    """

    seconds: float
    peak_bytes: int
    bytes_read: int
    path_seconds: float | None
    replay_seconds: float | None
    path_length: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Pair:
    """The obvious loop and ckavg, one right after the other."""

    obvious: Sample
    ckavg: Sample


def race(run: Path, scratch: Path, *, repeats: int, say: Say) -> dict[str, list[Pair]]:
    """Run the obvious loop and ckavg in turn, `repeats` times, for every scheme.

    Args:
        run: a synthetic run.
        scratch: directory for the results.
        repeats: how often.
        say: told what is being done.

    Raises:
        WrongResultError: the two do not agree.
        CommandError: one of them failed.
    """
    pairs: dict[str, list[Pair]] = {scheme: [] for scheme in SCHEMES}
    for turn in range(repeats):
        for scheme in SCHEMES:
            say(f"{scheme}, {turn + 1} of {repeats}")
            theirs, ours = scratch / f"obvious-{scheme}", scratch / f"ckavg-{scheme}"
            pair = Pair(_obvious(scheme, run, theirs), _ckavg(scheme, run, ours))
            _check(scheme, pair, theirs, ours)
            pairs[scheme].append(pair)
    return pairs


def rooflines(run: Path, *, repeats: int, say: Say) -> list[Sample]:
    """Read the run as fast as this machine can; the seconds are those of the reading alone, without any start-up."""
    samples = []
    for turn in range(repeats):
        say(f"roofline, {turn + 1} of {repeats}")
        measure.settle(weight_files(run))
        measured = measure.run(["-m", "benchmarks.roofline", str(run)])
        printed = json.loads(measured.stdout)
        samples.append(Sample(printed["seconds"], measured.peak_bytes, printed["bytes_read"], None, None, None))
    return samples


def starts(commands: Mapping[str, Sequence[str]], *, repeats: int, say: Say) -> dict[str, list[Measured]]:
    """Run short commands in turn, after one run of each that does not count."""
    say("start-up")
    for command in commands.values():
        measure.run(command)
    measured: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            measured[name].append(measure.run(command))
    return measured


def memory(run: Path, scratch: Path, *, repeats: int, say: Say) -> dict[int, list[Sample]]:
    """Peak memory of `ckavg pema` by number of checkpoints: those of the run, and twice as many."""
    once = len(weight_files(run))
    longer = scratch / "longer-run"
    lengthen(run, longer, checkpoints=2 * once)
    samples: dict[int, list[Sample]] = {once: [], 2 * once: []}
    for turn in range(repeats):
        for number, source in ((once, run), (2 * once, longer)):
            say(f"memory for {number} checkpoints, {turn + 1} of {repeats}")
            samples[number].append(_ckavg("pema", source, scratch / "ckavg-memory"))
    return samples


def _obvious(scheme: str, run: Path, out: Path) -> Sample:
    return _average(["-m", "benchmarks.obvious_loop", str(run), str(out), "--scheme", scheme], run, out)


def _ckavg(scheme: str, run: Path, out: Path) -> Sample:
    return _average(["-m", "ckavg", scheme, str(run), "--out", str(out), "--force", "--json", "-q"], run, out)


def _average(arguments: Sequence[str], run: Path, out: Path) -> Sample:
    shutil.rmtree(out, ignore_errors=True)  # beforehand, so that no old result can pass for a new one
    measure.settle(weight_files(run))
    measured = measure.run(arguments)
    printed = json.loads(measured.stdout)
    path, seconds = printed["path_length"], printed["seconds"]
    return Sample(
        measured.seconds,
        measured.peak_bytes,
        printed["bytes_read"],
        None if path is None else seconds["path"],
        seconds["replay"],
        None if path is None else tuple(path),
    )


def _check(scheme: str, pair: Pair, theirs: Path, ours: Path) -> None:
    expected, got = pair.obvious.path_length, pair.ckavg.path_length
    if (expected is None) != (got is None) or not _close(expected or (), got or ()):
        raise WrongResultError(f"{scheme}: the obvious loop measures the path length {expected}, ckavg {got}.")
    try:
        measure.run(["-m", "benchmarks.agreement", str(theirs), str(ours)])
    except measure.CommandError as error:
        raise WrongResultError(f"{scheme}: the weights of the obvious loop and of ckavg differ. {error}") from error


def _close(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(
        math.isclose(one, other, rel_tol=PATH_TOLERANCE) for one, other in zip(first, second, strict=True)
    )
