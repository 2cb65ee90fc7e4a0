"""`python -m benchmarks`: build a run, measure, print tables. Results to stdout, what is being done to stderr."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from benchmarks import contest, measure, table
from benchmarks.synthetic import refuse_foreign

_STARTS = {"ckavg --help": ["-m", "ckavg", "--help"], "import torch": ["-c", "import torch"]}
_IMPORTS = {"imports": ["-c", "import torch, ckavg.cli"]}
_SHORT = 5

_NOTES = """\
Medians (least–most). Seconds: the whole command, start-up and writing included, from a warm page cache; reading alone:
without start-up. GB/s: bytes of checkpoints read, by those seconds; of a pass: by the seconds of that pass alone.
Peak MB: the most of all runs, mapped files included. Obvious ÷ this: taken pair by pair.
Every result of ckavg agrees with the obvious loop's to one unit of bfloat16."""

_MEMORY_NOTES = """\
Peak MB: the most of all runs, 10⁶ bytes. The longer run links to the same weight files under other steps."""


def main() -> int:
    arguments = _parse()
    base = arguments.directory.expanduser().resolve() / "ckavg-benchmarks"
    run, results = base / "run", base / "results"
    try:
        refuse_foreign(run)
    except FileExistsError as error:
        return _fail(error)
    try:
        _say("building the run")
        size = ["--checkpoints", str(arguments.checkpoints), "--megabytes", str(arguments.megabytes)]
        measure.run(["-m", "benchmarks.synthetic", str(run), *size])
        print(f"{arguments.checkpoints} checkpoints of about {arguments.megabytes} MB. {_machine()}")
        if not arguments.memory:
            _print_speed(run, results, arguments.repeats)
        _print_memory(run, results, arguments.repeats)
    except (contest.WrongResultError, measure.CommandError) as error:
        return _fail(error)
    finally:
        shutil.rmtree(results if arguments.keep else base, ignore_errors=True)
    return 0


def _print_speed(run: Path, results: Path, repeats: int) -> None:
    pairs = contest.race(run, results, repeats=repeats, say=_say)
    rooflines = contest.rooflines(run, repeats=repeats, say=_say)
    starts = contest.starts(_STARTS, repeats=max(repeats, _SHORT), say=_say)
    print(f"\n{table.render(table.SPEED_HEADER, table.speed_rows(rooflines, pairs))}\n\n{_NOTES}")
    print(f"\n{table.render(table.START_HEADER, table.start_rows(starts))}")


def _print_memory(run: Path, results: Path, repeats: int) -> None:
    imports = contest.starts(_IMPORTS, repeats=repeats, say=_say)["imports"]
    memory = contest.memory(run, results, repeats=repeats, say=_say)
    print(f"\n{table.render(table.MEMORY_HEADER, table.memory_rows(imports, memory))}\n\n{_MEMORY_NOTES}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure ckavg on a synthetic run.")
    parser.add_argument("--checkpoints", type=_at_least(2), default=12, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--megabytes", type=_at_least(20), default=470, metavar="N", help="of one checkpoint; default: %(default)s"
    )
    parser.add_argument("--repeats", type=_at_least(1), default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where ckavg-benchmarks/ is made, on a disk rather than in memory; default: %(default)s",
    )
    parser.add_argument("--keep", action="store_true", help="leave the run there, for the next time")
    parser.add_argument("--memory", action="store_true", help="measure memory alone, not speed")
    return parser.parse_args()


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def _machine() -> str:
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {version('torch')}, ckavg {version('ckavg')}."
    )


def _say(what: str) -> None:
    print(f"[{what}]", file=sys.stderr, flush=True)


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
