"""Where every byte of the result will lie. Pure: from the last checkpoint's shard cut to file offsets."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from ckavg.checkpoints.headers import KNOWN_HASHES
from ckavg.checkpoints.run import DTYPE_NAMES, ITEM_BYTES, Checkpoint, TensorInfo

_CODES = {name: code for code, name in DTYPE_NAMES.items()}
_ALIGNMENT = 8
_FLAT_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One safetensors file to write.

    Attributes:
        name: its path in the result.
        header: its first bytes, length prefix included.
        offsets: where each tensor begins in the file, in bytes.
        nbytes: its size.
        part: of the model; see `Shard`.
        metadata: what its header says besides the tensors.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int
    part: str
    metadata: Mapping[str, str]

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

    def of(self, part: str = "") -> list[ShardPlan]:
        """The files of a part."""
        return [shard for shard in self.shards if shard.part == part]

    def index_of(self, part: str = "") -> tuple[dict[str, str], int]:
        """What a shard index states of a part: the file of every tensor, and the bytes of all of them."""
        shards = self.of(part)
        placed = {name.removeprefix(part): PurePath(shard.name).name for shard in shards for name in shard.offsets}
        return dict(sorted(placed.items())), sum(shard.data_bytes for shard in shards)


def plan_weights(like: Checkpoint, dtype: str = "source", *, file_name: str = "") -> WeightPlan:
    """Lay out the result with the file names, the shard cut and the header entries of a checkpoint.

    Args:
        like: the last checkpoint.
        dtype: `source`, or the dtype for all floating tensors: `float32`, `bfloat16`, `float16` or `float64`.
        file_name: of the result, where the checkpoints are single files.
    """
    out = {
        name: entry.dtype if dtype == "source" or not entry.is_floating else _CODES[dtype]
        for name, entry in like.entries.items()
    }
    by_shard: list[dict[str, TensorInfo]] = [{} for _ in like.shards]
    for name, entry in like.entries.items():
        by_shard[entry.shard][name] = entry
    names = (file_name or _FLAT_NAME,) if like.kind == "file" else like.names
    shards = tuple(
        _plan_shard(name, entries, out, part=shard.part, metadata=shard.metadata)
        for name, entries, shard in zip(names, by_shard, like.shards, strict=True)
    )
    floating = {name: code for name, code in out.items() if like.entries[name].is_floating}
    return WeightPlan(shards, floating)


def encode_header(declared: Mapping[str, object]) -> bytes:
    """The first bytes of a safetensors file, from what its header declares, as the safetensors library writes them."""
    text = json.dumps(declared, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _plan_shard(
    file: str, entries: Mapping[str, TensorInfo], dtypes: Mapping[str, str], *, part: str, metadata: Mapping[str, str]
) -> ShardPlan:
    """Lay out one file; in it, tensors have their names without that of the part."""
    # Widest items first, as the safetensors library lays them out: every tensor is aligned to its item size.
    in_order = sorted(entries, key=lambda name: (-ITEM_BYTES[dtypes[name]], entries[name].offset, name))
    to_come = {key: "0" * digits for key, digits in KNOWN_HASHES.items() if key in metadata}
    metadata = {**metadata, **to_come} or {"format": "pt"}
    declared: dict[str, object] = {"__metadata__": metadata}
    starts: dict[str, int] = {}
    end = 0
    for name in in_order:
        starts[name], end = end, end + entries[name].numel * ITEM_BYTES[dtypes[name]]
        declared[name.removeprefix(part)] = {
            "dtype": dtypes[name],
            "shape": list(entries[name].shape),
            "data_offsets": [starts[name], end],
        }
    header = encode_header(declared)
    offsets = {name: len(header) + start for name, start in starts.items()}
    return ShardPlan(file, header, offsets, len(header) + end, part, metadata)
