"""`python -m benchmarks.quick`: in three minutes, whether a change made anything faster or slower.

Whole commands in turns, each in a process of its own, from a warm page cache. It prints ratios within a turn,
since other work on the machine slows both. With `--base CHECKOUT`, each command is also run from another checkout, one
right after the other, and must write the same bytes. Imports no torch: see `benchmarks.measure`.

A line of JSON for each case goes to the end of build/bench-quick.jsonl; `--row` makes of the last of them the row of
docs/performance.md.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.measure import ROOT, CommandError, Measured, spread
from benchmarks.programs import BEMA, MEAN, PEMA, ckavg, mapped_roofline, obvious_loop
from benchmarks.table import Row, render

BUILD = ROOT / "build"
LINES = BUILD / "bench-quick.jsonl"

TORCH, READING, LOOP = "import torch", "reading", "plain loop"
_FEWEST_TURNS = 2

RUNS: Mapping[str, Sequence[str]] = {
    "run": ("-m", "benchmarks.synthetic", "{}", "--checkpoints", "12", "--megabytes", "100"),
    "adapters": ("-m", "benchmarks.many", "adapters", "{}", "--checkpoints", "20", "--rank", "112"),
    "many adapters": ("-m", "benchmarks.many", "adapters", "{}", "--checkpoints", "200"),
    "many tensors": ("-m", "benchmarks.many", "tiny", "{}", "--checkpoints", "5", "--tensors", "20000"),
}
"""How each is built, by a process of its own: 1.2 GB, 20 × 20 MB, 200 × 0.7 MB and 5 × 10 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A command, and what it is compared with.

    Attributes:
        name: as the table shows it.
        arguments: of Python; `{run}` and `{out}` are filled in.
        run: the run that it reads.
        to: the case that it is divided by; none: it is told in seconds.
        times: how often that is counted.
        beyond_torch: less the time of `import torch`, of both where both import it.
        is_ours: also run from the other checkout.
        is_slow: run in the first turns alone.
    """

    name: str
    arguments: Sequence[str]
    run: str = "run"
    to: str = ""
    times: int = 1
    beyond_torch: bool = False
    is_ours: bool = True
    is_slow: bool = False

    @property
    def unit(self) -> str:
        """What a ratio of 1 means."""
        return f"{f'{self.times} × ' if self.times > 1 else ''}{self.to}" if self.to else "s"


def _average(name: str, result: str, *, run: str = "run", **compared: Any) -> Case:
    return Case(name=name, arguments=ckavg(result).arguments(Path("{run}"), Path("{out}")), run=run, **compared)


def _inspect(name: str, run: str) -> Case:
    return Case(name=name, arguments=("-m", "ckavg", "inspect", "{run}"), run=run, to=TORCH)


CASES = (
    Case(name=TORCH, arguments=("-c", "import torch"), is_ours=False),
    Case(name=READING, arguments=mapped_roofline().arguments(Path("{run}"), Path()), is_ours=False),
    _average("mean", MEAN, to=READING, beyond_torch=True),
    _average("pema", PEMA, to=READING, times=2, beyond_torch=True),
    _average("bema", BEMA, to=READING, beyond_torch=True),
    Case(
        name=LOOP,
        arguments=obvious_loop().arguments(Path("{run}"), Path("{out}")),
        to="pema",
        beyond_torch=True,
        is_ours=False,
        is_slow=True,
    ),
    _average("mean, 20 adapters", MEAN, run="adapters", to=TORCH),
    _inspect("inspect, 20 adapters", "adapters"),
    _average("mean, 200 adapters", MEAN, run="many adapters", to=TORCH),
    _inspect("inspect, 200 adapters", "many adapters"),
    _average("mean, 20,000 tensors", MEAN, run="many tensors", to=TORCH),
    Case(name="--help", arguments=("-m", "ckavg", "--help"), to=TORCH),
)
_BY_NAME = {case.name: case for case in CASES}

Turn = dict[str, Measured]
"""What each case took in one turn."""


def main() -> int:
    arguments = _parse()
    if arguments.row:
        print(row_of(LINES.read_text(encoding="utf-8").splitlines()))
        return 0
    begun, commit = time.monotonic(), commit_of(ROOT)
    base = commit_of(arguments.base) if arguments.base else ""
    data = arguments.directory.expanduser().resolve()
    try:
        turns, of_base = _measured(data, arguments.base, ends=begun + arguments.seconds)
    except (CommandError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(data / "results" if arguments.keep else data, ignore_errors=True)
    lines = lines_of(turns, of_base, commit=commit, base=base)
    BUILD.mkdir(exist_ok=True)
    with LINES.open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
    print(f"\n{table_of(lines)}\n\n{_notes(lines[0], time.monotonic() - begun)}")
    return 0


def _measured(data: Path, base: Path | None, *, ends: float) -> tuple[list[Turn], list[Turn] | None]:
    """Build the runs, then take turns until there is no time for another, of this checkout and of the other one."""
    for name, words in RUNS.items():
        _say(f"building {name}")
        measure.run([str(data / name) if word == "{}" else word for word in words])
    turns: list[Turn] = []
    of_base: list[Turn] = []
    took = 0.0
    while len(turns) < _FEWEST_TURNS or time.monotonic() + took < ends:
        began = time.monotonic()
        _say(f"turn {len(turns) + 1}")
        turn: Turn = {}
        other: Turn = {}
        for case in CASES if len(turns) < _FEWEST_TURNS else (case for case in CASES if not case.is_slow):
            roots = [(ROOT, turn)] if base is None or not case.is_ours else [(ROOT, turn), (base, other)]
            for root, into in roots if len(turns) % 2 == 0 else reversed(roots):
                out = data / "results" / ("base" if into is other else case.name)
                into[case.name] = _run(case, data / case.run, out, root)
            if not turns and len(roots) == 2:
                _check_same(data / "results" / case.name, data / "results/base", f"{case.name}: the other checkout")
        if not turns:
            _check_close(data / "results/pema", data / f"results/{LOOP}")
        turns.append(turn)
        of_base.append({name: other.get(name, turn[name]) for name in turn})
        took = time.monotonic() - began
    return turns, None if base is None else of_base


def _run(case: Case, run: Path, out: Path, root: Path) -> Measured:
    for old in (out, run / "averaged"):  # no old result may pass for a new one, and no path is known
        shutil.rmtree(old, ignore_errors=True)
    words = [word.replace("{run}", str(run)).replace("{out}", str(out)) for word in case.arguments]
    measured = measure.run(words, root=root)
    if case.name != READING:
        return measured
    seconds = json.loads(measured.stdout)["seconds"]  # its own, without start-up
    return Measured(seconds["total"], measured.peak_bytes, measured.disk_bytes, "", seconds["cpu"])


def _check_same(ours: Path, theirs: Path, name: str) -> None:
    """Refuse results of which a weight file differs by a byte.

    Raises:
        CommandError: one does.
    """
    for file in sorted(ours.glob("*.safetensors")):
        if not filecmp.cmp(file, theirs / file.name, shallow=False):
            raise CommandError(f"{name} writes another {file.name}.")


def _check_close(ours: Path, theirs: Path) -> None:
    measure.run(["-m", "benchmarks.agreement", "--pair", str(ours), str(theirs)])


def lines_of(
    turns: Sequence[Turn], of_base: Sequence[Turn] | None = None, *, commit: str = "", base: str = ""
) -> list[dict[str, Any]]:
    """A line for each case, and one for each that the other checkout ran, as JSON values.

    `median`, `min` and `max` are of ratios, turn by turn, `cpu` the same of the seconds that processors computed.
    """
    about = {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "torch": version("torch"),
        "cores": os.cpu_count(),
        "turns": len(turns),
    }
    lines = [_line(case, turns, _ratios(case, turns)) | about for case in CASES]
    if of_base is not None:
        compared = [(case, _against(case, turns, of_base)) for case in CASES if case.is_ours]
        lines += [_line(case, turns, ratios) | {"to": base, "unit": "base"} | about for case, ratios in compared]
    return lines


Ratios = tuple[list[float], list[float]]
"""By turn: of seconds, and of seconds of the processors."""


def _ratios(case: Case, turns: Sequence[Turn]) -> Ratios:
    turns = [turn for turn in turns if case.name in turn]
    if not case.to:
        return [turn[case.name].seconds for turn in turns], [turn[case.name].cpu_seconds for turn in turns]
    other = _BY_NAME[case.to]
    wall, cpu = (
        [_spent(case, turn)[kind] / (case.times * _spent(other, turn)[kind]) for turn in turns] for kind in (0, 1)
    )
    return wall, cpu


def _against(case: Case, turns: Sequence[Turn], of_base: Sequence[Turn]) -> Ratios:
    pairs = list(zip(turns, of_base, strict=True))
    wall, cpu = ([_spent(case, one)[kind] / _spent(case, other)[kind] for one, other in pairs] for kind in (0, 1))
    return wall, cpu


def _spent(case: Case, turn: Turn) -> tuple[float, float]:
    """Seconds, and seconds of the processors."""
    own, torch = turn[case.name], turn[TORCH]
    if not case.beyond_torch:
        return own.seconds, own.cpu_seconds
    least = 1e-3  # a busy machine may take longer for `import torch` than for all of a short command
    return max(own.seconds - torch.seconds, least), max(own.cpu_seconds - torch.cpu_seconds, least)


def _line(case: Case, turns: Sequence[Turn], ratios: Ratios) -> dict[str, Any]:
    wall, cpu = ({"median": each.median, "min": each.least, "max": each.most} for each in map(spread, ratios))
    own = [turn[case.name] for turn in turns if case.name in turn]
    return {
        "name": case.name,
        **wall,
        "unit": "s" if not case.to else "1",
        "to": case.unit if case.to else None,
        "cpu": cpu,
        "seconds": spread(one.seconds for one in own).median,
        "cpu_seconds": spread(one.cpu_seconds for one in own).median,
        "peak_mb": max(one.peak_bytes for one in own) / 1e6,
    }


def table_of(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines for people, those of another checkout below."""
    rows: list[Row] = []
    for line in lines:
        cells = [
            f"{values['median']:.2f} ({values['min']:.2f}–{values['max']:.2f})" if line["to"] else ""
            for values in (line, line["cpu"])
        ]
        about = (f"{line['seconds']:.2f}", f"{line['cpu_seconds']:.2f}", f"{line['peak_mb']:.0f}")
        rows.append((line["name"], *about, line["to"] or "", *cells))
    return render(("", "seconds", "CPU s", "peak MB", "divided by", "ratio", "CPU ratio"), rows)


