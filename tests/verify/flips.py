"""What a single changed byte comes to: `python -m tests.verify.flips` prints how many are noticed, and by what.

One byte of the weights is given another value, 50 times, each time in a sound copy: in a checkpoint after it was
averaged, in the result, and in a run that `inspect --deep` reads. Where it falls and what it becomes is drawn from a
fixed seed.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

import ckavg
from ckavg.checkpoints.run import Checkpoint, Run
from ckavg.demo import train
from ckavg.verify.health import examine
from tests.runs import random_run, write_run

STEPS = (0, 100, 200, 300, 400, 500)
TIMES = 50
COLUMNS = ("verify", "verify --sources", "verify --replay", "verify --replay, every element")
ALL = 1 << 20
PARTS = {
    "F32": ("rest of the mantissa", "rest of the mantissa", "last bit of the exponent, mantissa", "sign and exponent"),
    "BF16": ("last bit of the exponent, mantissa", "sign and exponent"),
}
"""What each byte of a number holds, the first byte first."""


def flips(files: Sequence[Path], *, times: int, seed: int) -> Iterator[tuple[int, Path, int]]:
    """Change a byte of the tensors in one of the files, so many times: the number, the file, and where in it."""
    generator = random.Random(seed)
    for number in range(times):
        file = generator.choice(list(files))
        sound = file.read_bytes()
        place = generator.randrange(8 + int.from_bytes(sound[:8], "little"), len(sound))
        data = bytearray(sound)
        data[place] ^= generator.randrange(1, 256)
        file.write_bytes(data)
        yield number, file, place
        file.write_bytes(sound)


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


def of_verify(root: Path, dtype: torch.dtype, *, times: int = TIMES) -> dict[str, Counter[str]]:
    """How often each way to verify notices, of a run and of a PEMA of it."""
    source = write_run(root / "run", random_run(11, len(STEPS), dtype), STEPS)
    result = ckavg.average(ckavg.open_run(source), ckavg.PEMA()).directory
    files = {"a checkpoint": source.glob("checkpoint-*/*.safetensors"), "the result": result.glob("*.safetensors")}
    return {
        name: sum(
            (Counter(noticed(result, seed=number)) for number, _, _ in flips(sorted(some), times=times, seed=seed)),
            start=Counter[str](),
        )
        for seed, (name, some) in enumerate(files.items(), start=1)
    }


def of_inspect(run: Run, *, times: int = TIMES) -> dict[str, tuple[int, int]]:
    """By the part of a number that was hit: how often `inspect --deep` names the tensor and step, of how many.

    Under `others`: findings about what was not damaged, beside those about the undamaged run.
    """
    usual = set(examine(run.source, run.checkpoints).findings)
    total, named, others = Counter[str](), Counter[str](), 0
    files = {Path(checkpoint.shards[0].path): checkpoint for checkpoint in run.checkpoints}
    for _, file, place in flips(list(files), times=times, seed=0):
        name, part = _hit(files[file], place)
        found = set(examine(run.source, ckavg.open_run(run.source).checkpoints).findings) - usual
        ours = [each for each in found if (each.step, each.tensor) == (files[file].step, name)]
        total[part] += 1
        named[part] += bool(ours)
        others += len(found) - len(ours)
    return {part: (named[part], total[part]) for part in sorted(total)} | {"others": (others, times)}


def _hit(checkpoint: Checkpoint, place: int) -> tuple[str, str]:
    """The tensor that a byte of a file belongs to, and the part of a number."""
    for name, entry in checkpoint.entries.items():
        if entry.offset <= place < entry.offset + entry.nbytes:
            return name, PARTS[entry.dtype][(place - entry.offset) % entry.item_bytes]
    raise AssertionError(place)


def as_bfloat16(run: Run, root: Path) -> Run:
    weights = [
        {name: each.bfloat16() for name, each in load_file(checkpoint.shards[0].path).items()}
        for checkpoint in run.checkpoints
    ]
    return ckavg.open_run(write_run(root, weights, run.steps))


def main() -> None:
    """Print a table of each."""
    lines = [f"| one byte changed in | {' | '.join(COLUMNS)} | by the elements drawn alone |"]
    lines.append(f"|---|{'---:|' * (len(COLUMNS) + 1)}")
    for name, dtype in {"bfloat16": torch.bfloat16, "float32": torch.float32}.items():
        with tempfile.TemporaryDirectory() as directory:
            for place, counts in of_verify(Path(directory), dtype).items():
                cells = [f"{counts[each]} of {TIMES}" for each in (*COLUMNS, "by the elements alone")]
                lines.append(f"| {place}, {name} | {' | '.join(cells)} |")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        train(root / "float32", steps=320, save_every=20, pretraining_steps=100)
        run = ckavg.open_run(root / "float32")
        for name, each in {"float32": run, "bfloat16": as_bfloat16(run, root / "bfloat16")}.items():
            lines += ["", f"inspect --deep, {name}: {len(run.checkpoints)} checkpoints, {len(run.tensors)} tensors"]
            lines += [f"| {part} | {count} of {total} |" for part, (count, total) in of_inspect(each).items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
