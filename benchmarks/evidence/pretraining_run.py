"""Trains a small language model from scratch at a stable learning rate, and runs that branch off to decay the rate.

Every decayed run is a branch: it takes weights, optimizer and order of the text from the stable run where its decay
begins, so that it differs from it in the learning rate alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ckavg.demo import Llama, LlamaShape, initialised_llama, load_corpus, random_windows, write_checkpoint

DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus-sqrt": lambda x: 1 - math.sqrt(x),
}
"""The learning rate at a fraction x of the decay, as a fraction of the stable one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How the model is trained.

    Attributes:
        steps: optimizer steps of every run, the decayed ones included.
        save_every: steps between checkpoints of the stable run.
        windows: the last parts of training over which the rate decays, or checkpoints are merged, in percent.
        learning_rate: the stable one, after the warm-up.
        warm_up: steps of it.
        batch: windows a step, each of `shape.max_position_embeddings` bytes.
        seeds: of initial weights and order of the text; one stable run each.
        shape: the network.
    """

    steps: int = 2400
    save_every: int = 20
    windows: tuple[int, ...] = (10, 20, 30)
    learning_rate: float = 3e-3
    warm_up: int = 50
    batch: int = 8
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    shape: LlamaShape = field(
        default_factory=lambda: LlamaShape(
            hidden_size=64, intermediate_size=192, num_hidden_layers=2, max_position_embeddings=64
        )
    )

    def begin(self, window: int) -> int:
        """The step after which the last `window` percent of training begin."""
        return self.steps - self.steps * window // 100


@dataclass(slots=True)
class Training:
    """The training state, copied where a run branches off."""

    model: Llama
    optimizer: torch.optim.AdamW
    generator: torch.Generator

    @classmethod
    def begin(cls, setting: Setting, seed: int) -> Training:
        generator = torch.Generator().manual_seed(seed)
        model = initialised_llama(setting.shape, generator=generator)
        return cls(model, new_optimizer(model), generator)

    def branch(self) -> Training:
        model = copy.deepcopy(self.model)
        optimizer = new_optimizer(model)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return Training(model, optimizer, generator)

    def steps(self, rates: Iterator[float], windows: Iterator[Tensor]) -> Iterator[None]:
        """One optimizer step for each learning rate."""
        for rate, batch in zip(rates, windows, strict=False):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            self.model.loss(batch).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            yield

    def windows(self, setting: Setting) -> Iterator[Tensor]:
        """Batches of the text, from the current position."""
        corpus = load_corpus()
        text = corpus.pretraining + corpus.training
        return random_windows(text, setting.shape.max_position_embeddings, setting.batch, self.generator)


def new_optimizer(model: Llama) -> torch.optim.AdamW:
    """AdamW with the settings of all runs."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)


def train(directory: Path, setting: Setting, seed: int) -> dict[tuple[str, int], Path]:
    """Train the stable run of one seed into `directory`/run, and every decayed run that branches off it.

    Returns:
        The last checkpoint of each decayed run, by decay and window.
    """
    run = directory / "run"
    run.mkdir(parents=True)
    training = Training.begin(setting, seed)
    write_checkpoint(run, 0, training.model, {"global_step": 0})
    branches: dict[int, Training] = {}
    begins = {setting.begin(window): window for window in setting.windows}
    rates = (setting.learning_rate * min(1.0, step / setting.warm_up) for step in range(1, setting.steps + 1))
    for step, _ in enumerate(training.steps(rates, training.windows(setting)), start=1):
        if step % setting.save_every == 0:
            write_checkpoint(run, step, training.model, {"global_step": step})
        if step in begins:
            branches[begins[step]] = training.branch()
    decayed = {}
    for window, branched in branches.items():
        for name in DECAYS:
            decayed[name, window] = _decay(directory / f"{name}-{window}", setting, name, branched.branch(), window)
    return decayed


def _decay(directory: Path, setting: Setting, name: str, training: Training, window: int) -> Path:
    """The same steps with a rate that reaches 0 one step after the last; its last checkpoint."""
    directory.mkdir()
    steps = setting.steps - setting.begin(window)
    rates = (setting.learning_rate * DECAYS[name](step / steps) for step in range(steps))
    for _ in training.steps(rates, training.windows(setting)):
        pass
    return write_checkpoint(directory, setting.steps, training.model, {"global_step": setting.steps})
