"""Stage ``demo``, the run: a short pretraining that leaves nothing behind, then a run that saves as it goes.

The run is the usual case for averaging: a model that can already do something, trained on at a constant learning rate
with small batches, so that the last checkpoint is one noisy draw from around a better one. It must not average, judge,
print, or touch the process's random state.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ckavg.demo.checkpoint import holds_only_of_demo, is_of_demo, write_checkpoint
from ckavg.demo.corpus import load_corpus
from ckavg.demo.model import LlamaShape, initialised_llama
from ckavg.demo.optimise import optimised, random_windows
from ckavg.demo.trainer_log import TrainerLog

__all__ = ["TrainedRun", "remove_earlier", "train"]


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """What :func:`train` made.

    Attributes:
        directory: holds one `checkpoint-<step>` for each of `steps`.
        steps: the optimizer steps saved, increasing; the first is 0, the anchor.
        parameters: how many numbers the model has.
        seconds: wall-clock time of pretraining and run together.
    """

    directory: Path
    steps: tuple[int, ...]
    parameters: int
    seconds: float


def train(
    directory: Path,
    *,
    steps: int = 640,
    save_every: int = 40,
    learning_rate: float = 1e-3,
    batch_size: int = 4,
    pretraining_steps: int = 350,
    pretraining_learning_rate: float = 1e-3,
    pretraining_batch_size: int = 8,
    shape: LlamaShape | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> TrainedRun:
    """Train a small Llama on Python's language reference and save the run as transformers' Trainer does.

    First `pretraining_steps` on one half of the topics, nothing of which is saved; then the run, on the other half:
    a fresh AdamW at a constant learning rate after a short warm-up. Its checkpoints are step 0 (the pretrained model),
    every `save_every` steps, and the last step. The same arguments give the same weights on one machine, under one
    Python and torch, with one number of threads.

    Args:
        directory: where the checkpoints go; made if it is not there.
        steps: optimizer steps of the run.
        save_every: optimizer steps between two checkpoints.
        learning_rate: of the run, after its warm-up.
        batch_size: windows a step of the run; a window is `shape.max_position_embeddings` bytes.
        pretraining_steps: optimizer steps before the run.
        pretraining_learning_rate: before the run, after a warm-up of its own.
        pretraining_batch_size: windows a step before the run.
        shape: the network; by default `LlamaShape()`.
        seed: of the initial weights and of the order of the text.
        on_progress: called after every optimizer step with the steps done, the steps to do (pretraining and run
            together) and the step's training loss in nats per byte.

    Returns:
        What was saved, and in which time.

    Raises:
        FileExistsError: `directory` holds checkpoints already, or is a file.
        OSError: a checkpoint cannot be written.
        ValueError: a count is not positive (`pretraining_steps` may be 0), or the windows are longer than the text.
    """
    counts = {"steps": steps, "save_every": save_every, "batch_size": batch_size}
    _refuse_below(1, **counts, pretraining_batch_size=pretraining_batch_size)
    _refuse_below(0, pretraining_steps=pretraining_steps)
    _prepare(directory)
    started = time.perf_counter()
    corpus = load_corpus()
    generator = torch.Generator().manual_seed(seed)
    model = initialised_llama(shape or LlamaShape(), generator=generator)
    window = model.shape.max_position_embeddings
    total_steps = pretraining_steps + steps

    def report(steps_done: int, loss: float) -> None:
        if on_progress is not None:
            on_progress(steps_done, total_steps, loss)

    windows = random_windows(corpus.pretraining, window, pretraining_batch_size, generator)
    pretraining = optimised(model, windows, steps=pretraining_steps, learning_rate=pretraining_learning_rate)
    for update in pretraining:
        report(update.step, update.loss)

    log = TrainerLog(**counts, steps_per_epoch=len(corpus.training) / (batch_size * window))
    write_checkpoint(directory, 0, model, log.state_at(0))
    saved = [0]
    windows = random_windows(corpus.training, window, batch_size, generator)
    for update in optimised(model, windows, steps=steps, learning_rate=learning_rate):
        log.add(update)
        if update.step % save_every == 0 or update.step == steps:
            write_checkpoint(directory, update.step, model, log.state_at(update.step))
            saved.append(update.step)
        report(pretraining_steps + update.step, update.loss)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return TrainedRun(directory, tuple(saved), parameters, time.perf_counter() - started)


def remove_earlier(directory: Path) -> None:
    """Remove the checkpoints that an earlier `train` left in `directory`, and nothing else.

    Anybody's real run is not the demo's to remove: its checkpoints do not say that the demo made them.

    Raises:
        FileExistsError: a checkpoint there was not made by `train`, or not all that is in it.
    """
    complete, unfinished = sorted(directory.glob("checkpoint-*")), sorted(directory.glob(".tmp-checkpoint-*"))
    for path in (*complete, *unfinished):
        if not holds_only_of_demo(path) or (path in complete and not is_of_demo(path)):
            raise FileExistsError(f"{path} was not made by the demo, and is not removed. Name another directory.")
    for path in (*complete, *unfinished):
        shutil.rmtree(path)


def _refuse_below(least: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"{name} is {count}; it must be at least {least}.")


def _prepare(directory: Path) -> None:
    """Make `directory`, unless something in it would mix with the new run."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file. Name a directory that is empty or not there yet.")
    if present := sorted(path.name for path in directory.glob("checkpoint-*")):
        raise FileExistsError(
            f"{directory} holds checkpoints already ({present[0]} and {len(present) - 1} more), which would mix with "
            "the new ones. Name another directory."
        )
    directory.mkdir(parents=True, exist_ok=True)
