"""Stage *replay*: how much of each checkpoint is in an average. The update rules, run on one-hot vectors."""

from __future__ import annotations

import torch

from ckavg.replay.rules import RULES
from ckavg.schemes import Coefficients


def effective_weights(coefficients: Coefficients) -> tuple[float, ...]:
    """Weight of each checkpoint in the final average, in float64; they sum to 1 and may be negative.

    >>> from ckavg.schemes import EMA, Timeline
    >>> effective_weights(EMA(gamma=1.0).coefficients(Timeline((0, 1, 2, 3))))
    (0.25, 0.25, 0.25, 0.25)
    """
    visited = len(coefficients.betas)
    one_hot = torch.eye(visited, dtype=torch.float64)
    state = RULES[coefficients.rule](coefficients, torch.empty(visited, dtype=torch.float64))
    for index in range(visited):
        state.take(index, one_hot[index])
    return tuple(state.output(visited - 1, one_hot[-1]).tolist())
