"""How good a sampled path is on a run, and what its error does to PEMA.

`python -m benchmarks.sampled RUN --init BASE` prints ℓ in full and from a part of each tensor, with the difference in
standard errors. Then, by γ and dtype, how many weights an error of ℓ moves by more than half a unit of the last place:
really, and at most, if no ℓ is off by more than three standard errors. With d_k the most that β_k can then be off,

    |E(sampled) − E(exact)| ≤ Σ_k Π_{j>k} (1 − β_j) · |θ_k − E_{k−1}| · d_k

The run itself is left alone: it is measured through links in a temporary directory, so nothing is known of its path.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

import ckavg
from benchmarks.agreement import opened_tensors
from benchmarks.table import Row, render
from ckavg.schemes import Timeline

_MOST_ERRORS = 3.0
_GAMMAS = (0.05, 0.15, 0.3)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Betas = tuple[float, ...]


def main() -> int:
    arguments = _parse()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        links = Path(scratch) / "run"
        links.mkdir()
        opened = ckavg.open_run(arguments.run, init=arguments.init)
        for checkpoint in opened.checkpoints[int(opened.anchor_is_init) :]:
            (links / checkpoint.path.name).symlink_to(Path(checkpoint.path).absolute())
        run = ckavg.open_run(links, init=arguments.init)
        # First: an exact path that is cached would be taken instead.
        sampled = ckavg.path_length(run, sample=arguments.fraction)
        exact = ckavg.path_length(run)
        good = _print_lengths(exact, sampled)
        rows: list[Row] = []
        for gamma in _GAMMAS:
            betas = betas_of(exact.lengths, run.steps, gamma), betas_of(sampled.lengths, run.steps, gamma)
            numel, real, most = moved_weights(run, *betas, most_off(sampled, gamma))
            rows += [
                (f"{gamma:g}, {str(dtype)[6:]}", *(f"{100 * found[dtype] / numel:.3f} %" for found in (real, most)))
                for dtype in _DTYPES
            ]
        print(f"\n{render(('γ, weights beyond half a unit', 'really', 'at most'), rows)}")
    return 0 if good else 1


def _print_lengths(exact: ckavg.PathLength, sampled: ckavg.PathLength) -> bool:
    """Print ℓ by step; whether every difference is what the standard error promises."""
    assert sampled.standard_errors is not None
    rows: list[Row] = []
    good = True
    for step, length, estimate, error in zip(
        exact.steps, exact.lengths, sampled.lengths, sampled.standard_errors, strict=True
    ):
        off = (estimate - length) / error if error else 0.0
        good &= abs(off) <= _MOST_ERRORS
        relative = (f"{100 * error / length:.3f} %", f"{100 * (estimate / length - 1):+.3f} %") if length else ("", "")
        rows.append((str(step), f"{length:.6f}", f"{estimate:.6f}", *relative, f"{off:+.2f}"))
    print(render(("step", "ℓ in full", "ℓ from sample", "standard error", "off", "in errors"), rows))
    print(f"\nsample {100 * sampled.sample:g} %; read {sampled.bytes_read:,} bytes of {exact.bytes_read:,}")
    return good


def betas_of(lengths: tuple[float, ...], steps: tuple[int, ...], gamma: float) -> Betas:
    """β by checkpoint; the anchor's is 1."""
    found = ckavg.PEMA(gamma=gamma).coefficients(Timeline(steps, lengths)).betas
    return tuple(1.0 if beta is None else beta for beta in found)


def most_off(sampled: ckavg.PathLength, gamma: float) -> Betas:
    """d_k: how far β_k can be off where no ℓ is by more than three standard errors."""
    assert sampled.standard_errors is not None
    betas = betas_of(sampled.lengths, sampled.steps, gamma)
    ends = []
    for sign in (-_MOST_ERRORS, _MOST_ERRORS):  # β falls as any ℓ grows
        pairs = zip(sampled.lengths, sampled.standard_errors, strict=True)
        lengths = tuple(max(0.0, length + sign * error) for length, error in pairs)
        ends.append(betas_of(lengths, sampled.steps, gamma))
    return tuple(max(high - beta, beta - low) for high, beta, low in zip(ends[0], betas, ends[1], strict=True))


Counts = dict[torch.dtype, int]


def moved_weights(run: ckavg.Run, exact: Betas, sampled: Betas, off: Betas) -> tuple[int, Counts, Counts]:
    """How many weights there are; how many the two averages hold more than half a unit apart; how many at most."""
    real, most, numel = dict.fromkeys(_DTYPES, 0), dict.fromkeys(_DTYPES, 0), 0
    left = [math.prod(1 - beta for beta in sampled[place + 1 :]) for place in range(len(sampled))]
    for states in _tensors(run):
        one, other = states[0].clone(), states[0].clone()
        bound = torch.zeros_like(one)
        for place, theta in enumerate(states[1:], start=1):
            bound += left[place] * off[place] * (theta - other).abs()
            one += exact[place] * (theta - one)
            other += sampled[place] * (theta - other)
        numel += one.numel()
        for dtype in _DTYPES:
            unit = half_unit(one, dtype)
            real[dtype] += int(((one - other).abs() > unit).sum())
            most[dtype] += int((bound > unit).sum())
    return numel, real, most


def half_unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half of what lies between neighbouring numbers of a dtype, at the size of float64 values."""
    limits = torch.finfo(dtype)
    exponents = torch.frexp(values).exponent.clamp(min=math.frexp(limits.smallest_normal)[1])
    return torch.ldexp(torch.full_like(values, limits.eps / 4), exponents)


def _tensors(run: ckavg.Run) -> Iterator[list[Tensor]]:
    """The floating tensors, each as a list of flat float64 tensors by checkpoint."""
    with ExitStack() as stack:
        opened = [opened_tensors(Path(checkpoint.path), stack) for checkpoint in run.checkpoints]
        for name, entry in run.tensors.items():
            if entry.is_floating:
                yield [each[name].get_tensor(name).double().flatten() for each in opened]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampled", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of saved checkpoints")
    parser.add_argument("--init", type=Path, default=None, help="the model that training began with")
    parser.add_argument("--fraction", type=float, default=0.01, help="default: %(default)s")
    parser.add_argument("--directory", type=Path, default=None, help="for links to the run")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
