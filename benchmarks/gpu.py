"""`python -m benchmarks.gpu`: whether a GPU computes what its CPU does, how fast, and which constants follow.

The parts run one after the other, each with a limit of its own, and each prints its figures as they are known; a part
that fails or takes too long does not keep the next ones from running. Whole commands start from a warm page cache, each
in a process of its own. Imports no torch: see `benchmarks.measure`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import gpu_constants
from benchmarks.cache import State, prepare
from benchmarks.expected import SWEEP
from benchmarks.gpu_constants import CPU, GPU, Pass, Sample
from benchmarks.measure import ROOT, CommandError, run
from benchmarks.programs import QUIETLY
from benchmarks.synthetic import refuse_foreign, weight_files
from benchmarks.table import render, with_spread

_PROGRAMS = ("-m", "benchmarks.gpu_programs")
_TURNS = 3
_MINUTES = 8


@dataclass(slots=True)
class Check:
    """What is checked, and what came of it so far.

    Attributes:
        arguments: of the command line.
        device: of the GPU, or `cpu` for a trial.
        run, results: directories.
        samples: of each command, by verb and device.
        passes: of each device, by tile and threads.
    """

    arguments: argparse.Namespace
    device: str
    run: Path
    results: Path
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the check.

    Attributes:
        name: as the plan shows it.
        seconds: after which it is ended, of eight minutes for all.
        work: gets the check, and the seconds that it has.
        what: it tells.
    """

    name: str
    seconds: float
    work: Callable[[Check, float], None]
    what: str

    def limit(self, minutes: float) -> float:
        """Seconds after which it is ended where all may take so many minutes."""
        return self.seconds * minutes / _MINUTES


def _machine(check: Check, seconds: float) -> None:
    print(run([*_PROGRAMS, "machine"], limit=seconds).stdout, end="")


def _correctness(check: Check, seconds: float) -> None:
    for line in _lines(["-m", "tests.gpu", check.device], seconds):
        print(line)


def _bus(check: Check, seconds: float) -> None:
    for line in _lines([*_PROGRAMS, "bus", check.device], seconds):
        print(line)


def _building(check: Check, seconds: float) -> None:
    refuse_foreign(check.run)
    size = ["--checkpoints", str(check.arguments.checkpoints), "--megabytes", str(check.arguments.megabytes)]
    built = run(["-m", "benchmarks.synthetic", str(check.run), *size], limit=seconds)
    print(f"{check.arguments.checkpoints} checkpoints of about {check.arguments.megabytes} MB in {built.seconds:.0f} s")


def _command(verb: str, *words: str) -> Callable[[Check, float], None]:
    """A command on CPU and GPU, in turn, as often as there is time for; the first results are compared."""

    def work(check: Check, seconds: float) -> None:
        ends = time.monotonic() + seconds
        for turn in range(_TURNS):
            began = time.monotonic()
            pair = []
            for name in (CPU, GPU):
                pair.append(_measured(check, verb, words, name, ends - time.monotonic()))
                print(f"{verb} on the {name}: {pair[-1]}", flush=True)
            if turn == 0:  # before: no time counts for a wrong result
                _compare(check, verb, verb, ends - time.monotonic())
            for name, sample in zip((CPU, GPU), pair, strict=True):
                check.samples.setdefault((verb, name), []).append(sample)
            if 2 * time.monotonic() - began > ends:
                break
        ratios = [one.seconds / other.seconds for one, other in zip(*_both(check, verb), strict=True)]
        print(f"{verb}: {CPU} ÷ {GPU} {with_spread(ratios, 2)}")

    return work


def _measured(check: Check, verb: str, words: Sequence[str], name: str, seconds: float) -> Sample:
    out = check.results / name / verb
    _prepare(check, out)
    device = "cpu" if name == CPU else check.device
    command = [verb, str(check.run), *words, "--out", str(out), "--device", device, *QUIETLY]
    measured = run([*_PROGRAMS, "command", *command], limit=max(seconds, 1))
    return Sample.parse(measured)


def _prepare(check: Check, out: Path) -> None:
    """So that no old result can pass for a new one, no path is known, and all is in the page cache."""
    for old in (out, check.run / "averaged"):
        shutil.rmtree(old, ignore_errors=True)
    prepare(State.WARM, weight_files(check.run))


def _both(check: Check, verb: str) -> tuple[list[Sample], list[Sample]]:
    return check.samples[verb, CPU], check.samples[verb, GPU]


def _compare(check: Check, verb: str, other: str, seconds: float) -> None:
    """Compare a result of the GPU with that of the CPU, weight by weight.

    Raises:
        CommandError: they do not agree.
    """
    places = [str(check.results / GPU / verb), str(check.results / CPU / other)]
    found = json.loads(run([*_PROGRAMS, "compare", *places], limit=max(seconds, 1)).stdout)
    print("{weights:,} weights, {differ:,} differ, by {most_units:,} units at most".format(**found), flush=True)
    if found["wrong"]:  # more than a unit, and by more than 2⁻²¹ of the largest weight of the tensor
        raise CommandError(f"{verb}: {found['wrong']:,} weights differ by more than rounding.")


