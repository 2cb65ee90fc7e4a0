"""A run to measure on: checkpoints as of transformers' Trainer, with random weights.

Llama tensor names and shapes, bfloat16, `checkpoint-0`, `checkpoint-100`, and so on, each a small random step from the
one before. A separate process must build it (`python -m benchmarks.synthetic`), because it imports torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

VOCABULARY = 32000
STEPS_BETWEEN = 100
LEAST_MEGABYTES = 20
RECORD = "synthetic.json"
WEIGHTS = "model.safetensors"

_HEAD = 64
_SEED = 20240
_SPREAD = 0.02
_STEP = 0.001  # several times the spacing of bfloat16 at 0.02: a smaller one would mostly round away


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a Llama: `hidden` is a multiple of 64."""

    hidden: int
    layers: int

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layers."""
        return self.hidden * 45 // 16

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor; the output layer is not tied."""
        hidden, wide = self.hidden, self.intermediate
        yield "model.embed_tokens.weight", (VOCABULARY, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for part in "qkvo":
                yield f"{prefix}.self_attn.{part}_proj.weight", (hidden, hidden)
            yield f"{prefix}.mlp.gate_proj.weight", (wide, hidden)
            yield f"{prefix}.mlp.up_proj.weight", (wide, hidden)
            yield f"{prefix}.mlp.down_proj.weight", (hidden, wide)
            yield f"{prefix}.input_layernorm.weight", (hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (VOCABULARY, hidden)

    def config(self) -> dict[str, object]:
        """What `config.json` holds."""
        heads = self.hidden // _HEAD
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": _HEAD,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def shape_of(megabytes: int) -> Shape:
    """The Llama whose bfloat16 checkpoint is closest to a size, with at most 40% of it in the two embeddings.

    >>> shape_of(470)
    Shape(hidden=1024, layers=13)
    """
    parameters = megabytes * 1_000_000 / 2
    hidden = next((width for width in (4096, 2048, 1024, 512, 256, 128) if _outside(width) <= 0.4 * parameters), 64)
    in_layer = 4 * hidden**2 + 3 * hidden * Shape(hidden, 0).intermediate
    return Shape(hidden, max(1, round((parameters - _outside(hidden)) / in_layer)))


def _outside(hidden: int) -> int:
    return 2 * VOCABULARY * hidden


def build(run: Path, *, checkpoints: int, megabytes: int) -> None:
    """Write a synthetic run, unless one of that shape and number exists already.

    Args:
        run: its directory. A synthetic run of another shape is replaced; anything else there is refused.
        checkpoints: how many.
        megabytes: about how large each is, in 10⁶ bytes.

    Raises:
        FileExistsError: the directory has files that are not of a synthetic run.
    """
    shape = shape_of(megabytes)
    wanted = {"checkpoints": checkpoints, **asdict(shape)}
    refuse_foreign(run)
    if _is_there(run, wanted):
        return
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    # Also written before the first checkpoint, so that an interrupted build is recognized.
    _write_json(run / RECORD, wanted)
    sizes = _write_checkpoints(run, shape, checkpoints)
    _write_json(run / RECORD, {**wanted, "bytes": sizes})


def refuse_foreign(run: Path) -> None:
    """Raise `FileExistsError` if a directory has anything except a synthetic run, complete or not."""
    if run.exists() and any(run.iterdir()) and not (run / RECORD).exists():
        raise FileExistsError(f"{run} holds something that is not a synthetic run. Name another directory.")


def shorten(run: Path, shorter: Path, *, checkpoints: int) -> None:
    """Make a run of the first checkpoints of a synthetic run, each a link."""
    shutil.rmtree(shorter, ignore_errors=True)
    shorter.mkdir(parents=True)
    for file in weight_files(run)[:checkpoints]:
        (shorter / file.parent.name).symlink_to(file.parent.resolve())


def weight_files(run: Path) -> list[Path]:
    """The weight files of a synthetic run, in order of their steps."""
    return sorted(run.glob(f"checkpoint-*/{WEIGHTS}"), key=lambda file: step_of(file.parent))


def step_of(checkpoint: Path) -> int:
    """The optimizer step in the name of a checkpoint's directory."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _write_checkpoints(run: Path, shape: Shape, checkpoints: int) -> list[int]:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(_SEED)
    weights = {
        name: torch.empty(size, dtype=torch.bfloat16).normal_(std=_SPREAD, generator=generator)
        if len(size) > 1
        else torch.ones(size, dtype=torch.bfloat16)
        for name, size in shape.tensors()
    }
    sizes = []
    for index in range(checkpoints):
        directory = _begin_checkpoint(run, index)
        _write_json(directory / "config.json", shape.config())
        save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
        sizes.append((directory / WEIGHTS).stat().st_size)
        for tensor in weights.values():
            if tensor.dim() > 1:  # one draw a column rather than an element: a build should take seconds
                tensor += torch.randn(tensor.shape[-1], generator=generator).mul_(_STEP).bfloat16()
    return sizes


def _begin_checkpoint(run: Path, index: int) -> Path:
    step = index * STEPS_BETWEEN
    directory = run / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    _write_json(directory / "trainer_state.json", {"global_step": step})
    return directory


def _is_there(run: Path, wanted: dict[str, int]) -> bool:
    try:
        record = json.loads((run / RECORD).read_bytes())
    except (OSError, ValueError):
        return False
    sizes = [file.stat().st_size for file in weight_files(run)]
    return bool(record == {**wanted, "bytes": sizes})


def _write_json(file: Path, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic", description="Build a synthetic run.")
    parser.add_argument("run", type=Path, help="its directory")
    parser.add_argument("--checkpoints", type=int, default=24, help="how many (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=470, help="size of each, about (default: %(default)s)")
    arguments = parser.parse_args()
    build(arguments.run, checkpoints=arguments.checkpoints, megabytes=arguments.megabytes)
    os.sync()


if __name__ == "__main__":
    main()
