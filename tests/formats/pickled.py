"""Trainers that save pickles: by their own savers where these can be installed, else as they call `torch.save`."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckavg.checkpoints.layouts import as_safetensors
from tests.formats.of_images import denoised, unet
from tests.formats.of_language import adapted, lora
from tests.formats.trained import Build, Trained, drift, llama, logits
from tests.trainers import drifting, note

STEPS = (100, 200, 300)
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(4)}}, "param_groups": [{"lr": 0.1}]}
Weights = dict[str, Tensor]


def tensors_in(directory: Path, name: str) -> Weights:
    """The model in the pickle of a checkpoint whose weights have this name in a result, loaded by torch."""
    (path,) = [path for path in (directory / name).parent.iterdir() if as_safetensors(path.name) == Path(name).name]
    return tensors_of(path)


def tensors_of(path: Path) -> Weights:
    torch.serialization.add_safe_globals([Namespace])
    saved = torch.load(path, weights_only=True)
    found: Weights = next((saved[key] for key in ("state_dict", "model", "module") if key in saved), saved)
    return found


def of_language(max_shard_size: str) -> Build:
    """A model of transformers, as accelerate saves it for the Trainer."""

    def build(root: Path) -> Trained:
        from accelerate import Accelerator

        trained = Trained(outputs=logits, model=llama())
        for step in STEPS:
            drift(trained.model, step)
            here = root / f"checkpoint-{step}"
            trained.model.save_pretrained(here)
            (here / "model.safetensors").unlink()
            Accelerator(cpu=True).save_model(trained.model, here, max_shard_size, safe_serialization=False)
            torch.save(OPTIMIZER, here / "optimizer.pt")
            torch.save(Namespace(lr=0.1), here / "training_args.bin")
            note(here / "trainer_state.json", {"global_step": step})
            trained.keep(here)
        return trained

    return build


def peft(root: Path) -> Trained:
    trained = Trained(outputs=logits, model=adapted(lora)(root.parent))
    for step in STEPS:
        drift(trained.model, step)
        trained.model.save_pretrained(root / f"checkpoint-{step}", safe_serialization=False)
        trained.keep(root / f"checkpoint-{step}")
    return trained


def diffusers(root: Path) -> Trained:
    trained = Trained(outputs=denoised, model=unet())
    for step in STEPS:
        drift(trained.model, step, by=0.02)
        trained.model.save_pretrained(root / f"checkpoint-{step}" / "unet", safe_serialization=False)
        torch.save(OPTIMIZER, root / f"checkpoint-{step}" / "optimizer.bin")
        trained.keep(root / f"checkpoint-{step}")
    return trained


def saved(
    name: str, make: Callable[[Weights, int], object], files: Mapping[str, object] | None = None, *, place: str = ""
) -> Build:
    """What a trainer hands to `torch.save`, by tensors and step, as files or in folders that hold small ones, too."""

    def build(root: Path) -> Trained:
        for step in STEPS:
            path = root / name.format(step) / place
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(make(drifting(1, step, {"layer.weight": (8, 4), "layer.bias": (8,)}), step), path)
            for file, content in (files or {}).items():
                note(root / name.format(step) / file, content)
        return Trained([root / name.format(step) for step in STEPS])

    return build


def lightning(tensors: Weights, step: int) -> dict[str, Any]:
    return {
        "epoch": 1,
        "global_step": step,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": OrderedDict(tensors),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [OPTIMIZER],
        "lr_schedulers": [{"last_epoch": 1}],
    }


def timm(tensors: Weights, step: int) -> dict[str, Any]:
    average = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    common = {"epoch": step, "arch": "vit", "args": Namespace(lr=0.1), "version": 2, "metric": 71.5}
    return common | {"state_dict": tensors, "optimizer": OPTIMIZER, "state_dict_ema": average}


def fairseq(tensors: Weights, step: int) -> dict[str, Any]:
    return {
        "args": None,
        "cfg": {"model": Namespace(arch="transformer")},
        "model": tensors,
        "criterion": None,
        "optimizer_history": [{"optimizer_name": "Adam", "num_updates": step}],
        "extra_state": {"train_iterator": {"epoch": step // 100}},
        "last_optimizer_state": OPTIMIZER,
    }


BUILDERS: dict[str, Build] = {
    "Trainer without safetensors, `pytorch_model.bin`": of_language("5GB"),
    "the same, in shards, `pytorch_model-*-of-*.bin`": of_language("8KB"),
    "PEFT without safetensors, `adapter_model.bin`": peft,
    "diffusers without safetensors, `diffusion_pytorch_model.bin`": diffusers,
    "accelerate, FSDP, full state, `pytorch_model_fsdp.bin`": saved(
        "checkpoint-{}", lambda tensors, step: tensors, {"random_states_0.pkl": ""}, place="pytorch_model_fsdp.bin"
    ),
    "LitGPT, `lit_model.pth`": saved(
        "step-{:08d}",
        lambda tensors, step: {"model": tensors, "optimizer": OPTIMIZER, "iter_num": 4 * step, "step_count": step},
        {"model_config.yaml": "name: tiny", "hyperparameters.yaml": ""},
        place="lit_model.pth",
    ),
    "Lightning": saved("epoch=1-step={}.ckpt", lightning),
    "timm": saved("checkpoint-{}.pth.tar", timm),
    "open_clip": saved(
        "epoch_{}.pt",
        lambda tensors, step: {"epoch": step, "name": "run", "state_dict": tensors, "optimizer": OPTIMIZER},
    ),
    "fairseq": saved("checkpoint_1_{}.pt", fairseq),
}
