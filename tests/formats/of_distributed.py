"""Trainers that save with torch.distributed.checkpoint: their names and nesting, by its own writer."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.formats.laid_out import STEPS
from tests.formats.trained import Build, Trained
from tests.trainers import PT, Shapes, drifting, note, put

Nested = dict[str, Any]

HF: Shapes = {"model.embed_tokens.weight": (24, 16), "lm_head.weight": (24, 16)}
TITAN: Shapes = {"tok_embeddings.weight": (24, 16), "layers.0.attention.wq.weight": (16, 16)}
OLMO: Shapes = {"embeddings.weight": (24, 16), "blocks.0.attention.w_q.weight": (16, 16)}
MEGATRON: Shapes = {
    "embedding.word_embeddings.weight": (24, 16),
    "decoder.layers.mlp.linear_fc1.weight": (2, 32, 16),
}


def save(state: Mapping[str, Any], target: Path, *, flatten: bool = True) -> None:
    """As torch.distributed.checkpoint does in one process."""
    saver: Any = importlib.import_module("torch.distributed.checkpoint.state_dict_saver")
    planners: Any = importlib.import_module("torch.distributed.checkpoint.default_planner")
    with warnings.catch_warnings(action="ignore"):
        planner = planners.DefaultSavePlanner(flatten_state_dict=flatten)
        saver.save(dict(state), checkpoint_id=target, planner=planner, no_dist=True)


def moments(tensors: Mapping[str, Tensor]) -> Nested:
    """What AdamW keeps of each."""
    return {name: {"exp_avg": each, "exp_avg_sq": each**2, "step": torch.tensor(1.0)} for name, each in tensors.items()}


def of_folders(
    name: str,
    shapes: Shapes,
    nested: Callable[[dict[str, Tensor]], Nested],
    files: Mapping[str, object],
    *,
    folder: str = "",
    flatten: bool = True,
    also: Callable[[Path], None] = lambda folder: None,
) -> Build:
    """A run of folders.

    Args:
        name: of a checkpoint, with a place for its step.
        shapes: of the model.
        nested: what is saved with it.
        files: beside it, by relative path.
        folder: in which the model is saved.
        flatten: whether the names are made of the keys.
        also: done to each folder.
    """

    def build(root: Path) -> Trained:
        trained = Trained()
        for step in STEPS:
            here, tensors = root / name.format(step), drifting(1, step, shapes)
            save(nested(tensors), here / folder, flatten=flatten)
            also(here / folder)
            for file, content in files.items():
                note(here / file, content)
            trained.checkpoints.append(here)
            trained.states.append(tensors)
        return trained

    return build


def of_olmo(folder: Path) -> None:
    """`.metadata` as OLMo-core's own writer leaves it: with a class of its own for places."""
    module: Any = types.ModuleType("olmo_core.distributed.checkpoint.filesystem")

    class _StorageInfo:
        def __init__(self, place: Any) -> None:
            self.relative_path, self.offset, self.length = place.relative_path, place.offset, place.length

    _StorageInfo.__module__, _StorageInfo.__qualname__ = module.__name__, "_StorageInfo"
    module._StorageInfo = _StorageInfo
    rewrite(
        folder,
        module,
        lambda metadata: metadata.storage_data.update(
            {index: _StorageInfo(place) for index, place in metadata.storage_data.items()}
        ),
    )


def of_megatron(folder: Path) -> None:
    """`.metadata` as Megatron's planner leaves it: of a class of its own, with more in it."""
    module: Any = types.ModuleType("megatron.core.dist_checkpointing.strategies.torch")
    base: Any = importlib.import_module("torch.distributed.checkpoint.metadata").Metadata
    module.MCoreMetadata = type("MCoreMetadata", (base,), {"__module__": module.__name__})

    def change(metadata: Any) -> None:
        metadata.__class__ = module.MCoreMetadata
        metadata.mcore_data = {"optimizer.state.exp_avg": {"nd_reformulated_orig_global_shape": torch.Size([2, 3])}}

    rewrite(folder, module, change)


