"""Small runs by the savers of the trainers themselves, and what their average computes, in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Outputs = Callable[[Any], Tensor]


@dataclass
class Trained:
    """A run on the disk, and what it was in memory.

    Attributes:
        checkpoints: in the order of training.
        outputs: of a model on a fixed input; None where the command loads no model.
        model: like the one that is trained.
        states: its weights when each checkpoint was saved.
        also: a further loader, given the directory of the result.
    """

    checkpoints: list[Path] = field(default_factory=list)
    outputs: Outputs | None = None
    model: Any = None
    states: list[dict[str, Tensor]] = field(default_factory=list)
    also: Callable[[Path], None] | None = None

    def keep(self, checkpoint: Path, model: Any = None) -> None:
        """Remember that the model, or another one like it, is saved as it is now."""
        self.checkpoints.append(checkpoint)
        state = (model or self.model).state_dict()
        self.states.append({name: value.detach().clone() for name, value in state.items()})

    def computed(self, states: Sequence[dict[str, Tensor]]) -> Tensor:
        """What the mean of some states computes, in float64."""
        model = copy.deepcopy(self.model).double().eval()
        model.load_state_dict({name: mean([each[name] for each in states]) for name in states[-1]})
        with torch.no_grad():
            assert self.outputs is not None
            return self.outputs(model)


Build = Callable[[Path], Trained]


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """In float64; of what is not floating, the last."""
    if not tensors[-1].is_floating_point():
        return tensors[-1]
    return torch.stack([each.double() for each in tensors]).mean(0)


def drift(model: Any, step: int, *, by: float = 0.1) -> None:
    """A step of training, as it were: all that is trainable moves."""
    noise = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=noise).to(parameter)


@functools.cache
def tokenizer() -> Any:
    """Of 24 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstu"]
    made = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=template
    )


TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def llama(head: str = "CausalLM", **more: object) -> Any:
    """A model of transformers, the same each time."""
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, f"LlamaFor{head}")(transformers.LlamaConfig(**TINY, **more))


def logits(model: Any) -> Tensor:
    """Of any model with a head over tokens or classes."""
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found
