"""Stage ``demo``, one model on disk: a checkpoint directory as transformers' Trainer leaves it, written and read back.

It must not know how a model came about, nor import transformers. A checkpoint is there whole or not at all.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from ckavg.demo.model import Llama, LlamaShape, empty_llama

__all__ = ["RUN_NAME", "holds_only_of_demo", "is_of_demo", "load_model", "write_checkpoint"]

RUN_NAME = "ckavg demo"

_FILES = {"model.safetensors", "config.json", "generation_config.json", "trainer_state.json"}


def write_checkpoint(run: Path, step: int, model: Llama, trainer_state: dict[str, object]) -> Path:
    """Write `run`/checkpoint-`step`: `model.safetensors` (float32), `config.json`, `trainer_state.json`.

    Args:
        run: an existing directory.
        step: the optimizer steps that `model` has seen.
        model: the weights; the tied output layer is not written, as transformers does not.
        trainer_state: what `trainer_state.json` holds.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: the checkpoint is there already, or cannot be written.
    """
    checkpoint = run / f"checkpoint-{step}"
    staging = run / f".tmp-checkpoint-{step}"
    staging.mkdir()
    try:
        save_file(dict(model.state_dict()), staging / "model.safetensors", metadata={"format": "pt"})
        _write_json(staging / "config.json", model.shape.to_config())
        _write_json(staging / "generation_config.json", {"_from_model_config": True, "use_cache": True})
        _write_json(staging / "trainer_state.json", trainer_state)
        staging.replace(checkpoint)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return checkpoint


def load_model(directory: Path) -> Llama:
    """Read the model in `directory`, a checkpoint or an average of checkpoints; weights become float32.

    Args:
        directory: holds `config.json` and `model.safetensors`.

    Raises:
        OSError: one of the two files is missing or cannot be read.
        ValueError: they are not those of one of the demo's models.
    """
    config_file, weights_file = directory / "config.json", directory / "model.safetensors"
    try:
        shape = LlamaShape.from_config(json.loads(config_file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    model = empty_llama(shape)
    weights = {name: tensor.float() for name, tensor in load_file(weights_file).items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights_file} does not hold the tensors that {config_file} describes: {error}") from error
    return model


def holds_only_of_demo(checkpoint: Path) -> bool:
    """Whether a real directory holds no other files than those that the demo writes."""
    return (
        not checkpoint.is_symlink() and checkpoint.is_dir() and {path.name for path in checkpoint.iterdir()} <= _FILES
    )


def is_of_demo(checkpoint: Path) -> bool:
    """Whether a checkpoint says of itself that the demo made it."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("trial_name") == RUN_NAME


def _write_json(file: Path, value: dict[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
