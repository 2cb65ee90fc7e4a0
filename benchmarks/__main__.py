"""`python -m benchmarks`: build a run, measure, print tables. Results go to stdout, progress to stderr.

Start-up, and runs of many tensors or adapters, are measured by `benchmarks.quick`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import cache, contest, measure, scaling, small_cache, speed
from benchmarks.cache import State
from benchmarks.expected import AVERAGES
from benchmarks.programs import MEAN, PEMA, find_mergekit
from benchmarks.synthetic import LEAST_MEGABYTES, refuse_foreign
from benchmarks.table import Row, render

PARTS = ("speed", "cold", "memory", "scaling")
_NEED_EMPTY_CACHE = {"cold", "memory"}
_RUNS, _COPIES = 1.5, 16
"""Disk space: the run and the smaller ones, relative to the run; the expected averages and one set of results, in
checkpoints."""


def main() -> int:
    arguments = _parse()
    base = arguments.directory.expanduser().resolve() / "ckavg-benchmarks"
    run, scratch = base / "run", base / "scratch"
    try:
        mergekit = find_mergekit(arguments.mergekit)
        refuse_foreign(run)
        _refuse_full(arguments)
    except (ValueError, OSError) as error:
        return _fail(error)
    try:
        _say("building the run")
        size = ["--checkpoints", str(arguments.checkpoints), "--megabytes", str(arguments.megabytes)]
        measure.run(["-m", "benchmarks.synthetic", str(run), *size])
        print(f"{arguments.checkpoints} checkpoints of about {arguments.megabytes} MB. {_machine(mergekit)}")
        parts = _possible(arguments.only)
        if parts:
            _measure(arguments, parts, run, scratch, mergekit[0] if mergekit else None)
    except (contest.WrongResultError, measure.CommandError, OSError) as error:
        return _fail(error)
    finally:
        shutil.rmtree(scratch if arguments.keep else base, ignore_errors=True)
    return 0


def _measure(arguments: argparse.Namespace, parts: set[str], run: Path, scratch: Path, mergekit: str | None) -> None:
    repeats, fewer = arguments.repeats, max(1, arguments.repeats - 1)
    in_turn = {state: part for state, part in ((State.WARM, "speed"), (State.COLD, "cold")) if part in parts}
    _say("computing the expected averages")
    where = contest.arena(run, scratch, list(AVERAGES) if in_turn else [PEMA, MEAN])
    if in_turn:
        contests = {state: speed.programs(state, mergekit_python=mergekit) for state in in_turn}
        turns = {State.WARM: repeats, State.COLD: fewer}
        raced = contest.race(contests, where, repeats=turns, say=_say)
        _show(speed.HEADER, speed.rows(raced), speed.NOTES)
    if "memory" in parts:
        samples = small_cache.measure_all(where, repeats=fewer, say=_say)
        _show(small_cache.HEADER, small_cache.rows(samples), small_cache.NOTES)
    if "scaling" in parts:
        size = (arguments.checkpoints, arguments.megabytes)
        scaled = scaling.measure_all(where, size, repeats=fewer, say=_say)
        _show(scaling.HEADER, scaling.rows(scaled, size), scaling.NOTES)


def _show(header: Row, rows: list[Row], notes: str) -> None:
    print(f"\n{render(header, rows)}\n\n{notes}", flush=True)


def _possible(parts: set[str]) -> set[str]:
    """The parts that can be measured on this system by this user."""
    if cache.can_drop():
        return parts
    for part in sorted(parts & _NEED_EMPTY_CACHE):
        print(f"{part}: left out; emptying the page cache needs Linux and root.")
    return parts - _NEED_EMPTY_CACHE


def _refuse_full(arguments: argparse.Namespace) -> None:
    """Raise `OSError` if the disk has too little space, before minutes of writing."""
    arguments.directory.mkdir(parents=True, exist_ok=True)
    needed = arguments.megabytes * 1_000_000 * (arguments.checkpoints * _RUNS + _COPIES)
    free = shutil.disk_usage(arguments.directory).free
    if free < needed:
        raise OSError(
            f"{arguments.directory} has {free / 1e9:.0f} GB free, and about {needed / 1e9:.0f} are needed. "
            "Name another --directory, or ask for fewer --checkpoints or --megabytes."
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure ckavg on a synthetic run.")
    parser.add_argument(
        "--only",
        type=_parts,
        default=set(PARTS),
        metavar="PARTS",
        help=f"some of {','.join(PARTS)}, separated by commas; default: all of them",
    )
    parser.add_argument("--checkpoints", type=_at_least(2), default=24, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--megabytes",
        type=_at_least(LEAST_MEGABYTES),
        default=470,
        metavar="N",
        help="of one checkpoint; default: %(default)s",
    )
    parser.add_argument(
        "--repeats",
        type=_at_least(1),
        default=3,
        metavar="N",
        help="turns of speed; one less of the other parts; default: %(default)s",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where ckavg-benchmarks/ is made, on a disk rather than in memory; default: %(default)s",
    )
    parser.add_argument("--keep", action="store_true", help="keep the run for the next time")
    parser.add_argument(
        "--mergekit", metavar="PYTHON", help="Python that has mergekit; by default this one, where it has it"
    )
    return parser.parse_args()


def _parts(text: str) -> set[str]:
    parts = set(text.split(","))
    if unknown := parts - set(PARTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    return parts


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def _machine(mergekit: tuple[str, str] | None) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    programs = [f"Python {platform.python_version()}", *map(_version, ("torch", "llvmlite", "ckavg"))]
    programs.append(f"mergekit {mergekit[1]}" if mergekit else "no mergekit")
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB of memory; "
        f"{', '.join(programs)}."
    )


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _say(what: str) -> None:
    print(f"[{what}]", file=sys.stderr, flush=True)


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
