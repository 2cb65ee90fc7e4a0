"""Runs of any size on any disk: sparse files with real safetensors headers.

Planning reads no weights, so it cannot tell the difference. A file takes a few pages, but the file system must allow
its size. A separate process builds a run, since a list of a million tensors is large: see `benchmarks.measure`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "sparse.json"
"""A file that marks a directory of sparse runs."""

TILE, BLOCK, ITEM = 1 << 18, 1 << 22, 2
"""Elements of a tile and of a block, and bytes of an element."""

_STEPS_BETWEEN = 1000
_PIECE = 8 << 20

Tensors = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Model:
    """The content of a checkpoint: bfloat16 tensors, by name and shape, and the number of files."""

    name: str
    tensors: Tensors
    shards: int

    @property
    def nbytes(self) -> int:
        """Bytes of one checkpoint, headers left out."""
        return ITEM * sum(math.prod(shape) for _, shape in self.tensors)


@dataclass(frozen=True, slots=True)
class Built:
    """A run that was built: the size of each of its checkpoints.

    Attributes:
        model: its name.
        checkpoints: how many there are.
        files, tensors, tiles, blocks: of one checkpoint, in numbers.
        nbytes: of one checkpoint, headers left out.
        header_bytes: of its headers.
    """

    model: str
    checkpoints: int
    files: int
    tensors: int
    tiles: int
    blocks: int
    nbytes: int
    header_bytes: int


def llama(name: str, *, hidden: int, layers: int, intermediate: int, shards: int) -> Model:
    """A Llama 3 with grouped queries.

    >>> model = llama("8B", hidden=4096, layers=32, intermediate=14336, shards=4)
    >>> len(model.tensors), model.nbytes
    (291, 16060522496)
    """
    vocabulary, keys = 128256, 1024
    projections = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    tensors: Tensors = [("model.embed_tokens.weight", (vocabulary, hidden))]
    tensors += [
        (f"model.layers.{layer}.{part}.weight", shape) for layer in range(layers) for part, shape in projections.items()
    ]
    tensors += [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]
    return Model(name, tensors, shards)


def experts(name: str, *, layers: int, of_layer: int, hidden: int, intermediate: int, shards: int) -> Model:
    """A mixture of experts as DeepSeek's and Moonshot's: an expert is three tensors, and the first layer is dense.

    >>> model = experts("1T", layers=61, of_layer=384, hidden=7168, intermediate=2048, shards=200)
    >>> len(model.tensors), round(model.nbytes / 1e12, 2)
    (69975, 2.05)
    """
    vocabulary, narrow, heads = 163840, 512, 8192
    attention = {
        "q_a_proj": (3 * narrow, hidden),
        "q_a_layernorm": (3 * narrow,),
        "q_b_proj": (3 * heads // 2, 3 * narrow),
        "kv_a_proj_with_mqa": (narrow + 64, hidden),
        "kv_a_layernorm": (narrow,),
        "kv_b_proj": (2 * heads, narrow),
        "o_proj": (hidden, heads),
    }
    tensors: Tensors = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors += [(f"{prefix}.self_attn.{part}.weight", shape) for part, shape in attention.items()]
        tensors += [(f"{prefix}.{part}_layernorm.weight", (hidden,)) for part in ("input", "post_attention")]
        if layer == 0:
            tensors += _feed_forward(f"{prefix}.mlp", hidden, 9 * intermediate)
            continue
        tensors += [(f"{prefix}.mlp.gate.weight", (of_layer, hidden))]
        tensors += [(f"{prefix}.mlp.gate.e_score_correction_bias", (of_layer,))]
        for expert in range(of_layer):
            tensors += _feed_forward(f"{prefix}.mlp.experts.{expert}", hidden, intermediate)
        tensors += _feed_forward(f"{prefix}.mlp.shared_experts", hidden, intermediate)
    tensors += [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]
    return Model(name, tensors, shards)


def squares(name: str, *, tensors: int, side: int, shards: int) -> Model:
    """This many tensors of side × side."""
    return Model(name, [(f"model.layers.{n // 1000}.{n % 1000}.weight", (side, side)) for n in range(tensors)], shards)


def _feed_forward(prefix: str, hidden: int, intermediate: int) -> Tensors:
    shapes = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return [(f"{prefix}.{part}.weight", shape) for part, shape in shapes.items()]


MODELS: Mapping[str, Callable[[], Model]] = {
    "8B": lambda: llama("8B", hidden=4096, layers=32, intermediate=14336, shards=4),
    "70B": lambda: llama("70B", hidden=8192, layers=80, intermediate=28672, shards=30),
    "1T": lambda: experts("1T", layers=61, of_layer=384, hidden=7168, intermediate=2048, shards=200),
    "1M tensors": lambda: squares("1M tensors", tensors=1_000_000, side=64, shards=200),
}


def build(run: Path, model: Model, *, checkpoints: int, filled: bool = False) -> Built:
    """Write a run, replacing one that was built there before.

    Args:
        run: its directory.
        model: the content of each checkpoint.
        checkpoints: their number.
        filled: with random numbers from 0.5 to 1, instead of holes.

    Raises:
        FileExistsError: the directory has other files.
        OSError: the file system does not allow files of that size.
    """
    if run.exists() and not (run / RECORD).exists():
        raise FileExistsError(f"{run} holds something that is not a sparse run. Name another directory.")
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (run / RECORD).touch()
    files = {name: _header(tensors) for name, tensors in _shards(model).items()}
    placed = {name: file for file, tensors in _shards(model).items() for name, _ in tensors}
    index = json.dumps({"metadata": {"total_size": model.nbytes}, "weight_map": placed})
    for number in range(checkpoints):
        step = number * _STEPS_BETWEEN
        directory = run / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "config.json").write_text('{"model_type": "llama"}')
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (directory / "model.safetensors.index.json").write_text(index)
        for name, (header, nbytes) in files.items():
            with (directory / name).open("wb") as file:
                file.write(header)
                for start in range(0, nbytes if filled else 0, _PIECE):
                    file.write(_numbers(min(_PIECE, nbytes - start)))
                file.truncate(len(header) + nbytes)
    sizes = [math.prod(shape) for _, shape in model.tensors]
    tiles, blocks = (sum(-(-size // unit) for size in sizes) for unit in (TILE, BLOCK))
    header_bytes = sum(len(header) for header, _ in files.values())
    return Built(model.name, checkpoints, len(files), len(sizes), tiles, blocks, model.nbytes, header_bytes)


def _numbers(nbytes: int) -> bytearray:
    """Random numbers from 0.5 to 1, as bfloat16."""
    numbers = bytearray(b"\x00\x3f" * (nbytes // ITEM))
    numbers[::ITEM] = os.urandom(nbytes // ITEM)
    return numbers


def _shards(model: Model) -> dict[str, Tensors]:
    """The tensors of each file of a checkpoint; the files are of about equal size."""
    most = model.nbytes / model.shards
    parts: list[Tensors] = [[] for _ in range(model.shards)]
    done = 0
    for name, shape in model.tensors:
        parts[min(int(done // most), model.shards - 1)].append((name, shape))
        done += ITEM * math.prod(shape)
    parts = [part for part in parts if part]
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, start=1)}


def _header(tensors: Tensors) -> tuple[bytes, int]:
    """The header of a file, and the number of bytes after it."""
    declared: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + ITEM * math.prod(shape)
        declared[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(declared, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument("run", type=Path, help="its directory")
    parser.add_argument("model", help=f"one of {', '.join(MODELS)}; or COUNTxSIDE, so many square tensors")
    parser.add_argument("--checkpoints", type=int, required=True)
    parser.add_argument("--filled", action="store_true", help="with random numbers instead of holes")
    arguments = parser.parse_args()
    name = arguments.model
    if name in MODELS:
        model = MODELS[name]()
    else:
        tensors, side = map(int, name.split("x"))
        model = squares(name, tensors=tensors, side=side, shards=1)
    print(json.dumps(asdict(build(arguments.run, model, checkpoints=arguments.checkpoints, filled=arguments.filled))))


if __name__ == "__main__":
    main()
