"""Stage *engine*: checksums of the weights, taken from the bytes as they are read.

A tensor is cut into chunks of 16,384 elements. The bytes of a chunk are added up as little-endian words of 64 bits,
modulo 2⁶⁴ and filled with zeros at the end; the sums of each block of 256 chunks are hashed, and the hashes of all
blocks of a checkpoint are hashed again. Any change of one byte changes it, and so does a change of place between
chunks. A cryptographic hash of every byte would cost more than all the arithmetic of both passes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch

from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.blocks import BLOCK, CHUNK, Block

_WORD = 8


class BlockSums:
    """The chunk sums of one block after another, of each of some checkpoints; for one thread.

    Args:
        checkpoints: how many are read.
    """

    def __init__(self, checkpoints: int) -> None:
        self._sums = torch.zeros(checkpoints, BLOCK // CHUNK, dtype=torch.int64)
        self._block = Block("", 0, 0)

    def begin(self, block: Block) -> None:
        """Say which block the bytes are of from now on; all of them come before the next one begins."""
        self._block = block

    def take(self, index: int, start: int, item_bytes: int, data: memoryview) -> None:
        """Take bytes of checkpoint `index`.

        Args:
            index: of those that are read.
            start: which element of the tensor they begin with: the first of a chunk.
            item_bytes: bytes of an element.
            data: the bytes, of whole chunks but for the last one of a tensor.
        """
        width = CHUNK * item_bytes
        first = (start - self._block.start) // CHUNK
        chunks, rest = divmod(len(data), width)
        sums = self._sums[index]
        if chunks:
            words = torch.frombuffer(data, dtype=torch.int64, count=chunks * width // _WORD)
            torch.sum(words.view(chunks, -1), 1, out=sums[first : first + chunks])
        if rest:
            tail = bytearray(width)
            tail[:rest] = data[chunks * width :]
            sums[first + chunks] = torch.frombuffer(tail, dtype=torch.int64).sum()

    def hashes(self) -> tuple[str, ...]:
        """The hash of the block's chunk sums, of each checkpoint."""
        chunks = -(-(self._block.stop - self._block.start) // CHUNK)
        return tuple(hashlib.sha256(row[:chunks].numpy().astype("<i8")).hexdigest()[:32] for row in self._sums)


def checksums(
    checkpoints: Sequence[Checkpoint], blocks: Sequence[Block], hashes: Sequence[tuple[str, ...]]
) -> tuple[str, ...]:
    """The checksum of each checkpoint, over the tensors that were cut into blocks.

    Args:
        checkpoints: what was read.
        blocks: all blocks, in any order.
        digests: of every block, in the order of `blocks`: the hash for each checkpoint.
    """
    return tuple(
        _checksum(checkpoint, {block: of_block[index] for block, of_block in zip(blocks, hashes, strict=True)})
        for index, checkpoint in enumerate(checkpoints)
    )


def _checksum(checkpoint: Checkpoint, hashes: Mapping[Block, str]) -> str:
    whole = hashlib.sha256()
    for block in sorted(hashes, key=lambda each: (each.name, each.start)):
        entry = checkpoint.entries[block.name]
        whole.update(json.dumps([block.name, entry.dtype, entry.shape, block.start, hashes[block]]).encode())
    return whole.hexdigest()