def row_of(lines: Sequence[str]) -> str:
    """A row of the table in docs/performance.md, of the last line of each case: ratios of processor seconds.

    >>> line = {"name": "mean", "cpu": {"median": 1.24}, "unit": "1", "commit": "abc", "date": "2026-01-02"}
    >>> row_of([json.dumps(line)])
    '| 2026-01-02, abc | 1.2 |'
    """
    last = {line["name"]: line for line in map(json.loads, lines) if line["unit"] == "1"}
    *_, newest = last.values()
    cells = [f"{newest['date']}, {newest['commit']}"]
    cells += [f"{last[case.name]['cpu']['median']:.2g}" for case in CASES if case.name in last]
    return f"| {' | '.join(cells)} |"


def commit_of(root: Path) -> str:
    """The commit of a checkout, with a + where files differ from it; `unknown` where git does not know."""
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def _notes(line: Mapping[str, Any], seconds: float) -> str:
    return f"""\
Commit {line["commit"]}, torch {line["torch"]}, {line["cores"]} cores; {line["turns"]} turns, {seconds:.0f} s in all.
Ratios are taken turn by turn: medians, least–most in brackets. What is divided by reading or pema is less
`import torch` before. Divided by a commit: this checkout by the other; below 1 it is faster. CPU: of the processors.
Peak MB: the most of all turns, mapped files included. Lines: {LINES.relative_to(ROOT)}."""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description="Measure ckavg in three minutes.")
    parser.add_argument("--base", type=_checkout, metavar="CHECKOUT", help="compare with the ckavg of this directory")
    parser.add_argument("--seconds", type=float, default=165, help="time for all of it; default: %(default)s")
    parser.add_argument(
        "--directory", type=Path, default=BUILD / "bench-quick", help="for 1.8 GB of data; default: %(default)s"
    )
    parser.add_argument("--keep", action="store_true", help="leave the runs there, for the next time")
    parser.add_argument("--row", action="store_true", help="print a row of docs/performance.md, and measure nothing")
    return parser.parse_args()


def _checkout(text: str) -> Path:
    root = Path(text).expanduser().resolve()
    if not (root / "ckavg/__main__.py").exists():
        raise argparse.ArgumentTypeError(f"{root} is no checkout of ckavg")
    return root


def _say(what: str) -> None:
    print(f"[{what}]", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
