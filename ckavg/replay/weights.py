"""Stage *replay*: how much of each checkpoint is in an average. The update rules, run on one-hot vectors."""

from __future__ import annotations

import torch

from ckavg.replay.rules import RULES
from ckavg.schemes import Coefficients


def effective_weights(coefficients: Coefficients, index: int | None = None) -> tuple[float, ...]:
    """Weight of each checkpoint in the average, in float64; they sum to 1 and may be negative.

    Args:
        coefficients: β and α of every checkpoint.
        index: of the average as it stands after this checkpoint; None: after the last.

    >>> from ckavg.schemes import EMA, Timeline
    >>> effective_weights(EMA(gamma=1.0).coefficients(Timeline((0, 1, 2, 3))))
    (0.25, 0.25, 0.25, 0.25)
    """
    visited = len(coefficients.betas)
    one_hot = torch.eye(visited, dtype=torch.float64)
    state = RULES[coefficients.rule](coefficients, torch.empty(visited, dtype=torch.float64))
    end = visited - 1 if index is None else index
    for place in range(end + 1):
        state.take(place, one_hot[place])
    return tuple(state.output(end, one_hot[end]).tolist())
