"""Sound runs, made up: weights that move as those of a trained model do, with all that is apt to look like damage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rate = Callable[[float], float]
"""Learning rate by the part of the training that is done."""

RATES: dict[str, Rate] = {
    "constant": lambda _: 1.0,
    "warm-up, cosine": lambda done: min(1.0, done / 0.1) * 0.5 * (1 + math.cos(math.pi * done)),
    "warm-up, line to 0": lambda done: min(1.0, done / 0.03) * (1 - done),
    "stable, then decay": lambda done: min(1.0, (1 - done) / 0.2),
    "fast, then slow": lambda done: 1 / (0.02 + done),
}


def sound_run(
    seed: int, steps: Sequence[int], rate: Rate, dtype: torch.dtype, *, speed: float = 1e-4
) -> list[dict[str, Tensor]]:
    """Weights at each step, stored in a dtype.

    Every step moves an element by its learning rate along a drift and a noise of heavy tails, both larger in some
    elements than in others; rows of the embedding only when their token comes up, the frozen tensor never.

    Args:
        seed: of everything random.
        steps: where the run is saved; its first counts as step 0.
        rate: learning rate along the run.
        dtype: what the weights are stored in.
        speed: how far a step moves an element at a rate of 1; the weights are about 0.02.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {
        "embed.weight": 0.02 * normal(3000, 32),
        "up.weight": 0.02 * normal(256, 128),
        "down.weight": 0.02 * normal(128, 256) * (1 + 20 * (normal(256) > 2.5)),
        "norm.weight": torch.ones(128, dtype=torch.float64),
        "bias": torch.zeros(128, dtype=torch.float64),
        "lora_A.weight": 0.1 * normal(8, 128),
        "lora_B.weight": torch.zeros(256, 8, dtype=torch.float64),
        "frozen.weight": 0.02 * normal(64, 64),
        "gate": torch.zeros((), dtype=torch.float64),
    }
    drifts = {name: 0.1 * normal(*value.shape) for name, value in weights.items()}
    sizes = {name: torch.exp(0.5 * normal(*value.shape)) for name, value in weights.items()}
    frequency = 1 / torch.arange(1, 3001, dtype=torch.float64)
    run, span = [], steps[-1] - steps[0]
    for place, step in enumerate(steps):
        taken = step - steps[place - 1] if place else 0
        for name, value in weights.items():
            if name.startswith("frozen") or not place:
                continue
            done = (step - steps[0] - taken / 2) / span
            tails = torch.sqrt(5 / (normal(5, *value.shape) ** 2).sum(dim=0))
            moved = taken * drifts[name] + math.sqrt(taken) * normal(*value.shape) * tails
            if name.startswith("embed"):
                seen = torch.rand(3000, generator=generator, dtype=torch.float64) < 1 - (1 - frequency / 8) ** taken
                moved *= seen[:, None]
            value += speed * rate(done) * sizes[name] * moved
        run.append({name: value.to(dtype, copy=True) for name, value in weights.items()})
    return run
