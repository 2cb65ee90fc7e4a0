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
        name: its path in the result: a file name, in a pipeline below the folder of its component.
        header: its first bytes, length prefix included.
        offsets: where each tensor begins in the file, in bytes.
        nbytes: its size.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int

    @property
    def data_bytes(self) -> int:
        """Bytes of its tensors."""
        return self.nbytes - len(self.header)


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """All weight files of a result.

    Attributes:
        shards: the files, in the order of the last checkpoint's.
        dtypes: output dtype of every floating tensor, as a safetensors code.
    """

    shards: tuple[ShardPlan, ...]
    dtypes: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.nbytes for shard in self.shards)

    def of(self, component: str = "") -> list[ShardPlan]:
        """The files of a component; of anything but a pipeline, all of them."""
        return [shard for shard in self.shards if shard.name.rpartition("/")[0] == component]

    def index_of(self, component: str = "") -> tuple[dict[str, str], int]:
        """What a shard index states of a component: the file of every tensor, and the bytes of all of them."""
        prefix = f"{component}/" if component else ""
        shards = self.of(component)
        placed = {
            name.removeprefix(prefix): shard.name.removeprefix(prefix) for shard in shards for name in shard.offsets
        }
        return dict(sorted(placed.items())), sum(shard.data_bytes for shard in shards)


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
    names = (_FLAT_NAME,) if like.kind == "file" else like.names
    shards = tuple(
        _plan_shard(name, entries, out, prefix=f"{name.rpartition('/')[0]}/" if like.kind == "pipeline" else "")
        for name, entries in zip(names, by_shard, strict=True)
    )
    floating = {name: code for name, code in out.items() if like.entries[name].is_floating}
    return WeightPlan(shards, floating)


def _plan_shard(file: str, entries: Mapping[str, Entry], dtypes: Mapping[str, str], *, prefix: str) -> ShardPlan:
    """Lay out one file; in it, tensors have their names without the prefix, which is that of the component."""
    # Widest items first, as the safetensors library lays them out: every tensor is aligned to its item size.
    in_order = sorted(entries, key=lambda name: (-ITEM_BYTES[dtypes[name]], entries[name].offset, name))
    declared: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in in_order:
        starts[name], end = end, end + entries[name].numel * ITEM_BYTES[dtypes[name]]
        declared[name.removeprefix(prefix)] = {
            "dtype": dtypes[name],
            "shape": list(entries[name].shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(declared, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return ShardPlan(file, header, {name: len(header) + start for name, start in starts.items()}, len(header) + end)
