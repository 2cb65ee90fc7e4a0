"""How often `inspect --deep` notices a single damaged byte: `python -m tests.health.flips [RUN]`.

A small Llama is trained and saved 17 times in float32, or RUN is read instead; the same weights are rounded to
bfloat16. In each of both runs, one random byte of the weights is replaced by another random value, 50 times over, each
time in the undamaged run. A damage counts as noticed if a finding names its step and its tensor.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import ckavg
from ckavg.checkpoints.run import Run
from ckavg.demo import train
from ckavg.health.examine import examine
from ckavg.health.values import Finding
from tests.runs import write_run

TRIALS = 50
SEED = 0
BYTES = {
    "F32": ("mantissa, low", "mantissa, middle", "mantissa, high, and last bit of the exponent", "sign and exponent"),
    "BF16": ("mantissa and last bit of the exponent", "sign and exponent"),
}
"""What each byte of a number holds, the first byte first."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One byte, replaced: where it is, what it holds, and what was said about the run."""

    step: int
    tensor: str
    part: str
    before: float
    after: float
    findings: tuple[Finding, ...]

    @property
    def is_noticed(self) -> bool:
        return any(finding.step == self.step and finding.tensor == self.tensor for finding in self.findings)

    @property
    def others(self) -> int:
        """Findings about something that was not damaged."""
        return sum((finding.step, finding.tensor) != (self.step, self.tensor) for finding in self.findings)


def findings(run: Run) -> tuple[Finding, ...]:
    return examine(run.source, ckavg.open_run(run.source).checkpoints).findings


def damages(run: Run, *, trials: int, seed: int) -> Iterator[Damage]:
    """Damage the run and put it right again, so many times; every byte of every weight is as likely."""
    chance = random.Random(seed)
    for _ in range(trials):
        checkpoint = chance.choice(run.checkpoints)
        names = sorted(checkpoint.entries)
        (name,) = chance.choices(names, [checkpoint.entries[each].nbytes for each in names])
        entry = checkpoint.entries[name]
        byte = chance.randrange(entry.nbytes)
        path = checkpoint.shards[entry.shard].path
        number = entry.offset + byte - byte % entry.item_bytes
        with Path(path).open("r+b") as file:
            file.seek(number)
            before = bytearray(file.read(entry.item_bytes))
            after = bytearray(before)
            after[byte % entry.item_bytes] ^= chance.randrange(1, 256)
            file.seek(number)
            file.write(after)
            file.flush()
            told = findings(run)
            file.seek(number)
            file.write(before)
        part = BYTES[entry.dtype][byte % entry.item_bytes]
        yield Damage(checkpoint.step, name, part, _value(before), _value(after), told)


def _value(number: bytearray) -> float:
    dtype = torch.bfloat16 if len(number) == 2 else torch.float32
    return float(torch.frombuffer(number, dtype=dtype))


def as_bfloat16(run: Run, root: Path) -> Run:
    weights = [
        {name: each.bfloat16() for name, each in load_file(checkpoint.shards[0].path).items()}
        for checkpoint in run.checkpoints
    ]
    return ckavg.open_run(write_run(root, weights, run.steps))


def report(title: str, run: Run, *, trials: int = TRIALS) -> None:
    undamaged = findings(run)
    total: Counter[str] = Counter()
    noticed: Counter[str] = Counter()
    others = 0
    for damage in damages(run, trials=trials, seed=SEED):
        total[damage.part] += 1
        noticed[damage.part] += damage.is_noticed
        others += max(0, damage.others - len(undamaged))
    say(f"\n{title}: {len(run.checkpoints)} checkpoints, {len(run.tensors)} tensors")
    say(f"findings about the undamaged run: {len(undamaged)}; about what was not damaged: {others}")
    for part in sorted(total):
        say(f"{part}: {noticed[part]} of {total[part]} noticed")
    say(f"all: {noticed.total()} of {total.total()} noticed")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if len(sys.argv) > 1:
            source = Path(sys.argv[1])
            run = ckavg.open_run(source)
            weights = [load_file(checkpoint.shards[0].path) for checkpoint in run.checkpoints]
            run = ckavg.open_run(write_run(root / "float32", weights, run.steps))
        else:
            train(root / "trained", steps=320, save_every=20, pretraining_steps=100)
            run = ckavg.open_run(root / "trained")
        report("float32", run)
        report("bfloat16", as_bfloat16(run, root / "bfloat16"))


if __name__ == "__main__":
    main()
