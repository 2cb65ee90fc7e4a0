"""The held-out loss of many models of one shape: the network is built once, and the weights are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.finetune import quiet_transformers


class Judge:
    """Cross-entropy of models on the same windows, computed in float32 for weights of any dtype.

    Args:
        base: a model directory that transformers loads; all weights are put into its network.
        windows: token ids, all windows of one length.
        device: `cpu` or `cuda`.
        at_once: windows of one forward pass.
    """

    def __init__(self, base: Path, windows: Sequence[Sequence[int]], *, device: str = "cpu", at_once: int = 4) -> None:
        transformers = quiet_transformers()
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        self._model: Any = model.to(device).eval()
        self._batches = torch.split(torch.tensor(windows, device=device), at_once)

    def losses(self, checkpoint: Path) -> list[float]:
        """Mean cross-entropy of each window in nats per token; all tokens but the first are predicted.

        Args:
            checkpoint: a directory with `model.safetensors` of the same network.

        Raises:
            ValueError: it holds other tensors than the network has.
        """
        found = self._model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
        missing = set(found.missing_keys) - {"lm_head.weight"}  # tied to the embeddings, and then not in the file
        if missing or found.unexpected_keys:
            raise ValueError(f"{checkpoint} is no model of this shape: {sorted(missing)}, {found.unexpected_keys}.")
        with torch.inference_mode():
            return [loss for batch in self._batches for loss in self._of_batch(batch)]

    def _of_batch(self, windows: Tensor) -> list[float]:
        logits = self._model(input_ids=windows).logits[:, :-1].transpose(1, 2)
        losses: list[float] = cross_entropy(logits, windows[:, 1:], reduction="none").mean(dim=1).tolist()
        return losses
