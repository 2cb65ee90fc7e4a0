"""The averages that are measured, and the expected weight of each checkpoint. Pure numbers, no torch.

It follows the formulas of docs/algorithms.md and shares no code with ckavg, so that it can check ckavg. All checkpoints
of a synthetic run take part, and the first is the anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

SWEEP = ("pema:gamma=0.05,0.1,0.15", "bema:eta=0.1,0.2", "ema", "dema", "mean")
"""The words of the sweep that makes all of `AVERAGES`."""

_LAG = 10.0
_KAPPA = 0.5

Weights = list[float]


def pema_betas(steps: Sequence[int], lengths: Sequence[float], *, gamma: float = 0.15) -> list[float]:
    """β of Pathwise EMA (Eq. 3). The first, of the anchor, is not used."""
    clock = (steps[-1] - steps[0]) * lengths[-1]
    return [(1 + clock * length) ** -gamma for length in lengths]


def falling(steps: Sequence[int], power: float, *, lag: float = _LAG) -> list[float]:
    """β or α of the schemes that depend on the step."""
    return [(lag + step) ** -power for step in steps]


def replay(betas: Sequence[float]) -> list[Weights]:
    """The weights in E ← (1 − β) E + β θ after each checkpoint, the anchor first.

    >>> replay([1.0, 0.5, 0.25])[-1]
    [0.375, 0.375, 0.25]
    """
    weights = [1.0] + [0.0] * (len(betas) - 1)
    after = [weights]
    for index, beta in enumerate(betas[1:], start=1):
        weights = [weight * (1 - beta) for weight in weights]
        weights[index] += beta
        after.append(weights)
    return after


def _pema(steps: Sequence[int], lengths: Sequence[float], *, gamma: float) -> Weights:
    return replay(pema_betas(steps, lengths, gamma=gamma))[-1]


def _ema(steps: Sequence[int], lengths: Sequence[float]) -> Weights:
    return replay(falling(steps, 0.15, lag=1.0 - steps[0]))[-1]


def _bema(steps: Sequence[int], lengths: Sequence[float], *, eta: float) -> Weights:
    weights = replay(falling(steps, _KAPPA))[-1]
    alpha = falling(steps, eta)[-1]
    return [weights[0] - alpha, *weights[1:-1], weights[-1] + alpha]


def _dema(steps: Sequence[int], lengths: Sequence[float]) -> Weights:
    betas = falling(steps, _KAPPA)
    first = replay(betas)
    second = first[0]
    for beta, new in zip(betas[1:], first[1:], strict=True):
        second = [(1 - beta) * old + beta * weight for old, weight in zip(second, new, strict=True)]
    return [2 * one - other for one, other in zip(first[-1], second, strict=True)]


def _mean(steps: Sequence[int], lengths: Sequence[float]) -> Weights:
    return [1 / len(steps)] * len(steps)


AVERAGES: dict[str, Callable[[Sequence[int], Sequence[float]], Weights]] = {
    "pema-gamma0.05": partial(_pema, gamma=0.05),
    "pema-gamma0.1": partial(_pema, gamma=0.1),
    "pema-gamma0.15": partial(_pema, gamma=0.15),
    "bema-eta0.1": partial(_bema, eta=0.1),
    "bema-eta0.2": partial(_bema, eta=0.2),
    "ema-gamma0.15": _ema,
    "dema-kappa0.5": _dema,
    "mean": _mean,
}
"""The weights from steps and ℓ, by the name that ckavg gives the result."""
