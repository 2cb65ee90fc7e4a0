"""Stage *engine*: a tile of one tensor of one checkpoint, from its file to numbers ready for arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.blocks import CHUNK, Block
from ckavg.engine.checksums import BlockSums
from ckavg.engine.coalescing import Group, GroupSums
from ckavg.engine.devices import CudaStreams, Uploader
from ckavg.engine.reader import Files
from ckavg.errors import NonFiniteError
from ckavg.storage.download import Stopped

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating dtypes: safetensors code to torch dtype."""

_OTHER_DTYPES = {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64", "BOOL": "bool",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of any safetensors code."""
    found = TORCH_DTYPES.get(code) or getattr(torch, _OTHER_DTYPES[code])
    assert isinstance(found, torch.dtype)  # noqa: S101
    return found


class TileReader:
    """Reads tiles of the checkpoints of a run; one for each thread.

    Args:
        checkpoints: the run, ordered by step.
        files: this thread's open files.
        tile: most elements read at once.
        stopped: whether the pass is over, whatever is left of it.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        files: Files,
        *,
        tile: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._checkpoints = checkpoints
        self._files = files
        self._stopped = stopped
        self._sums: BlockSums | None = None
        self._tile = tile
        self._uploader: Uploader[torch.cuda.Event] | None = None
        self._raw = torch.empty(tile * 8, dtype=torch.uint8)
        self._bytes = self._raw.numpy().data
        self._on_miss: Callable[[], None] = lambda: None
        self._first: dict[tuple[str, int], float] = {}
        self._peeked = 0

    @property
    def bytes_read(self) -> int:
        """Bytes of tiles read so far."""
        return self._files.bytes_read - self._peeked

    def begin(self, on_miss: Callable[[], None]) -> None:
        """Say that a block begins; `on_miss` is called, once, with the first of its bytes that is not in memory."""
        self._on_miss = on_miss

    def sum_up(self, block: Block) -> BlockSums:
        """Take the checksums of a block, of which whole chunks are loaded from now on, of all checkpoints."""
        if self._sums is None:
            self._sums = BlockSums(len(self._checkpoints))
        self._sums.begin(block)
        return self._sums

    def compute_on(self, device: str) -> None:
        """Say where tiles are computed with, in the thread that does it, before anything is allocated there.

        On a GPU, the thread's work goes to a stream of its own from then on, and `load` returns before a tile is there:
        whatever is asked of that stream afterwards finds it in its place.
        """
        if torch.device(device).type != "cpu":
            self._uploader = Uploader(CudaStreams(device))

    def load(self, index: int, name: str, start: int, out: Tensor) -> None:
        """Read elements `start` onwards of a floating tensor of checkpoint `index`, widened into `out`.

        Args:
            index: which checkpoint.
            name: which tensor.
            start: first element, in row-major order.
            out: (n,) contiguous, float32 or float64, on any device; it is filled.

        Raises:
            TruncatedShardError, ReadError: the bytes are not there.
        """
        entry = self._checkpoints[index].entries[name]
        dtype, begin = TORCH_DTYPES[entry.dtype], start * entry.item_bytes
        if self._uploader is not None and out.device.type != "cpu":
            size, room = out.numel() * entry.item_bytes, self._tile * entry.item_bytes
            self._uploader.upload(partial(self._read, index, name, begin), size, dtype, out, room=room)
        elif out.dtype == dtype and out.device.type == "cpu":
            self._read(index, name, begin, out.view(torch.uint8).numpy().data)
        else:
            out.copy_(self.raw(index, name, begin, begin + out.numel() * entry.item_bytes).view(dtype))

    def locate(self, name: str) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
        """For code that reads by itself, until the next read: as of `Files.locate`.

        Raises:
            Stopped: the pass is over.
        """
        if self._stopped():
            raise Stopped
        return self._files.locate(self._checkpoints, name)

    def count(self, nbytes: int) -> None:
        """Say that so many bytes were read that way."""
        self._files.bytes_read += nbytes

    def gather(self, index: int, name: str, starts: Sequence[int], out: Tensor) -> None:
        """Read a strip of a floating tensor of checkpoint `index` from each of `starts`, widened into a row of `out`.

        Args:
            index, name: as of `load`.
            starts: first element of each strip, ascending.
            out: (strips, elements of a strip) contiguous, at most a tile in all; it is filled.

        Raises:
            TruncatedShardError, ReadError: the bytes are not there.
        """
        checkpoint = self._checkpoints[index]
        entry = checkpoint.entries[name]
        size = out.numel() * entry.item_bytes
        if entry.pieces:
            each = size // len(starts)
            for place, start in enumerate(starts):
                part = self._bytes[place * each : (place + 1) * each]
                self._files.read_elements(checkpoint, name, start, part, on_miss=self._missed)
        else:
            offsets = [entry.offset + start * entry.item_bytes for start in starts]
            path = checkpoint.shards[entry.shard].path
            self._files.read_each(path, offsets, self._bytes[:size], on_miss=self._missed)
        out.view(-1).copy_(self._raw[:size].view(TORCH_DTYPES[entry.dtype]))

    def load_group(self, index: int, group: Group, out: Tensor, sums: GroupSums | None = None) -> None:
        """Read all tensors of a group from checkpoint `index`, widened into `out`, zero between them.

        Args:
            index: which checkpoint.
            group: which tensors.
            out: (group.size,) contiguous, float32 or float64, in CPU memory; it is filled.
            sums: takes their checksums, where that is asked for.

        Raises:
            TruncatedShardError, ReadError: the bytes are not there.
        """
        dtype = TORCH_DTYPES[self._checkpoints[index].entries[group.blocks[0].name].dtype]
        memory = out.view(torch.uint8) if out.dtype == dtype else self._raw[: group.size * dtype.itemsize]
        self.raw_group(index, group, memory, sums)
        if out.dtype != dtype:
            out.copy_(memory.view(dtype))

    def raw_group(self, index: int, group: Group, memory: Tensor, sums: GroupSums | None = None) -> None:
        """Read all tensors of a group as stored into (group.size · bytes of an element,) uint8, zero between them."""
        checkpoint = self._checkpoints[index]
        for part in group.parts(checkpoint.entries, memory):
            if self._stopped():
                raise Stopped
            path = checkpoint.shards[part.shard].path
            self._files.read_scattered(path, part.offset, part.buffers, on_miss=self._missed)
        if sums is not None:
            sums.take(index, memory)

    def raw(self, index: int, name: str, start: int, stop: int) -> Tensor:
        """Read bytes `start` to `stop` of a tensor as stored: (n,) uint8, valid until the next read."""
        size = stop - start
        self._read(index, name, start, self._bytes[:size])
        return self._raw[:size]

    def _read(self, index: int, name: str, start: int, buffer: memoryview) -> None:
        if self._stopped():
            raise Stopped
        checkpoint = self._checkpoints[index]
        item = checkpoint.entries[name].item_bytes
        self._files.read_elements(checkpoint, name, start // item, buffer, on_miss=self._missed)
        if self._sums is not None:
            self._sums.take(index, start // item, item, buffer)

    def _missed(self) -> None:
        on_miss, self._on_miss = self._on_miss, lambda: None
        on_miss()

    def first_finite(self, name: str, index: int = 0) -> float:
        """The first finite element of a tensor in checkpoint `index`, or 0; read once while the tensor is the same.

        It is not counted in `bytes_read`: how many threads need it for the same tensor is chance.

        Raises:
            TruncatedShardError, ReadError: the bytes are not there.
        """
        if (name, index) not in self._first:
            before, numel = self._files.bytes_read, self._checkpoints[index].entries[name].numel
            found, start, stop = torch.empty(0), 0, 1
            while not len(found) and start < numel:
                values = torch.empty(stop - start, dtype=torch.float64)
                self.load(index, name, start, values)
                found = values[torch.isfinite(values)]
                start, stop = stop, min(stop - stop % CHUNK + CHUNK, numel)
            self._peeked += self._files.bytes_read - before
            self._first = {key: value for key, value in self._first.items() if key[0] == name}
            self._first[name, index] = float(found[0]) if len(found) else 0.0
        return self._first[name, index]

    def same_infinities(self, name: str, start: int, stop: int, indices: Sequence[int]) -> Tensor:
        """Elements `start` to `stop` of a tensor that are the same infinity in all checkpoints: (n,) float64, else 0.

        Args:
            name, start, stop: which elements.
            indices: of the checkpoints that count; at least one.
        """
        values, same = (torch.empty(stop - start, dtype=torch.float64) for _ in range(2))
        self.load(indices[0], name, start, same)
        same.masked_fill_(~torch.isinf(same), 0.0)
        for index in indices[1:]:
            if not bool(same.any()):
                break
            self.load(index, name, start, values)
            same.masked_fill_(values != same, 0.0)
        return same

    def refuse_nonfinite(self, name: str, start: int, stop: int, indices: Sequence[int]) -> None:
        """Raise if elements `start` to `stop` of a floating tensor are NaN or infinite in any of some checkpoints.

        The same infinity in all checkpoints is no reason: masks hold such.

        Raises:
            NonFiniteError: it names the tensor and the first such step.
        """
        same = self.same_infinities(name, start, stop, indices)
        values = torch.empty(stop - start, dtype=torch.float64)
        for index in indices:
            checkpoint = self._checkpoints[index]
            self.load(index, name, start, values)
            wrong = ~torch.isfinite(values) & (same == 0)
            if bool(wrong.any()):
                raise NonFiniteError(
                    f"step {checkpoint.step}: tensor {name!r} holds NaN or infinity "
                    f"({int(wrong.sum())} of elements {start} to {stop}) in {checkpoint.path}.",
                    hint="The run diverged or the file is damaged. "
                    f"Stop before it with --to-step {checkpoint.step - 1}.",
                )


def all_finite(values: Tensor) -> bool:
    """Whether none of the values is NaN or infinite."""
    # NaN and infinity survive a sum; a sum that overflows is looked at again. Sixty times faster than isfinite alone.
    total = values.sum(dtype=torch.float32) if values.dtype == torch.float16 else values.sum()
    return math.isfinite(total) or bool(torch.isfinite(values).all())
