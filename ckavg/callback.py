"""A callback for transformers' Trainer: it keeps the checkpoints during training and averages them at the end.

    trainer = SFTTrainer(...)
    averaging = CheckpointAveraging(trainer, "pema", "mean:last=5", load_best=True)
    trainer.add_callback(averaging)
    trainer.train()
    averaging.best                                      # the record of the best average, or None

The only module that imports transformers on import. It never stops a training: errors here become warnings.
"""

from __future__ import annotations

import fnmatch
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from ckavg.averaging.pipeline import carry_out
from ckavg.averaging.plan import Options, plan_averages
from ckavg.averaging.sources import open_run
from ckavg.checkpoints.trainer_log import goal_of
from ckavg.engine.context import Context
from ckavg.errors import CkavgError, SettingError, as_arguments
from ckavg.hub import Destination, Pushed, push_result
from ckavg.output.record import Record
from ckavg.schemes import Scheme
from ckavg.schemes.parse import Word, parse_words

_LOG = logging.getLogger(__name__)

_DIRECTORY = "_averaging"
"""Folder in the output directory. The Trainer does not upload names that begin with an underscore."""

_OWNED = ".ckavg"
"""A file that marks the directory as the callback's, which may be emptied."""

_TRAINING_STATE = (
    "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "global_step*", "zero_to_fp32.py",
    "latest",
)  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TRAINED = "trained"


