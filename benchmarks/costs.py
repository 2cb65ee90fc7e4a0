"""Measures the cost of the parts of an average on one core, and the cost of planning large runs, by whole commands.

Imports no torch: see `benchmarks.measure`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.measure import Measured
from benchmarks.sparse import Built

SCHEMES = ("pema", "bema", "mean")
Say = Callable[[str], None]

_FEW, _ALL = 2, 8
_PROGRAM = """
import json, os, sys, time
import ckavg

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
source, count, out = sys.argv[1:]
run = ckavg.open_run(source, last=int(count))
seconds = {}

def measured(name, work):
    begun = time.process_time()
    work()
    seconds[name] = time.process_time() - begun

average = lambda scheme: ckavg.average(run, scheme, out=out, force=True)
average(ckavg.Last())  # imports modules
measured("path", lambda: ckavg.path_length(run))
for scheme in (ckavg.PEMA(), ckavg.BEMA(), ckavg.Mean()):
    measured(scheme.name, lambda: average(scheme))
print(json.dumps(seconds))
"""


@dataclass(frozen=True, slots=True)
class PassCosts:
    """Seconds of one core in a pass over files that are in memory.

    Attributes:
        byte: per byte read, of large tensors.
        tile: per tile of each checkpoint, in addition to its bytes.
        block: per block, in addition to its tiles.
    """

    byte: float
    tile: float
    block: float


@dataclass(frozen=True, slots=True)
class Costs:
    """The measured costs.

    Attributes:
        path: of pass 1.
        replay: of pass 2, by scheme.
        write_byte: seconds per byte of the result: rounded, written and hashed.
    """

    path: PassCosts
    replay: Mapping[str, PassCosts]
    write_byte: float


def measure_costs(scratch: Path, *, megabytes: int, tensors: int, repeats: int, say: Say) -> Costs:
    """Measure the cost of bytes on tensors of one block, and the cost of tensors on tiny ones.

    Each is measured with two and with eight checkpoints. The difference is the cost of checkpoints, and the rest that
    of blocks, or of the result. Counts CPU seconds, the lowest of several rounds.
    """
    models = {"one": "1x16", "large": f"{max(1, megabytes // 8)}x2048", "tiny": f"{tensors}x16"}
    built: dict[str, Built] = {}
    least: dict[tuple[str, str, int], float] = {}
    for name, model in models.items():
        say(f"building and averaging {_ALL} checkpoints of {model} tensors")
        built[name] = build(scratch / name, model, _ALL, "--filled")
        for count in (_FEW, _ALL):
            turns = [_turn(scratch, name, count) for _ in range(repeats)]
            least |= {(name, part, count): min(turn[part] for turn in turns) for part in turns[0]}

    def per_checkpoint(name: str, part: str) -> float:
        return max(0.0, least[name, part, _ALL] - least[name, part, _FEW]) / (_ALL - _FEW)

    def beside(name: str, part: str) -> float:
        """The cost beyond that of checkpoints and of any average."""
        return max(0.0, least[name, part, _FEW] - _FEW * per_checkpoint(name, part) - least["one", part, _FEW])

    def costs(part: str) -> PassCosts:
        of_byte = per_checkpoint("large", part) / built["large"].nbytes
        return PassCosts(of_byte, per_checkpoint("tiny", part) / tensors, beside("tiny", part) / tensors)

    written = beside("large", "mean") / built["large"].nbytes
    return Costs(costs("path"), {scheme: costs(scheme) for scheme in SCHEMES}, written)


def build(run: Path, model: str, checkpoints: int, *options: str) -> Built:
    """Build a run in a separate process."""
    words = ["-m", "benchmarks.sparse", str(run), model, "--checkpoints", str(checkpoints), *options]
    return Built(**json.loads(measure.run(words).stdout))


def _turn(scratch: Path, run: str, count: int) -> dict[str, float]:
    """Seconds for the path of the last checkpoints, and for each average of them."""
    shutil.rmtree(scratch / run / "averaged", ignore_errors=True)  # has the cached path
    done = measure.run(["-c", _PROGRAM, str(scratch / run), str(count), str(scratch / "result")])
    turn: dict[str, float] = json.loads(done.stdout)
    return turn


@dataclass(frozen=True, slots=True)
class Planned:
    """The cost of planning a run.

    Attributes:
        run: the run.
        inspected: `ckavg inspect`.
        planned: `ckavg pema --dry-run`.
        memory_bytes: the memory that it predicts for averaging, with the threads of this machine.
    """

    run: Built
    inspected: Measured
    planned: Measured
    memory_bytes: int


def measure_plan(scratch: Path, model: str, checkpoints: int) -> Planned:
    """Build a run of sparse files, and plan it."""
    run = scratch / "sparse"
    built = build(run, model, checkpoints)
    inspected = measure.run(["-m", "ckavg", "inspect", str(run)])
    out = ("--out", str(scratch / "result"), "--force", "--json")
    planned = measure.run(["-m", "ckavg", "pema", str(run), "--dry-run", *out])
    shutil.rmtree(run)
    return Planned(built, inspected, planned, json.loads(planned.stdout)["memory_bytes"])
