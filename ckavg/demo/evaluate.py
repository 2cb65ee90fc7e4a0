"""Stage ``demo``, the judge: the loss of any saved model on the text that no training has seen.

It must not train, nor know whether it judges a checkpoint or an average.
"""

from pathlib import Path

import torch
from torch import Tensor

from ckavg.demo.checkpoint import load_model
from ckavg.demo.corpus import load_corpus
from ckavg.demo.model import Llama

__all__ = ["held_out_loss"]

_WINDOWS_AT_ONCE = 32


def held_out_loss(directory: Path) -> float:
    """Mean cross-entropy of the model in `directory` over the whole held-out text.

    The text is read in windows of the model's own length, one after the other: every byte but the very first is
    predicted once, from the bytes of its window before it. The same weights give the same number on one machine.

    Args:
        directory: a checkpoint or an average of checkpoints: `config.json` and `model.safetensors`.

    Returns:
        Nats per byte; ln 256 = 5.55 knows nothing.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the directory does not hold one of the demo's models.
    """
    return _mean_loss(load_model(directory), load_corpus().held_out)


def _mean_loss(model: Llama, text: bytes) -> float:
    """Nats per byte over all bytes of `text` but the first."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    total = 0.0
    with torch.inference_mode():
        for windows in _windows(tokens, model.shape.max_position_embeddings):
            total += model.loss(windows, reduction="sum").item()
    return total / (len(tokens) - 1)


def _windows(tokens: Tensor, length: int) -> list[Tensor]:
    """Batches of windows of `length` + 1 tokens that share one token with the next; the last may be shorter."""
    whole = (len(tokens) - 1) // length
    batches: list[Tensor] = []
    if whole:
        batches += torch.split(tokens[: whole * length + 1].unfold(0, length + 1, length), _WINDOWS_AT_ONCE)
    if (len(tokens) - 1) % length:
        batches.append(tokens[whole * length :].unsqueeze(0))
    return batches
