"""Study: factors or products of low-rank adapters; `python -m benchmarks.evidence.adapters [DIR]`.

PEFT trains LoRA adapters of SmolLM2-135M on Shakespeare, in float32 and at constant rates. Each run is averaged by its
factors, by its products, and by its products cut to the rank of the run, and judged on plays that no run has seen, as
PEFT loads the results. With `DIR`, runs are kept there, and those that are there are not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import ckavg
from benchmarks.evidence.processes import single_threaded
from benchmarks.evidence.tables import Difference, Table, publish, write_record
from benchmarks.finetune import (
    TO_TRAIN,
    RefusedError,
    load_original,
    quiet_transformers,
    refuse_missing,
    windows_to_judge,
    windows_to_train,
)

SCHEMES: Mapping[str, ckavg.Scheme] = {"mean": ckavg.Mean(), "PEMA": ckavg.PEMA()}
LAST = "last"
FACTORS, PRODUCT, TRUNCATED = "factors", "product", "product, R = r"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: the rank of its adapters, α being twice that, and its learning rate."""

    rank: int
    learning_rate: float

    @property
    def name(self) -> str:
        """Its name in tables and directories."""
        return f"rank {self.rank}, rate {self.learning_rate:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all runs have in common.

    Attributes:
        steps: optimizer steps of a run.
        every: steps between checkpoints; the first is saved after so many.
        warm_up: steps over which the rate rises.
        batch: windows a step, of 128 tokens each.
        seed: of the order in which the text is read, and of A.
        windows: held-out windows that judge.
        cells: the runs.
    """

    steps: int = 64
    every: int = 8
    warm_up: int = 4
    batch: int = 2
    seed: int = 0
    windows: int = 24
    cells: tuple[Cell, ...] = field(default=tuple(Cell(rank, rate) for rate in (5e-4, 2e-3) for rank in (8, 16)))


def train(directory: Path, cell: Cell, setting: Setting) -> None:
    """Leave `directory`/checkpoint-N, adapters as PEFT saves them, unless they are there."""
    if (directory / f"checkpoint-{setting.steps}").exists():
        return
    import peft

    torch.manual_seed(setting.seed)
    model, tokenizer = load_original()
    config = peft.LoraConfig(r=cell.rank, lora_alpha=2 * cell.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model.float(), config)
    windows = torch.tensor(windows_to_train(tokenizer))
    order = torch.randperm(len(windows))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=cell.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / setting.warm_up))
    for step in range(1, setting.steps + 1):
        batch = windows[order[(step - 1) * setting.batch : step * setting.batch]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % setting.every == 0:
            model.save_pretrained(directory / f"checkpoint-{step}")