class CheckpointAveraging(TrainerCallback):  # type: ignore[misc]
    """Keep the base model and every saved checkpoint, average them at the end of training, and evaluate the averages.

    Checkpoints are kept in `OUTPUT_DIR/_averaging`, regardless of `save_total_limit`, as hard links if the disk
    supports them, and without optimizer states. Averages go to `OUTPUT_DIR/_averaging/averaged`, and are the same to
    the byte as those of `ckavg sweep OUTPUT_DIR/_averaging`. A training that begins at step 0 empties the directory; a
    resumed one continues with it.

    In distributed training the first process averages, and nothing is evaluated.

    Attributes:
        results: the records of the averages that are kept, in the order of the schemes; empty until training has ended.
        values: the metric of the trained model (`trained`) and of each average by name; empty without evaluation.
        best: the best average; None if the trained model is better, or nothing was evaluated.
        pushed: what was uploaded.

    Args:
        trainer: the Trainer, or a subclass such as those of TRL.
        schemes: schemes, or words of `ckavg sweep` such as `pema:gamma=0.1,0.2` or `mean:last=5`; by default `pema`.
            If all of them choose checkpoints with `last`, only those checkpoints are kept.
        metric: the metric that decides, by its name in `evaluate`; None means the trainer's `metric_for_best_model`,
            else `eval_loss`.
        greater_is_better: None means the trainer's setting for its own metric, else what the name implies.
        keep: `all` averages, or only the `best`; then none if the trained model is better.
        load_best: load the best average into the trainer's model, if it is better than the trained model.
        push_to_hub: upload the best average to this repository, if it is better than the trained model or was not
            evaluated.
        private: whether that repository must be private; None means private if it is created.

    Raises:
        SettingError: a scheme or the repository name is invalid, or nothing decides which average is best.
    """

    def __init__(
        self,
        trainer: Any,
        *schemes: Scheme | str,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        keep: Literal["all", "best"] = "all",
        load_best: bool = False,
        push_to_hub: str | None = None,
        private: bool | None = None,
    ) -> None:
        self.results: tuple[Record, ...] = ()
        self.values: dict[str, float] = {}
        self.best: Record | None = None
        self.pushed: Pushed | None = None
        self._trainer = trainer
        self._words = [word for scheme in schemes or ("pema",) for word in _words_of(scheme)]
        self._goal = _goal_of(trainer.args, metric, greater_is_better)
        self._keep, self._load_best = keep, load_best
        self._destination = None if push_to_hub is None else Destination(repo=push_to_hub, private=private)
        self._is_on = False
        labels = [word.label for word in self._words]
        if len({*labels}) < len(labels):
            raise SettingError(f"Duplicate averages: {', '.join(labels)}.", hint="Name each average once.")
        if keep not in ("all", "best"):
            raise SettingError(f"keep is {keep!r}; it must be all or best.")
        if trainer.eval_dataset is None and (keep == "best" or load_best or (push_to_hub and len(self._words) > 1)):
            raise SettingError(
                "The trainer has no eval_dataset, so nothing decides which average is best.",
                hint="Give it one; or leave out keep and load_best, and push a single scheme.",
            )

    @property
    def directory(self) -> Path:
        """The directory of the kept checkpoints. The averages are in its folder `averaged`."""
        return Path(self._trainer.args.output_dir) / _DIRECTORY

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the base model; after a resume, the checkpoints saved before it."""
        self.results, self.values, self.best, self.pushed = (), {}, None, None
        self._is_on = True
        with self._warned("No average will be formed"):
            if not state.global_step:
                self._keep_base(args, state)
            elif state.is_world_process_zero:
                self._keep_earlier(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the saved checkpoint."""
        if self._is_on and state.is_world_process_zero:
            with self._warned("No average will be formed"):
                _keep(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.directory)
                self._remove_unneeded()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Average, evaluate, and keep, load or push the best average."""
        if not self._is_on or not state.is_world_process_zero:
            return
        with self._warned("There is no average"):
            self._average()
        with self._warned("The averages are not evaluated"):
            if self.results and self._trainer.eval_dataset is not None and self._can_be_loaded():
                self._evaluate()
        with self._warned("The averages are complete"):
            self._finish()

    def _keep_base(self, args: Any, state: Any) -> None:
        place = Path(args.output_dir) / ".averaging-base"
        if state.is_world_process_zero:
            shutil.rmtree(place, ignore_errors=True)
        # In all processes, before anything can fail in one of them: each may hold a part of the model.
        self._trainer.save_model(str(place), _internal_call=True)
        if not state.is_world_process_zero:
            return
        try:
            _claim(self.directory)
            _remove_from(self.directory, 0)
            if not any(place.glob("*.safetensors")) and not any(place.glob("*.bin")):
                raise SettingError(
                    "In this set-up (FSDP or DeepSpeed) the trainer saves no whole weights.",
                    hint="Have them gathered (FULL_STATE_DICT, stage3_gather_16bit_weights_on_model_save), or use the "
                    "command line after training.",
                )
            _keep(place, self.directory, name="checkpoint-0")
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _keep_earlier(self, args: Any, state: Any) -> None:
        _claim(self.directory)
        _remove_from(self.directory, state.global_step + 1)
        kept = _checkpoints_in(self.directory)
        for step, path in _checkpoints_in(Path(args.output_dir)).items():
            if step <= state.global_step and step not in kept:
                _keep(path, self.directory)
        if 0 not in kept and self._most is None:
            _LOG.warning("The model before step 1 was not kept: the first checkpoint takes its place.")

    @property
    def _most(self) -> int | None:
        """How many of the newest checkpoints are needed; None means all."""
        lasts = [word.selection["last"] for word in self._words if [*word.selection] == ["last"]]
        return max(2, *lasts) if len(lasts) == len(self._words) else None

    def _remove_unneeded(self) -> None:
        if self._most is not None:
            for _, path in sorted(_checkpoints_in(self.directory).items())[: -self._most]:
                shutil.rmtree(path)

    def _average(self) -> None:
        wanted = [
            (open_run(self.directory, every_from=_every_from(word), **word.selection), word.scheme, None)  # type: ignore[arg-type]
            for word in self._words
        ]
        plans = plan_averages(wanted, Options(force=True, plot=self._destination is not None))
        for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
            _LOG.warning(as_arguments(warning))
        self.results = carry_out(plans, Context(device="cpu")).records
        taken = _bytes_of(self.directory)
        self._trainer.log({"averaged_checkpoints": len(plans[0].run.steps), "averaging_disk_gb": taken / 1e9})

    def _can_be_loaded(self) -> bool:
        trainer = self._trainer
        if trainer.args.world_size == 1 and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            return True
        _LOG.warning(
            "In distributed training the averages are not evaluated. Evaluate them afterwards: ckavg sweep %s … --eval",
            self.directory,
        )
        return False

    def _evaluate(self) -> None:
        """Compare the averages with the trained model, which is restored afterwards."""
        values = {_TRAINED: self._value(_TRAINED)}
        weights = _weights_of(self._trainer.model)
        before = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
        try:
            for record in self.results:
                _load(weights, Path(record.directory))
                values[record.output.name] = self._value(record.output.name)
        finally:
            _copy(before, weights)
        sign = -1 if self._goal.greater_is_better else 1
        first = min(values, key=lambda name: (sign * values[name], name != _TRAINED))
        self.values, self.best = values, next((each for each in self.results if each.output.name == first), None)

    def _value(self, name: str) -> float:
        """The metric of the current model; NaN counts as the worst."""
        metrics = self._trainer.evaluate(metric_key_prefix=f"eval_{name}")
        key = f"eval_{name}_{self._goal.metric}"
        if key not in metrics:
            known = ", ".join(each.replace(f"eval_{name}_", "eval_", 1) for each in metrics)
            raise SettingError(
                f"evaluate returns no eval_{self._goal.metric}; it returns {known}.", hint="Set metric to one of these."
            )
        value = float(metrics[key])
        return float("-inf" if self._goal.greater_is_better else "inf") if math.isnan(value) else value

    def _finish(self) -> None:
        if self._load_best and self.best is not None:
            _load(_weights_of(self._trainer.model), Path(self.best.directory))
        if self._keep == "best" and self.values:
            for record in (each for each in self.results if each is not self.best):
                shutil.rmtree(record.directory)
            self.results = () if self.best is None else (self.best,)
        if self._destination is None or not self.results:
            return
        chosen = self.best if self.values else self.results[0]
        if chosen is None:
            _LOG.warning("Nothing is uploaded: the trained model is better than its averages: %s.", self.values)
        elif self.values or len(self.results) == 1:
            to = self._destination
            self.pushed = push_result(Path(chosen.directory), to.repo, private=to.private)

    @contextmanager
    def _warned(self, consequence: str) -> Iterator[None]:
        """Turn an error into a warning: it costs the averages, not the training."""
        try:
            yield
        except Exception as error:
            _LOG.warning("%s: %s", consequence, error, exc_info=not isinstance(error, CkavgError))
            self._is_on = False


@dataclass(frozen=True, slots=True)
class _Goal:
    """The metric, without its prefix `eval_`."""

    metric: str
    greater_is_better: bool


def _goal_of(args: Any, metric: str | None, greater_is_better: bool | None) -> _Goal:
    asked = metric or args.metric_for_best_model or "eval_loss"
    if greater_is_better is None and asked == args.metric_for_best_model:
        greater_is_better = args.greater_is_better
    known = goal_of(asked)
    if greater_is_better is None and known is None:
        raise SettingError(
            f"The name {asked!r} does not say whether less or more is better.", hint="Set greater_is_better."
        )
    return _Goal(asked.removeprefix("eval_"), known == "max" if greater_is_better is None else greater_is_better)


def _words_of(scheme: Scheme | str) -> tuple[Word, ...]:
    return parse_words([scheme]) if isinstance(scheme, str) else (Word(scheme.label, scheme, {}),)


def _every_from(word: Word) -> int | None:
    return word.scheme.every_from if "every" in word.selection else None


# --- Keeping ---


def _claim(directory: Path) -> None:
    """Create and mark the directory, or refuse an existing one without the mark: its content may be removed later."""
    if directory.is_symlink() or (directory.exists() and not (directory / _OWNED).is_file()):
        raise SettingError(f"{directory} exists, and this callback did not make it.", hint="Move it away.")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _OWNED).touch()


def _checkpoints_in(directory: Path) -> dict[int, Path]:
    found = ((_CHECKPOINT.fullmatch(path.name), path) for path in directory.iterdir())
    return {int(match[1]): path for match, path in found if match and path.is_dir() and not path.is_symlink()}


def _remove_from(directory: Path, first: int) -> None:
    """Remove the checkpoints from this step on: the training repeats them."""
    for step, path in _checkpoints_in(directory).items():
        if step >= first:
            shutil.rmtree(path)


def _keep(checkpoint: Path, directory: Path, name: str | None = None) -> None:
    """Link or copy a checkpoint without its training state; the copy appears complete or not at all."""
    target = directory / (name or checkpoint.name)
    partial = directory / f".{target.name}.partial"
    for place in (partial, target):
        shutil.rmtree(place, ignore_errors=True)

    def left_out(_: str, names: list[str]) -> set[str]:
        return {each for each in names for pattern in _TRAINING_STATE if fnmatch.fnmatchcase(each, pattern)}

    shutil.copytree(checkpoint, partial, ignore=left_out, copy_function=_link)
    partial.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)


def _bytes_of(directory: Path) -> int:
    """Bytes that the directory alone takes on the disk: files with links elsewhere do not count."""
    files = [path.lstat() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(each.st_size for each in files if each.st_nlink == 1)


# --- Loading into an existing model ---


def _weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors by the names under which it saves them; for an adapter, only its own."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        weights: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    else:
        weights = model.state_dict()
    return weights


def _load(weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Overwrite a model's weights with those of a checkpoint.

    Raises:
        SettingError: the checkpoint does not have exactly the model's tensors.
    """
    files = sorted(directory.glob("*.safetensors"))
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    held = {weights[name].data_ptr() for name in loaded if name in weights}
    strange = [name for name in loaded if name not in weights or weights[name].shape != loaded[name].shape]
    strange += [name for name, tensor in weights.items() if name not in loaded and tensor.data_ptr() not in held]
    if strange:
        raise SettingError(
            f"{directory} does not fit the model in memory: {strange[0]}.", hint="Evaluate it with from_pretrained."
        )
    _copy(loaded, weights)


def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)
