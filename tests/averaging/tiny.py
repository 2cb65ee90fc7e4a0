"""A tiny Llama with a tokenizer of bytes, both made here, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_tiny_model(directory: Path, seed: int = 0, **more: Any) -> Path:
    """A random Llama of 10,864 parameters whose tokens are bytes; its beginning of text is token 0, its end 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {"<s>": 0, "</s>": 1} | {letter: index for index, letter in enumerate(letters, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>"} | more
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokens),
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
