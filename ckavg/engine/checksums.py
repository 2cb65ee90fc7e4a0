"""Stage *engine*: checksums of the weights, taken from the bytes as they are read.

A tensor is cut into chunks of 16,384 elements. The bytes of a chunk are added up as little-endian words of 64 bits,
modulo 2⁶⁴ and filled with zeros at the end; the sums of each block of 256 chunks are hashed, and the hashes of all
blocks of a checkpoint are hashed again. Any change of one byte changes it, and so does a change of place between
chunks. A cryptographic hash of every byte would cost more than all the arithmetic of both passes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ckavg.checkpoints.run import Checkpoint, TensorInfo
from ckavg.engine.blocks import BLOCK, CHUNK, Block

WORD = 8
BYTES = 16
"""Of the hash of a block."""

_BLOCKS_AT_ONCE = 4096
_encoded = json.JSONEncoder().encode


class BlockSums:
    """The chunk sums of one block after another, of each of some checkpoints; for one thread.

    Args:
        checkpoints: how many are read.
    """

    def __init__(self, checkpoints: int) -> None:
        self._sums = np.zeros((checkpoints, BLOCK // CHUNK), dtype=np.int64)
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
            words = np.frombuffer(data, np.int64, chunks * width // WORD)
            np.add.reduce(words.reshape(chunks, -1), axis=1, out=sums[first : first + chunks])
        if rest:
            tail = bytearray(width)
            tail[:rest] = data[chunks * width :]
            sums[first + chunks] = np.add.reduce(np.frombuffer(tail, np.int64))

    def put(self, start: int, sums: NDArray[np.int64]) -> None:
        """Put the sums of whole chunks from element `start` on, formed elsewhere: (checkpoints, chunks)."""
        first = (start - self._block.start) // CHUNK
        self._sums[:, first : first + sums.shape[1]] = sums

    def hashes(self) -> bytes:
        """The hashes of the block's chunk sums, 16 bytes for each checkpoint."""
        chunks = -(-(self._block.stop - self._block.start) // CHUNK)
        rows = (row[:chunks].astype("<i8").tobytes() for row in self._sums)
        return b"".join(hashlib.sha256(row).digest()[:BYTES] for row in rows)


def checksums(checkpoints: Sequence[Checkpoint], blocks: Sequence[Block], hashes: Sequence[bytes]) -> tuple[str, ...]:
    """The checksum of each checkpoint, over the tensors that were cut into blocks.

    Args:
        checkpoints: what was read.
        blocks: all blocks, in any order.
        hashes: of every block, in the order of `blocks`.
    """
    whole = [hashlib.sha256() for _ in checkpoints]
    in_order = sorted(range(len(blocks)), key=lambda place: blocks[place].start)
    in_order.sort(key=lambda place: blocks[place].name)
    for first in range(0, len(in_order), _BLOCKS_AT_ONCE):
        some = [(blocks[place], hashes[place]) for place in in_order[first : first + _BLOCKS_AT_ONCE]]
        stated, begins = None, [""]
        for index, (checkpoint, sha256) in enumerate(zip(checkpoints, whole, strict=True)):
            if checkpoint.entries is not stated:
                stated = checkpoint.entries
                begins = [_begin(block, stated[block.name]) for block, _ in some]
            start, end = BYTES * index, BYTES * (index + 1)
            lines = [f'{begin}, "{each[start:end].hex()}"]' for begin, (_, each) in zip(begins, some, strict=True)]
            sha256.update("".join(lines).encode())
    return tuple(each.hexdigest() for each in whole)


def _begin(block: Block, entry: TensorInfo) -> str:
    """What is hashed of a block before its own hash: the beginning of a JSON list."""
    return f'[{_encoded(block.name)}, "{entry.dtype}", {list(entry.shape)}, {block.start}'
