"""Stage ``demo``, the optimizer: AdamW at a constant learning rate, one update at a time.

It must not save, report or decide when to stop being watched: it yields every update to the caller.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ckavg.demo.model import Llama

__all__ = ["Update", "optimised", "random_windows"]

_WARM_UP_STEPS = 20
_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.1
_LARGEST_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        loss: of this step's batch before the update, nats per byte.
        gradient_norm: Euclidean, over all parameters, before clipping.
        learning_rate: of this step.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float


def optimised(model: Llama, windows: Iterator[Tensor], *, steps: int, learning_rate: float) -> Iterator[Update]:
    """Train `model` in place for `steps` updates with a fresh AdamW, yielding after each of them.

    The learning rate rises linearly for a few steps, then stays: a decay would quiet the very noise that averaging
    takes away.

    Args:
        model: trained in place.
        windows: one batch an update, (batch, length + 1), int64.
        steps: updates to make.
        learning_rate: after the warm-up.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY)
    for step in range(1, steps + 1):
        rate = learning_rate * min(1.0, step / _WARM_UP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = model.loss(next(windows))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT_NORM)
        optimizer.step()
        yield Update(step, loss.item(), norm.item(), rate)


def random_windows(text: bytes, length: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of `batch_size` windows of `length` + 1 consecutive bytes, (batch_size, length + 1), int64.

    Raises:
        ValueError: the text is shorter than one window; raised when the first batch is asked for.
    """
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    if len(tokens) <= length:
        raise ValueError(f"The demo's text has {len(tokens)} bytes, a window {length + 1}: use a shorter window.")
    within = torch.arange(length + 1)
    while True:
        starts = torch.randint(len(tokens) - length, (batch_size, 1), generator=generator)
        yield tokens[starts + within]
