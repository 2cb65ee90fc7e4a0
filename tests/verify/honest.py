"""Does `--replay` take a right result for a wrong one? `python -m tests.verify.honest [COUNT] [SEED]` prints how often.

Every result is of another run: dtype, scale from 1e-30 to 1e30, intervals, scheme and hyper-parameters are drawn, β
from next to nothing to almost 1 among them. All elements are computed again.
"""

from __future__ import annotations

import random
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ckavg
from ckavg.schemes import Last, MomentumEMA, Scheme
from tests.runs import write_run

COUNT = 5000
RANGES = {torch.float64: 30, torch.float32: 30, torch.bfloat16: 30, torch.float16: 3}
"""Powers of ten up to which a run is scaled, either way."""


def draw_scheme(choose: random.Random) -> Scheme:
    """A scheme with hyper-parameters from all of their ranges."""
    power = choose.choice((0.0, 1e-3, 0.15, 0.5, 1.0, 2.0)) * choose.choice((1.0, choose.random()))
    eta = choose.choice((0.0, 1e-3, 0.2, 1.0, float("inf")))
    return choose.choice(
        (
            ckavg.EMA(gamma=power),
            ckavg.PEMA(gamma=power, scope=choose.choice(("global", "tensor")), pairing=choose.choice(("same", "next"))),
            MomentumEMA(momentum=1 - 10 ** -choose.uniform(0.01, 6), momentum_per=choose.choice(("step", "update"))),
            ckavg.BEMA(kappa=power, eta=eta, burn_in=choose.choice((0, 0, 20))),
            ckavg.OUEMA(kappa=power, eta=eta or 0.01),
            ckavg.DEMA(kappa=power),
            ckavg.PowerEMA(sigma_rel=choose.uniform(0.01, 0.28)),
            ckavg.Mean(decay=choose.choice(("none", "linear", "cosine", "minus-sqrt"))),
            Last(),
        )
    )


def draw_run(choose: random.Random, dtype: torch.dtype, count: int) -> list[dict[str, Tensor]]:
    """A few small tensors that drift, jump, or change their size altogether."""
    generator = torch.Generator().manual_seed(choose.randrange(2**32))
    scale = 10 ** choose.uniform(-RANGES[dtype], RANGES[dtype])
    away = 10 ** choose.uniform(-3, 1)
    walk = torch.randn(count, 60, generator=generator, dtype=torch.float64).mul(away).cumsum(0)
    falls = torch.logspace(0, -choose.uniform(0, 6), count, dtype=torch.float64)[:, None]
    return [
        {
            "w": (scale * (1 + row)).to(dtype),
            "fades.weight": (scale * row * fall).to(dtype),
            "norm.running_var": (scale * row.abs() * fall).to(dtype),
            "bias": (scale * row[:3] * (place > 0)).to(dtype),
            "scalar": (scale * row[0]).to(dtype),
        }
        for place, (row, fall) in enumerate(zip(walk, falls, strict=True))
    ]


def false_alarms(count: int, seed: int, root: Path) -> list[str]:
    """What is said of as many right results, of those of which anything is said."""
    found = []
    for number in range(count):
        choose = random.Random(f"{seed}-{number}")
        dtype = choose.choice(list(RANGES))
        checkpoints = draw_run(choose, dtype, choose.randrange(2, 9))
        gap = choose.choice((10, 1000, 10**6))
        gaps = [20 + choose.randrange(gap) for _ in checkpoints[1:]]
        with tempfile.TemporaryDirectory(dir=root) as place:
            source = write_run(Path(place) / "run", checkpoints, list(accumulate(gaps, initial=0)))
            scheme = draw_scheme(choose)
            options: dict[str, Any] = {"accumulate": choose.choice(("float32", "float64"))}
            if choose.random() < 0.2 and dtype != torch.float16:
                options["dtype"] = choose.choice(("float32", "bfloat16", "float64"))
            if choose.random() < 0.2:
                options["sample"] = 0.4
            try:
                done = ckavg.average(
                    ckavg.open_run(source), scheme, out=Path(place) / "out", device="cpu", allow_anchor=True, **options
                )
            except ckavg.CkavgError:  # a correction beyond the range of the dtype
                continue
            problems = ckavg.verify_result(done.directory, replay=True, elements=10**6, seed=number).problems
            if problems:
                found.append(f"{number}: {scheme} of {dtype}, {options}: {'; '.join(problems)}")
    return found


def main() -> None:
    """Print how many of COUNT right results are taken for wrong ones, and what is said of them."""
    given = [int(each) for each in sys.argv[1:]]
    count, seed = (*given, *(COUNT, 0)[len(given) :])
    with tempfile.TemporaryDirectory() as root:
        found = false_alarms(count, seed, Path(root))
    sys.stdout.write("\n".join([*found, f"{len(found)} of {count} right results were said to be wrong.", ""]))


if __name__ == "__main__":
    main()
