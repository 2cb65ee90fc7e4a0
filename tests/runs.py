"""Runs on disk for the tests: written with the safetensors library, never with ckavg."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = Mapping[str, Tensor]

OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of `torch.save` begins that is not read: one in the layout before torch 1.6."""


def save_old(saved: object, path: Path) -> None:
    """In that layout."""
    torch.save(saved, path, _use_new_zipfile_serialization=False)


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"}


def write_checkpoint(directory: Path, weights: Weights, *, step: int | None = None, shards: int = 1) -> Path:
    """One checkpoint in the HF Trainer layout; `step` goes into its trainer state, `shards` > 1 adds an index."""
    directory.mkdir(parents=True)
    names = list(weights)
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    )
    for number, file in enumerate(files):
        save_file(
            {name: weights[name].contiguous() for name in names[number::shards]}, directory / file, {"format": "pt"}
        )
    if shards > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        placed = {name: files[place % shards] for place, name in enumerate(names)}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "optimizer.pt").write_bytes(b"not to be copied")
    if step is not None:
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return directory


def write_run(
    root: Path, checkpoints: Sequence[Weights], steps: Sequence[int], *, shards: Sequence[int] = (1,)
) -> Path:
    """A run of `checkpoint-<step>` directories; `shards` gives each its shard count, in turn."""
    for place, (weights, step) in enumerate(zip(checkpoints, steps, strict=True)):
        write_checkpoint(root / f"checkpoint-{step}", weights, step=step, shards=shards[place % len(shards)])
    return root


def random_run(seed: int, count: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Weights of a run with every shape that is apt to go wrong; a random walk, so that consecutive ones are alike."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "odd": (3, 5, 7),
        "scalar": (),
        "empty": (0, 4),
        "single": (1,),
        "chunk_and_a_bit": (16_389,),
        "tiles": (3, 30_011),
        "bias": (130,),
    }
    walk = {name: 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    walk["norm"] = torch.ones(64, dtype=torch.float64)
    run = []
    for place in range(count):
        if place:
            for tensor in walk.values():
                tensor += 0.01 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        weights = {name: tensor.to(dtype, copy=True) for name, tensor in walk.items()}
        weights["position_ids"] = torch.arange(10) + place
        weights["mask"] = torch.tensor([True, False, place % 2 == 0])
        run.append(weights)
    return run
