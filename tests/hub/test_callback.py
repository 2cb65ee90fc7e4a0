"""The callback in transformers' own Trainer, which pushes the average that is best."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from ckavg.callback import CheckpointAveraging
from tests.hub.server import Hub

REPO = "ada/averaged"


def trained(tmp_path: Path, *schemes: str, evaluated: bool = True, **settings: Any) -> CheckpointAveraging:
    set_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=8, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    examples = [
        {"input_ids": [start, start + 1, start + 2], "labels": [start, start + 1, start + 2]} for start in range(8)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=4, save_steps=1, save_total_limit=1, logging_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, learning_rate=1e-2,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=examples if evaluated else None,
        data_collator=default_data_collator,
    )
    averaging = CheckpointAveraging(trainer, *schemes, push_to_hub=REPO, **settings)
    trainer.add_callback(averaging)
    trainer.train()
    return averaging


def test_the_only_one_without_evaluation(hub: Hub, tmp_path: Path) -> None:
    averaging = trained(tmp_path, "mean", evaluated=False)
    assert averaging.pushed is not None
    assert averaging.pushed.result == averaging.directory / "averaged" / "mean"
    assert "ckavg.svg" in hub.files(REPO)
    assert hub.repos[REPO].messages[-1] == "Upload mean, the average of steps 0 to 4"


def test_the_best(hub: Hub, tmp_path: Path) -> None:
    averaging = trained(tmp_path, "ema:momentum=0.5", "mean", greater_is_better=True)  # of the loss: the mean is best
    assert averaging.best is not None
    assert averaging.best.output.name == "mean"
    assert hub.repos[REPO].messages[-1] == "Upload mean, the average of steps 0 to 4"


def test_none_that_is_worse(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ckavg.callback"):
        averaging = trained(tmp_path, "mean", private=True)
    assert averaging.pushed is None
    assert REPO not in hub.repos
    assert "the trained model is better" in caplog.text


def test_a_hub_that_refuses_costs_nothing_else(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with caplog.at_level(logging.WARNING, "ckavg.callback"):
        averaging = trained(tmp_path, "mean", evaluated=False)
    assert "The averages are complete: " in caplog.text
    assert Path(averaging.results[0].directory).is_dir()
