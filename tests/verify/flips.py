"""What a single changed byte comes to: `python -m tests.verify.flips` prints how many are noticed, and by what.

One byte of the weights is given another value, 50 times in a checkpoint after it was averaged and 50 times in the
result, each time in a sound copy. Where it falls and what it becomes is drawn from a fixed seed.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import ckavg
from tests.runs import random_run, write_run

STEPS = (0, 100, 200, 300, 400, 500)
TIMES = 50
COLUMNS = ("verify", "verify --sources", "verify --replay", "verify --replay, every element")
ALL = 1 << 20


def noticed(result: Path, *, seed: int) -> set[str]:
    """Which of the ways to verify a result say that something is wrong."""
    found = ckavg.verify_result(result, replay=True, sources=True, seed=seed)
    ways = {each.check for each in found.findings if each.is_problem}
    whole = ckavg.verify_result(result, replay=True, elements=ALL, seed=seed)
    every = any(each.check == "replay" for each in whole.findings)
    plain = bool(ways & {"record", "files", "weights"})
    columns = (plain, plain or "sources" in ways, plain or "replay" in ways, plain or every)
    return {name for name, wrong in zip(COLUMNS, columns, strict=True) if wrong} | (
        {"by the elements alone"} if "replay" in ways else set()
    )


def flips(result: Path, files: Sequence[Path], *, times: int, seed: int) -> Counter[str]:
    """Change a byte of the tensors in one of the files, so many times; how often each way notices."""
    generator = random.Random(seed)
    counts: Counter[str] = Counter()
    for number in range(times):
        file = generator.choice(list(files))
        sound = file.read_bytes()
        place = generator.randrange(8 + int.from_bytes(sound[:8], "little"), len(sound))
        data = bytearray(sound)
        data[place] ^= generator.randrange(1, 256)
        file.write_bytes(data)
        counts.update(noticed(result, seed=number))
        file.write_bytes(sound)
    return counts


def experiment(root: Path, dtype: torch.dtype, *, times: int = TIMES) -> dict[str, Counter[str]]:
    """Both series, on a run and a PEMA of it."""
    source = write_run(root / "run", random_run(11, len(STEPS), dtype), STEPS)
    result = ckavg.average(ckavg.open_run(source), ckavg.PEMA()).directory
    return {
        "a checkpoint": flips(result, sorted(source.glob("checkpoint-*/*.safetensors")), times=times, seed=1),
        "the result": flips(result, sorted(result.glob("*.safetensors")), times=times, seed=2),
    }


def main() -> None:
    """Print a table of both series for bfloat16 and float32."""
    lines = [f"| one byte changed in | {' | '.join(COLUMNS)} | by the elements drawn alone |"]
    lines.append(f"|---|{'---:|' * (len(COLUMNS) + 1)}")
    for name, dtype in {"bfloat16": torch.bfloat16, "float32": torch.float32}.items():
        with tempfile.TemporaryDirectory() as root:
            for place, counts in experiment(Path(root), dtype).items():
                cells = [f"{counts[each]} of {TIMES}" for each in (*COLUMNS, "by the elements alone")]
                lines.append(f"| {place}, {name} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
