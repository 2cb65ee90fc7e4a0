"""Pass 1 over a group of small tensors: the sums of `sums.py` by chunk, of all of them at once.

A chunk is padded with zeros to as few rows and columns as possible. Zeros add nothing, and torch adds the rest in the
same order, so every sum equals that of the plain path to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ckavg.engine.blocks import CHUNK, COLUMNS
from ckavg.engine.coalescing import MOST_ELEMENTS, Group
from ckavg.engine.tiles import TileReader
from ckavg.path.plan import Visit
from ckavg.path.sums import is_extreme


class GroupDistances:
    """Sums of one group after another, in one thread.

    Args:
        reader: of the checkpoints that are visited.
        visits: what is done at each of them.
    """

    def __init__(self, reader: TileReader, visits: Sequence[Visit]) -> None:
        self._reader = reader
        self._visits = visits
        self._memory: dict[torch.dtype, list[Tensor]] = {}

    def sum(self, group: Group, chunk: int, dtype: torch.dtype) -> Tensor | None:
        """The distance of each pair, and the moments of each anchor, by chunk.

        Args:
            group: the tensors, padded.
            chunk: elements that each chunk takes.
            dtype: in which differences are taken, float32 or float64.

        Returns:
            (pairs + 4 · anchors + 4, chunks) float64, as of a tile in `measure.py`. None where not all is finite, or
            squares may be too large or too small for float64: then the plain path takes care.
        """
        shape = -1, max(1, chunk // COLUMNS), min(chunk, COLUMNS)
        free = [tile[: group.size] for tile in self._memory.setdefault(dtype, [])]
        out, wide = self._take(free, group, dtype), torch.empty(group.size // chunk, shape[2], dtype=torch.float64)
        none = torch.zeros(group.size // chunk, dtype=torch.float64)
        held: dict[int, Tensor] = {}
        distances, moments = [], []
        for visit in self._visits:
            tile = self._take(free, group, dtype)
            self._reader.load_group(visit.place, group, tile)
            if visit.is_anchor:
                found = _moments(group, tile.view(shape))
                if found is None:
                    return None
                moments += [*found, none, none]
            for first, is_done in visit.pairs:
                moved = torch.sub(tile, held[first], out=out).abs_().view(shape)
                distances.append(wide.copy_(_over_rows(moved)).sum(dim=1))
                if is_done:
                    free.append(held.pop(first))
            if visit.is_held:
                held[visit.place] = tile
            else:
                free.append(tile)
        sums = torch.stack([*distances, *moments, none, none, none, none])
        return sums if bool(torch.isfinite(sums).all()) else None

    def _take(self, free: list[Tensor], group: Group, dtype: torch.dtype) -> Tensor:
        if not free:
            memory = torch.empty(MOST_ELEMENTS, dtype=dtype)
            self._memory[dtype].append(memory)
            free.append(memory[: group.size])
        return free.pop()


def _moments(group: Group, anchor: Tensor) -> tuple[Tensor, Tensor] | None:
    """(chunks,) Σ and Σ² of θ_0 less its first element; None where its spread is extreme."""
    chunks = torch.from_numpy(group.chunks)
    first = anchor[torch.from_numpy(group.first_chunks), 0, 0].double().repeat_interleave(chunks)
    shifted = anchor.to(torch.float64, copy=True).sub_(first[:, None, None])
    inner = torch.arange(len(first)) - torch.from_numpy(np.repeat(group.first_chunks, group.chunks))
    left = torch.from_numpy(group.sizes).repeat_interleave(chunks) - inner * CHUNK
    elements = torch.arange(anchor[0].numel()).view(anchor.shape[1:])
    shifted.masked_fill_(elements >= left[:, None, None], 0.0)
    if anchor.dtype == torch.float64 and is_extreme(shifted.abs().amax(dim=(1, 2))):
        return None
    return _over_rows(shifted).sum(dim=1), _over_rows(shifted.square_()).sum(dim=1)


def _over_rows(values: Tensor) -> Tensor:
    """(chunks, lanes) sums of (chunks, rows, lanes)."""
    return values[:, 0] if values.shape[1] == 1 else values.sum(dim=1)