def _passes(check: Check, seconds: float) -> None:
    prepare(State.WARM, weight_files(check.run))
    try:
        for line in _lines([*_PROGRAMS, "passes", str(check.run), check.device], seconds):
            check.passes.append(Pass(**json.loads(line)))
            print(check.passes[-1], flush=True)
    finally:
        print(gpu_constants.table_of(check.passes))


def _two_processes(check: Check, seconds: float) -> None:
    ends, out = time.monotonic() + seconds, check.results / GPU / "two"
    _prepare(check, out)
    words = ["pema", str(check.run), "--out", str(out), "--device", check.device, *QUIETLY]
    begun = time.monotonic()
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *_PROGRAMS, "command", *words],
            cwd=ROOT,
            env=os.environ | told | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
        )
        for rank in "01"
    ]
    try:
        statuses = [process.wait(max(ends - time.monotonic(), 1)) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"Two processes took longer than {seconds:.0f} s.") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()
    took = time.monotonic() - begun
    if any(statuses):
        raise CommandError(f"Two processes ended with {statuses}.")
    print(f"pema by two processes on one {GPU}: {took:.2f} s")
    if one := check.samples.get(("pema", GPU)):
        print(f"one process ÷ two: {sorted(each.seconds for each in one)[len(one) // 2] / took:.2f}")
    _compare(check, "two", "pema", ends - time.monotonic())


def _constants(check: Check, seconds: float) -> None:
    print(gpu_constants.told_of(check.samples, check.passes))


PARTS = (
    Part("machine", 20, _machine, "cores, GPU, driver, versions"),
    Part("correctness", 130, _correctness, "the checks of tests/gpu: the GPU computes what the CPU does"),
    Part("bus", 20, _bus, "seconds until the GPU is ready; GB/s to and from pinned memory, the limit of a pass"),
    Part("building", 40, _building, "a run for all that follows"),
    Part("pema", 60, _command("pema"), "whole command on CPU and GPU in turn, results compared; passes in GB/s"),
    Part("mean", 30, _command("mean"), "the same with one pass"),
    Part("sweep", 60, _command("sweep", *SWEEP), "the same with 8 averages from one reading"),
    Part("tiles and threads", 70, _passes, "both passes alone, by tile, then by threads"),
    Part("two processes", 30, _two_processes, "pema by two processes that share the GPU, results compared"),
    Part("constants", 5, _constants, "what follows for --device auto, tile and threads: the lines to paste"),
)


def main() -> int:
    begun = time.monotonic()
    arguments = _parse()
    print(plan_of(arguments.minutes))
    if arguments.plan:
        return 0
    base = arguments.directory.expanduser().resolve() / "ckavg-gpu-benchmarks"
    check = Check(arguments, arguments.device, base / "run", base / "results")
    failed = []
    try:
        run([*_PROGRAMS, "devices", check.device])
        for part in PARTS:
            if part.name not in arguments.only:
                continue
            print(f"\n== {part.name}, {time.monotonic() - begun:.0f} s after the start", flush=True)
            seconds = min(part.limit(arguments.minutes), begun + 60 * arguments.minutes - time.monotonic())
            try:
                if seconds < 1:
                    raise CommandError("no time is left for it.")
                part.work(check, seconds)
            except (CommandError, OSError) as error:
                failed.append(part.name)
                print(f"FAILED {part.name}: {error}", flush=True)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(check.results if arguments.keep else base, ignore_errors=True)
    print(
        f"\n{time.monotonic() - begun:.0f} s in all; "
        + (f"FAILED: {', '.join(failed)}" if failed else "no part failed")
    )
    return 1 if failed else 0


def plan_of(minutes: float) -> str:
    """The parts in their order, with their limits."""
    rows = [(part.name, f"{part.limit(minutes):.0f}", part.what) for part in PARTS]
    widest = max(len(row[2]) for row in rows)
    table = render(
        ("part", "at most, s", "what it tells".ljust(widest)), [(*row[:2], row[2].ljust(widest)) for row in rows]
    )
    return f"{table}\n\n{minutes:g} minutes at most; what is not done by then is left out."


def _lines(words: Sequence[str], seconds: float) -> Iterator[str]:
    """What a program of this Python prints, line by line.

    Raises:
        CommandError: it took too long, or ended with another status than 0.
    """
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        began = time.monotonic()
        watch = threading.Timer(seconds, process.kill)
        watch.start()
        try:
            for line in process.stdout:
                yield line.rstrip("\n")
        except BaseException:
            process.kill()
            raise
        finally:
            watch.cancel()
    if process.returncode:
        late = time.monotonic() - began >= seconds
        raise CommandError(f"took longer than {seconds:.0f} s." if late else f"ended with status {process.returncode}.")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check and measure a GPU.")
    parser.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help="default: all of them")
    parser.add_argument("--checkpoints", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--megabytes", type=int, default=470, help="of one checkpoint; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="time for all of it; default: %(default)s")
    parser.add_argument("--device", default="cuda", help="default: %(default)s; cpu: a trial of all but the GPU")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="for the run; default: %(default)s"
    )
    parser.add_argument("--keep", action="store_true", help="leave the run there, for the next time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
