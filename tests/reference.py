"""An independent computation of everything ckavg computes: whole tensors, float64, numpy. Shares no code with ckavg."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

Array = NDArray[np.float64]
Arrays = Mapping[str, Array]

SIGNIFICAND = {
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}
"""Bits of the significand and least exponent of normal numbers."""


def load_floats(directory: Path) -> dict[str, Array]:
    """Every floating tensor of a checkpoint directory, in float64."""
    tensors: dict[str, Array] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= {
            name: tensor.double().numpy() for name, tensor in load_file(file).items() if tensor.is_floating_point()
        }
    return tensors


def path_length(checkpoints: Sequence[Arrays]) -> tuple[list[float], list[str], int]:
    """ℓ at every checkpoint, the tensors without spread, and N."""
    anchor = checkpoints[0]
    sigma = {name: float(np.std(values, ddof=1)) if values.size > 1 else 0.0 for name, values in anchor.items()}
    sigma = {name: 0.0 if np.ptp(anchor[name]) == 0 else value for name, value in sigma.items() if anchor[name].size}
    counted = [name for name, value in sigma.items() if value > 0]
    total = sum(anchor[name].size for name in counted)
    lengths = [0.0]
    if not total:
        return [0.0] * len(checkpoints), sorted(sigma), 0
    for before, after in itertools.pairwise(checkpoints):
        moved = sum(float(np.abs(after[name] - before[name]).sum()) / sigma[name] for name in counted)
        lengths.append(lengths[-1] + moved / total)
    return lengths, sorted(name for name, value in sigma.items() if value == 0), total


def weighted(checkpoints: Sequence[Arrays], betas: Sequence[float]) -> dict[str, Array]:
    """E ← (1 − β_k) E + β_k θ_k from θ_0; `betas` begins with that of checkpoint 1."""
    average = dict(checkpoints[0])
    for beta, weights in zip(betas, checkpoints[1:], strict=True):
        average = {name: (1 - beta) * average[name] + beta * weights[name] for name in average}
    return average


def pema(checkpoints: Sequence[Arrays], steps: Sequence[int], gamma: float = 0.15) -> dict[str, Array]:
    lengths, _, _ = path_length(checkpoints)
    span = steps[-1] - steps[0]
    return weighted(checkpoints, [(1 + span * lengths[-1] * length) ** -gamma for length in lengths[1:]])


def ema(checkpoints: Sequence[Arrays], steps: Sequence[int], gamma: float = 0.15, tau: float = 1) -> dict[str, Array]:
    return weighted(checkpoints, [(step - steps[0] + tau) ** -gamma for step in steps[1:]])


def bema(
    checkpoints: Sequence[Arrays],
    steps: Sequence[int],
    *,
    eta: float = 0.2,
    kappa: float = 0.5,
    multiplier: float = 1.0,
    lag: float = 10.0,
    burn_in: int = 0,
) -> dict[str, Array]:
    start = next(place for place, step in enumerate(steps) if step >= burn_in)
    seen, steps = checkpoints[start:], steps[start:]
    average = weighted(seen, [(lag + multiplier * step) ** -kappa for step in steps[1:]])
    if len(seen) == 1:
        return average
    alpha = (lag + multiplier * steps[-1]) ** -eta
    return {name: average[name] + alpha * (seen[-1][name] - seen[0][name]) for name in average}


def ouema(
    checkpoints: Sequence[Arrays], steps: Sequence[int], eta: float = 0.2, kappa: float = 0.5
) -> dict[str, Array]:
    average = dict(checkpoints[0])
    for step, weights in zip(steps[1:], checkpoints[1:], strict=True):
        beta, alpha = (10.0 + step) ** -kappa, (10.0 + step) ** -eta
        corrected = {name: (weights[name] - alpha * checkpoints[0][name]) / (1 - alpha) for name in average}
        average = {name: (1 - beta) * average[name] + beta * corrected[name] for name in average}
    return average


def dema(checkpoints: Sequence[Arrays], steps: Sequence[int], kappa: float = 0.5) -> dict[str, Array]:
    first, second = dict(checkpoints[0]), dict(checkpoints[0])
    for step, weights in zip(steps[1:], checkpoints[1:], strict=True):
        beta = (10.0 + step) ** -kappa
        first = {name: (1 - beta) * first[name] + beta * weights[name] for name in first}
        second = {name: (1 - beta) * second[name] + beta * first[name] for name in first}
    return {name: 2 * first[name] - second[name] for name in first}


def momentum(
    checkpoints: Sequence[Arrays], steps: Sequence[int], rho: float, scale: float, per_step: bool
) -> dict[str, Array]:
    gaps = [after - before if per_step else 1 for before, after in itertools.pairwise(steps)]
    return weighted(checkpoints, [1 - rho ** (scale * gap) for gap in gaps])


def pema_by_tensor(checkpoints: Sequence[Arrays], steps: Sequence[int], gamma: float = 0.15) -> dict[str, Array]:
    lengths, _, _ = path_length(checkpoints)
    span = steps[-1] - steps[0]
    result: dict[str, Array] = {}
    for name in checkpoints[0]:
        run = [{name: weights[name]} for weights in checkpoints]
        own, _, counted = path_length(run)
        if counted:
            clock = [lengths[-1] ** 2 * length / own[-1] for length in own]
        else:
            clock = [lengths[-1] * length for length in lengths]
        result |= weighted(run, [(1 + span * each) ** -gamma for each in clock[1:]])
    return result


def mean(checkpoints: Sequence[Arrays]) -> dict[str, Array]:
    return {name: np.mean([weights[name] for weights in checkpoints], axis=0) for name in checkpoints[0]}


def ulp(values: Array, dtype: torch.dtype) -> Array:
    """The unit of the last place of a dtype at the magnitude of each value."""
    bits, least = SIGNIFICAND[dtype]
    _, exponent = np.frexp(np.abs(values))
    return np.asarray(np.ldexp(1.0, np.maximum(exponent - 1, least) - bits + 1))


def rounded(values: Array, dtype: torch.dtype) -> Array:
    """Rounded once to a dtype, to nearest, ties to even."""
    unit = ulp(values, dtype)
    return np.asarray(np.rint(values / unit) * unit)


def assert_rounded_once(
    got: Arrays, want: Arrays, checkpoints: Sequence[Arrays], dtype: torch.dtype, *, accumulated: torch.dtype
) -> None:
    """Every element within 1 unit of the last place of a 16-bit dtype, 8 of float32 or float64.

    Where the terms of an average cancel, the unit is that of the accumulation dtype at the size of the terms: no
    sequence of roundings there can do better.
    """
    units = 1 if SIGNIFICAND[dtype][0] < 24 else 8
    assert got.keys() == want.keys()
    for name, expected in want.items():
        terms = np.max([np.abs(weights[name]) for weights in checkpoints], axis=0)
        allowed = np.maximum(units * ulp(expected, dtype), 8 * ulp(terms, accumulated))
        excess = np.abs(got[name] - rounded(expected, dtype)) - allowed
        assert np.all(excess <= 0), f"{name}: {np.max(excess / allowed) + 1:.2f} times the tolerance"
