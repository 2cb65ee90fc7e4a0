"""Where averages go in tests that need no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Kept:
    """A writer that keeps the bytes of a result in memory."""

    sizes: Mapping[str, int]
    tensors: dict[str, bytearray] = field(default_factory=dict)

    def put(self, name: str, offset: int, values: Tensor) -> None:
        kept = self.tensors.setdefault(name, bytearray(self.sizes[name]))
        kept[offset : offset + values.numel()] = values.numpy().tobytes()
