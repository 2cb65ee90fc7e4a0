"""One run of the small-model study: a model of Python's reference is fine-tuned on Shakespeare, and evaluated.

The network is that of the pretraining study, so small that a run of the papers' length takes seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.evidence import pretraining_run
from benchmarks.evidence.language_model_run import Cell, Outcome, Setting, judge_all
from benchmarks.finetune import plays
from ckavg.demo import load_model, random_windows, write_checkpoint

PRETRAINING = pretraining_run.Setting(windows=(30,), seeds=(0,))
"""Seed of the base model, which is the end of the linear decay."""

_JUDGED_BYTES = 2048
"""Length of each piece of held-out text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallCell(Cell):
    """The settings of one run; a step takes `batch` windows of 64 bytes."""

    batch: int = 8


def pretrain(directory: Path) -> Path:
    """Train the base model from scratch, and return its directory."""
    ends = pretraining_run.train(directory, PRETRAINING, seed=PRETRAINING.seeds[0])
    return ends["linear", PRETRAINING.windows[0]]


def fine_tune(directory: Path, base: Path, cell: Cell, setting: Setting) -> None:
    """Train `directory`/run/checkpoint-N from the model in `base`, to which `directory`/base becomes a link."""
    (directory / "run").mkdir(parents=True)
    (directory / "base").symlink_to(base.resolve(), target_is_directory=True)
    model = load_model(base)
    generator = torch.Generator().manual_seed(cell.seed)
    training = pretraining_run.Training(model, pretraining_run.new_optimizer(model), generator)
    text = "".join(plays(held_out=False)).encode()
    windows = random_windows(text, model.shape.max_position_embeddings, cell.batch, generator)
    for step, _ in enumerate(training.steps(rates(cell, setting), windows), start=1):
        if step % setting.frequencies[0] == 0:
            write_checkpoint(directory / "run", step, model, {"global_step": step})


def rates(cell: Cell, setting: Setting) -> Iterator[float]:
    """The learning rate of every step: a warm-up along a line, then the cosine from the peak to the minimum.

    >>> [round(rate, 3) for rate in rates(Cell(learning_rate=1.0, minimum=0.1), Setting(steps=6, warm_up=2))]
    [0.5, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    for step in range(1, setting.steps + 1):
        if step <= setting.warm_up:
            yield cell.learning_rate * step / setting.warm_up
        else:
            gone = (step - setting.warm_up) / (setting.steps - setting.warm_up)
            fallen = (1 - cell.minimum) * (1 - math.cos(math.pi * gone)) / 2
            yield cell.learning_rate * (1 - fallen)


def pieces(count: int) -> list[Tensor]:
    """This many evenly spaced pieces of the held-out plays, each as windows that overlap by one byte."""
    text = torch.frombuffer(bytearray("".join(plays(held_out=True)).encode()), dtype=torch.uint8).long()
    length = PRETRAINING.shape.max_position_embeddings
    return [
        text[start : start + _JUDGED_BYTES + 1].unfold(0, length + 1, length)
        for start in torch.linspace(0, len(text) - _JUDGED_BYTES - 1, count).long().tolist()
    ]


class SmallJudge:
    """Cross-entropy of models on the same pieces of text, nats per byte."""

    def __init__(self, judged: Sequence[Tensor]) -> None:
        self._windows = torch.cat(list(judged))
        self._pieces = len(judged)

    def losses(self, checkpoint: Path) -> list[float]:
        """Mean cross-entropy of each piece."""
        model = load_model(checkpoint)
        with torch.inference_mode():
            logits = model(self._windows[:, :-1]).transpose(1, 2)
            found = torch.nn.functional.cross_entropy(logits, self._windows[:, 1:], reduction="none")
            losses: list[float] = found.view(self._pieces, -1).mean(dim=1).tolist()
        return losses


def carry_out_cell(directory: Path, base: Path, cell: Cell, setting: Setting) -> Outcome:
    """Train, average and evaluate one cell in `directory`."""
    outcome, begun = Outcome(cell), time.perf_counter()
    fine_tune(directory, base, cell, setting)
    outcome.seconds["train"] = time.perf_counter() - begun
    judge_all(directory, setting, SmallJudge(pieces(setting.windows)), outcome)
    return outcome
