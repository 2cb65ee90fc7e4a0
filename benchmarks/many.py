"""Runs of very many tensors or very many checkpoints, which cost more in their number than in their bytes.

float32, every checkpoint a small random step from the one before; the same numbers every time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RECORD = "many.json"
"""In a directory of such a run, so that it is known for what it is."""

_STEPS_BETWEEN = 100
_ELEMENTS = 125
_HIDDEN, _KEYS = 256, 128
_SPREAD, _STEP = 0.02, 0.001

Shapes = Mapping[str, tuple[int, ...]]


def build_tiny(path: Path, tensors: int = 100_000, checkpoints: int = 5) -> Path:
    """Write a run of so many tensors of 125 elements, unless it is there already.

    Raises:
        FileExistsError: the directory holds something that is not such a run.
    """
    shapes = {f"model.layers.{n // 1000}.{n % 1000}.weight": (_ELEMENTS,) for n in range(tensors)}
    return _build(path, shapes, checkpoints, "model.safetensors", {"config.json": {"model_type": "tiny"}})


def build_adapters(path: Path, checkpoints: int = 1000, tensors: int = 200, rank: int = 4) -> Path:
    """Write a run of LoRA adapters as PEFT saves them, 0.7 MB each by default, unless it is there already.

    Raises:
        FileExistsError: the directory holds something that is not such a run.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for pair in range(tensors // 2):
        module = ("q_proj", "v_proj")[pair % 2]
        prefix = f"base_model.model.model.layers.{pair // 2}.self_attn.{module}"
        shapes[f"{prefix}.lora_A.weight"] = (rank, _HIDDEN)
        shapes[f"{prefix}.lora_B.weight"] = (_HIDDEN if module == "q_proj" else _KEYS, rank)
    config = {
        "base_model_name_or_path": "example/base",
        "bias": "none",
        "lora_alpha": 2 * rank,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    return _build(path, shapes, checkpoints, "adapter_model.safetensors", {"adapter_config.json": config})


def _build(path: Path, shapes: Shapes, checkpoints: int, weights: str, beside: Mapping[str, object]) -> Path:
    sizes = [math.prod(shape) for shape in shapes.values()]
    wanted = {"checkpoints": checkpoints, "tensors": len(shapes), "elements": sum(sizes), "weights": weights}
    if path.exists() and any(path.iterdir()):
        if not (path / RECORD).exists():
            raise FileExistsError(f"{path} holds something that is not a run of many. Name another directory.")
        if json.loads((path / RECORD).read_bytes()) == wanted:
            return path
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / RECORD).write_text("{}")
    generator = np.random.default_rng(0)
    theta = _SPREAD * generator.standard_normal(sum(sizes), dtype=np.float32)
    for step in range(0, checkpoints * _STEPS_BETWEEN, _STEPS_BETWEEN):
        directory = path / f"checkpoint-{step}"
        directory.mkdir()
        for name, value in {**beside, "trainer_state.json": {"global_step": step}}.items():
            (directory / name).write_text(json.dumps(value))
        save_file(_cut(theta, shapes, sizes), directory / weights, {"format": "pt"})
        theta += _STEP * generator.standard_normal(len(theta), dtype=np.float32)
    (path / RECORD).write_text(json.dumps(wanted))
    return path


def _cut(theta: np.ndarray, shapes: Shapes, sizes: Sequence[int]) -> dict[str, np.ndarray]:
    parts = np.split(theta, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many", description=__doc__)
    parser.add_argument("kind", choices=("tiny", "adapters"))
    parser.add_argument("path", type=Path, help="the directory of the run")
    parser.add_argument("--tensors", type=int, help="default: 100,000 tiny ones, 200 of an adapter")
    parser.add_argument("--checkpoints", type=int, help="default: 5 of tiny tensors, 1,000 adapters")
    parser.add_argument("--rank", type=int, help="of an adapter alone; default: 4")
    arguments = parser.parse_args()
    build = build_tiny if arguments.kind == "tiny" else build_adapters
    given = {name: getattr(arguments, name) for name in ("tensors", "checkpoints", "rank")}
    build(arguments.path, **{name: count for name, count in given.items() if count is not None})


if __name__ == "__main__":
    main()
