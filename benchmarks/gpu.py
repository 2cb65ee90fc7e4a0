"""`python -m benchmarks.gpu`: compares the CPU and the GPU of this machine on the same commands and the same run.

It measures whole commands from a warm page cache, each in its own process, whose results must agree; then the passes
alone, by tile and threads, on which the rule of `--device auto` is based. Imports no torch: see `benchmarks.measure`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.cache import State, prepare
from benchmarks.measure import spread
from benchmarks.synthetic import refuse_foreign, weight_files
from benchmarks.table import Row, render

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "pema": (),
    "mean": (),
    "sweep": ("pema:gamma=0.05,0.1,0.15", "bema:eta=0.1,0.2", "ema", "dema", "mean"),
}
"""Verbs, and their arguments after the run."""

_PROGRAMS = ("-m", "benchmarks.gpu_programs")
_TUNING_SECONDS = 90

_NOTES = """\
Medians (least–most). Seconds: the whole command, start-up and writing included, from a warm page cache. GB/s: bytes of
checkpoints that a pass read, by the seconds of that pass alone. GPU MB: the most that torch took, its own start left
out. Peak MB: of the machine's memory, pinned memory included."""

_AGREEMENT_NOTES = """\
Weights of each result of the GPU against those of the CPU, in units of the last place of the stored dtype. Wrong: more
than one unit apart, and by more than 2⁻²¹ of the largest weight of the tensor: where terms cancel to almost nothing,
what is left of them is float32's rounding."""


class WrongResultError(Exception):
    """CPU and GPU disagree, so neither time means anything."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One command on one device.

    Attributes:
        seconds: wall time of the whole command.
        path_rate: GB/s of pass 1; None where there is none.
        replay_rate: GB/s of pass 2.
        gpu_bytes: most memory that torch took of the GPU.
        peak_bytes: most memory resident on the machine.
    """

    seconds: float
    path_rate: float | None
    replay_rate: float
    gpu_bytes: int
    peak_bytes: int


def main() -> int:
    begun = time.monotonic()
    arguments = _parse()
    if arguments.machine:
        print(measure.run([*_PROGRAMS, "machine"]).stdout, end="")
        return 0
    base = arguments.directory.expanduser().resolve() / "ckavg-gpu-benchmarks"
    run, results = base / "run", base / "results"
    ends = begun + 60 * arguments.minutes
    try:
        measure.run([*_PROGRAMS, "devices", *arguments.devices])
        refuse_foreign(run)
        _say("building the run")
        size = ["--checkpoints", str(arguments.checkpoints), "--megabytes", str(arguments.megabytes)]
        measure.run(["-m", "benchmarks.synthetic", str(run), *size])
        samples = _race(run, results, arguments.devices, repeats=arguments.repeats, ends=ends)
        header = ("", "seconds", "pass 1, GB/s", "pass 2, GB/s", "GPU MB", "peak MB")
        print(f"\n{arguments.checkpoints} checkpoints of about {arguments.megabytes} MB\n")
        print(f"{render(header, [_row(name, each) for name, each in samples.items()])}\n\n{_NOTES}", flush=True)
        if time.monotonic() + _TUNING_SECONDS < ends:
            _say("passes by tile and threads")
            prepare(State.WARM, weight_files(run))
            print("\n" + measure.run([*_PROGRAMS, "passes", str(run), *arguments.devices]).stdout)
    except (WrongResultError, measure.CommandError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(results if arguments.keep else base, ignore_errors=True)
    return 0


def _race(
    run: Path, results: Path, devices: list[str], *, repeats: int, ends: float
) -> dict[tuple[str, str], list[Sample]]:
    """Run every command on every device, in rounds, as often as time allows. Results are compared once."""
    samples: dict[tuple[str, str], list[Sample]] = {(verb, device): [] for verb in COMMANDS for device in devices}
    for turn in range(repeats):
        begun = time.monotonic()
        for verb, device in samples:
            _say(f"{verb} on {device}, {turn + 1} of {repeats}")
            samples[verb, device].append(_measured(run, results / device / verb, verb, device))
        if turn == 0:
            _compare(results, devices)
        # Another round takes no longer than this one; the tables by tile and threads need time, too.
        if 2 * time.monotonic() - begun + _TUNING_SECONDS > ends:
            break
    return samples


def _measured(run: Path, out: Path, verb: str, device: str) -> Sample:
    # First, so that there is neither an old result nor a cached path.
    for old in (out, run / "averaged"):
        shutil.rmtree(old, ignore_errors=True)
    prepare(State.WARM, weight_files(run))
    words = [verb, str(run), *COMMANDS[verb], "--out", str(out), "--device", device, "--force", "--json", "-q"]
    measured = measure.run([*_PROGRAMS, "command", *words])
    *text, told = measured.stdout.splitlines()
    printed = json.loads("\n".join(text))
    first = printed.get("averages", [printed])[
        0
    ]  # all averages of a sweep have the bytes and seconds of its one reading
    path, replay = first["seconds"]["path"], first["seconds"]["replay"]
    read = first["bytes_read"] / 1e9 / (2 if path else 1)
    return Sample(
        measured.seconds,
        read / path if path else None,
        read / replay,
        json.loads(told)["gpu_bytes"],
        measured.peak_bytes,
    )


def _compare(results: Path, devices: list[str]) -> None:
    rows: list[Row] = []
    for verb in COMMANDS:
        for device in devices[1:]:
            _say(f"comparing {verb} on {device}")
            asked = [*_PROGRAMS, "compare", str(results / device / verb), str(results / devices[0] / verb)]
            told = json.loads(measure.run(asked).stdout)
            counts = (f"{told[key]:,}" for key in ("weights", "differ", "most_units", "wrong"))
            rows.append((f"{verb}, {device} against {devices[0]}", *counts))
            if told["wrong"]:
                raise WrongResultError(f"{verb}: {told['wrong']:,} weights of {device} differ from {devices[0]}'s.")
    if rows:
        print("\n" + render(("", "weights", "differ", "most units apart", "wrong"), rows))
        print(f"\n{_AGREEMENT_NOTES}", flush=True)


def _row(name: tuple[str, str], samples: list[Sample]) -> Row:
    seconds = spread(one.seconds for one in samples)
    path = [one.path_rate for one in samples if one.path_rate]
    return (
        " on ".join(name),
        f"{seconds.median:.2f} ({seconds.least:.2f}–{seconds.most:.2f})",
        f"{spread(path).median:.1f}" if path else "",
        f"{spread(one.replay_rate for one in samples).median:.1f}",
        f"{max(one.gpu_bytes for one in samples) / 1e6:.0f}",
        f"{max(one.peak_bytes for one in samples) / 1e6:.0f}",
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure ckavg on CPU and GPU.")
    parser.add_argument("--machine", action="store_true", help="only describe this machine")
    parser.add_argument("--checkpoints", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--megabytes", type=int, default=470, help="of one checkpoint; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="at most; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=5.5, help="time for all of it; default: %(default)s")
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda"], help="the others must match the first")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="for the run; default: %(default)s"
    )
    parser.add_argument("--keep", action="store_true", help="leave the run there, for the next time")
    return parser.parse_args()


def _say(what: str) -> None:
    print(f"[{what}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