def rewrite(folder: Path, module: Any, change: Callable[[Any], object]) -> None:
    """Change `.metadata`, with a module there that its trainer has."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    parts = module.__name__.split(".")
    packages = {".".join(parts[: count + 1]): module for count in range(len(parts))}
    sys.modules.update(packages)
    try:
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    finally:
        for name in packages:
            del sys.modules[name]


def slices(root: Path) -> Trained:
    """torch's writer for safetensors, each process with a file of its own, and nothing put together."""
    trained = Trained()
    for step in STEPS:
        here, tensors = root / f"step-{step}", drifting(1, step, HF)
        for half in range(2):
            part = {name: each[12 * half :][:12].clone() for name, each in tensors.items()}
            starts = {name: {"saved_offsets": [12 * half, 0]} for name in tensors}
            header = PT | {"DCP_SHARDING_INFO": json.dumps(starts), "DCP_VERSION": "1.0"}
            put(here / f"shard-0000{half + 1}-model-00001-of-00001.safetensors", part, header)
        trained.checkpoints.append(here)
        trained.states.append(tensors)
    return trained


def of_composer(tensors: dict[str, Tensor]) -> Nested:
    return {"state": {"model": tensors, "optimizers": moments(tensors), "timestamp": "1ba"}, "rng": [1]}


def of_sharded_state(tensors: dict[str, Tensor]) -> Nested:
    """Of Megatron: one level, weights and an optimizer's tensors by name, and what modules keep as bytes."""
    kept = {f"optimizer.state.exp_avg.{name}": each for name, each in tensors.items()}
    return {**tensors, **kept, "decoder.layers.self_attention._extra_state/shard_0_2": io.BytesIO(b"")}


BUILDERS: dict[str, Build] = {
    "accelerate, Trainer, FSDP": of_folders(
        "checkpoint-{}",
        HF,
        lambda tensors: {"model": tensors},
        {
            "trainer_state.json": {},
            "config.json": {"hidden_size": 16},
            "optimizer_0/__0_0.distcp": "",
            "scheduler.pt": "",
        },
        folder="pytorch_model_fsdp_0",
    ),
    "torchtitan": of_folders(
        "step-{}",
        TITAN,
        lambda tensors: {**tensors, "optimizer": {"state": moments(tensors)}, "train_state": {"step": torch.tensor(3)}},
        {},
    ),
    "OLMo-core": of_folders(
        "step{}",
        OLMO,
        lambda tensors: {"model": tensors, "optim": {"state": moments(tensors)}},
        {"config.json": {"model": {}}, ".metadata.json": {}, "train/rank0.pt": ""},
        folder="model_and_optim",
        also=of_olmo,
    ),
    "NeMo 2": of_folders(
        "llama--val_loss=0.5-step={}-consumed_samples=80.0",
        {f"module.{name}": shape for name, shape in MEGATRON.items()},
        of_sharded_state,
        {"context/model.yaml": "", "weights/common.pt": "", "weights/metadata.json": {"sharded_backend": "torch_dist"}},
        folder="weights",
        flatten=False,
    ),
    "NeMo-RL": of_folders(
        "step_{}",
        HF,
        lambda tensors: {"model": tensors},
        {"config.yaml": "", "training_info.json": {}, "policy/optimizer/__0_0.distcp": ""},
        folder="policy/weights",
    ),
    "Megatron-LM, torch_dist": of_folders(
        "iter_{:07d}",
        MEGATRON,
        of_sharded_state,
        {"common.pt": "", "metadata.json": {"sharded_backend": "torch_dist"}},
        flatten=False,
        also=of_megatron,
    ),
    "Lightning, FSDP in pieces": of_folders(
        "epoch=0-step={}.ckpt", HF, lambda tensors: {"model": tensors, "optimizer_0": moments(tensors)}, {"meta.pt": ""}
    ),
    "Composer, in pieces": of_folders("ep0-ba{}", HF, of_composer, {}),
    "torch.distributed, slices as safetensors": slices,
}
