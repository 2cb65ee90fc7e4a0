"""Stage *plan*: where every byte of the result will lie. Pure: from the last checkpoint's shard cut to file offsets."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from ckavg.run.values import DTYPE_NAMES, ITEM_BYTES, Checkpoint, Entry

_CODES = {name: code for code, name in DTYPE_NAMES.items()}
_ALIGNMENT = 8
_FLAT_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One safetensors file to write.

    Attributes:
        name: its file name.
        header: its first bytes, length prefix included.
        offsets: where each tensor begins in the file, in bytes.
        nbytes: its size.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """All weight files of a result.

    Attributes:
        shards: the files, in the order of the last checkpoint's.
        dtypes: output dtype of every floating tensor, as a safetensors code.
        total_size: bytes of tensor data, as a shard index states it.
    """

    shards: tuple[ShardPlan, ...]
    dtypes: Mapping[str, str]
    total_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def placed(self) -> Mapping[str, str]:
        """File name of every tensor, as a shard index states it."""
        return {name: shard.name for shard in self.shards for name in shard.offsets}


def plan_weights(like: Checkpoint, dtype: str = "source") -> WeightPlan:
    """Lay out the result with the file names and the shard cut of a checkpoint.

    Args:
        like: the last checkpoint. A flat file becomes `model.safetensors`, the name that loaders look for.
        dtype: `source`, or the dtype for all floating tensors: `float32`, `bfloat16`, `float16` or `float64`.
    """
    out = {
        name: entry.dtype if dtype == "source" or not entry.is_floating else _CODES[dtype]
        for name, entry in like.entries.items()
    }
    by_shard: list[dict[str, Entry]] = [{} for _ in like.shards]
    for name, entry in like.entries.items():
        by_shard[entry.shard][name] = entry
    names = [_FLAT_NAME] if like.kind == "file" else [shard.path.name for shard in like.shards]
    shards = tuple(_plan_shard(name, entries, out) for name, entries in zip(names, by_shard, strict=True))
    floating = {name: code for name, code in out.items() if like.entries[name].is_floating}
    total = sum(entry.numel * ITEM_BYTES[out[name]] for name, entry in like.entries.items())
    return WeightPlan(shards, floating, total)


def _plan_shard(file: str, entries: Mapping[str, Entry], dtypes: Mapping[str, str]) -> ShardPlan:
    # Widest items first, as the safetensors library lays them out: every tensor is aligned to its item size.
    in_order = sorted(entries, key=lambda name: (-ITEM_BYTES[dtypes[name]], entries[name].offset, name))
    declared: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in in_order:
        starts[name], end = end, end + entries[name].numel * ITEM_BYTES[dtypes[name]]
        declared[name] = {
            "dtype": dtypes[name],
            "shape": list(entries[name].shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(declared, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return ShardPlan(file, header, {name: len(header) + start for name, start in starts.items()}, len(header) + end)
