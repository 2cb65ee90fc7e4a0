"""What the parity tests share: runs that transformers' own `Trainer` trained and saved, and loading as users load."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

VOCABULARY = 280
WINDOW = 24
TEXT = "\n".join(topics[name] for name in ("assignment", "for", "if", "while", "with"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    bpe.train_from_iterator(
        [TEXT],
        BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=ByteLevel.alphabet(),
            special_tokens=["<pad>", "<eos>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def train(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train a small Llama for a few steps and return the Trainer's output directory.

    Trainer saves no step 0, so the untrained model is: as a checkpoint with `anchor`, else beside the run as `init`.
    """
    disable_progress_bar()
    tokens = tokenizer(TEXT)["input_ids"]
    windows = [tokens[start : start + WINDOW] for start in range(0, len(tokens) - WINDOW, WINDOW)]
    examples = [{"input_ids": window, "labels": window} for window in windows]

    def train_llama(
        *,
        steps: int,
        save_steps: int,
        callbacks: Sequence[object] = (),
        tied: bool = True,
        anchor: bool = True,
    ) -> Path:
        run = tmp_path_factory.mktemp("run") / "output"
        set_seed(0)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=WINDOW,
                tie_word_embeddings=tied,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        model.save_pretrained(run / "checkpoint-0" if anchor else run.with_name("init"))
        arguments = TrainingArguments(
            output_dir=str(run),
            max_steps=steps,
            save_strategy="steps",
            save_steps=save_steps,
            per_device_train_batch_size=4,
            # High enough that the weights at two saves differ by far more than any rounding.
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=0,
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=default_data_collator,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        ).train()
        return run

    return train_llama


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Whatever transformers logs at warning level or above; Python's own warnings are errors in any test here."""
    messages: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    recorder = Recorder(logging.WARNING)
    logger = logging.getLogger("transformers")
    level = logger.level
    # Whoever ran before in this process may have silenced it.
    logger.setLevel(logging.WARNING)
    logger.addHandler(recorder)
    yield messages
    logger.removeHandler(recorder)
    logger.setLevel(level)


@pytest.fixture
def load(warned: list[str]) -> Callable[[Path], Any]:
    """Load a result as its users do, and find in the model exactly what is in the files."""

    def load_and_compare(directory: Path) -> Any:
        model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= loading.keys()
        assert {problem: list(names) for problem, names in loading.items() if names} == {}
        assert warned == []
        stored: dict[str, torch.Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            stored |= load_file(file)
            # transformers 5 does without it; older releases refuse a file that does not say what wrote it.
            with safe_open(file, "pt") as opened:
                assert opened.metadata()["format"] == "pt"
        held = model.state_dict()
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        assert held.keys() - stored.keys() == tied
        for name, tensor in stored.items():
            assert held[name].dtype == tensor.dtype, name
            assert torch.equal(held[name], tensor), name
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
        with torch.no_grad():
            logits = model(torch.arange(WINDOW)[None]).logits
        assert logits.shape == (1, WINDOW, VOCABULARY)
        assert logits.isfinite().all()
        return model

    return load_and_compare
