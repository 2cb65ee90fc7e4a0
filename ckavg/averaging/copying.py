"""Pass 2 over tensors that are not averaged: compared over all checkpoints, or copied byte for byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ckavg.checkpoints.run import Run, TensorInfo, not_constant
from ckavg.engine.blocks import Block, cut_blocks
from ckavg.engine.coalescing import Group, by_dtype
from ckavg.engine.context import Context
from ckavg.engine.distributed import PassJournal
from ckavg.engine.stream import stream_groups
from ckavg.engine.tiles import TileReader


class TensorWriter(Protocol):
    """Takes finished bytes; called from several threads. Each byte of a tensor comes once; of a small one, again where
    values are not finite.
    """

    def put(self, name: str, offset: int, values: Tensor) -> None:
        """Take the bytes of tensor `name` from byte `offset` on: (n,) uint8 in CPU memory, valid during the call."""


@runtime_checkable
class WholeTensorWriter(Protocol):
    """A `TensorWriter` that takes whole tensors together, too."""

    def put_whole(self, tensors: Mapping[str, memoryview]) -> None:
        """Take all bytes of some tensors, by name; valid during the call."""


def put_whole(writer: TensorWriter, group: Group, stored: Tensor) -> None:
    """Hand on the tensors of a group, of which these are the bytes."""
    tensors = {block.name: data for block, data in zip(group.blocks, group.slots(stored), strict=True)}
    if isinstance(writer, WholeTensorWriter):
        writer.put_whole(tensors)
        return
    for name, data in tensors.items():
        writer.put(name, 0, torch.frombuffer(data, dtype=torch.uint8))


def check_constant(
    run: Run,
    selections: Collection[tuple[int, ...]],
    context: Context,
    journal: PassJournal[None] | None = None,
) -> int:
    """Compare all bytes of the tensors that can only be copied; how many bytes were read.

    Args:
        run: the checkpoints.
        selections: indices of those that must hold the same, of each average.
        context: how the pass runs.
        journal: what is compared already.

    Raises:
        UnsupportedFormatError: one is not the same in all checkpoints of an average.
    """
    entries = {name: entry for name, entry in run.tensors.items() if entry.must_be_constant and not entry.kept}

    def compare_worker(reader: TileReader) -> Callable[[Sequence[Block]], Sequence[None]]:
        def compare(blocks: Sequence[Block]) -> Sequence[None]:
            if len(blocks) == 1 or not are_same(blocks):
                for block in blocks:
                    compare_block(block)
            return [None] * len(blocks)

        def are_same(blocks: Sequence[Block]) -> bool:
            group, item = Group(blocks), entries[blocks[0].name].item_bytes
            memory = torch.empty(group.size * item, dtype=torch.uint8)
            for last in {places[-1] for places in selections}:
                expected = torch.empty_like(memory)
                reader.raw_group(last, group, expected)
                for index in {index for places in selections if places[-1] == last for index in places[:-1]}:
                    reader.raw_group(index, group, memory)
                    if not torch.equal(memory, expected):
                        return False
            return True

        def compare_block(block: Block) -> None:
            item = entries[block.name].item_bytes
            for start, stop in block.tiles(context.tile):
                lasts = {
                    last: reader.raw(last, block.name, start * item, stop * item).clone()
                    for last in {places[-1] for places in selections}
                }
                for index, checkpoint in enumerate(run.checkpoints):
                    for last in {places[-1] for places in selections if index in places[:-1]}:
                        if not torch.equal(reader.raw(index, block.name, start * item, stop * item), lasts[last]):
                            raise not_constant(block.name, checkpoint, run.checkpoints[last])

        return compare

    quiet = dataclasses.replace(context, on_progress=None)
    blocks = cut_blocks(entries)
    if not blocks:
        return 0
    key = by_dtype(run.checkpoints)
    return stream_groups("replay", run.checkpoints, blocks, compare_worker, key, quiet, journal).bytes_read


def copy_tensors(
    run: Run,
    entries: Mapping[str, TensorInfo],
    writers: Mapping[int, Sequence[TensorWriter]],
    context: Context,
    journal: PassJournal[None],
) -> int:
    """Copy tensors byte for byte; how many bytes were read.

    Args:
        run: the checkpoints.
        entries: the tensors, by name.
        writers: take those of a checkpoint, by its index.
        context: how the pass runs.
        journal: what is copied already.

    Raises:
        CkavgError: as of `replay`.
    """
    written = sorted(writers)
    read = [run.checkpoints[index] for index in written]

    def make_worker(reader: TileReader) -> _Copier:
        return _Copier(reader, entries, [writers[index] for index in written], tile=context.tile)

    quiet = dataclasses.replace(context, on_progress=None)
    return stream_groups("replay", read, cut_blocks(entries), make_worker, by_dtype(read), quiet, journal).bytes_read


class _Copier:
    """Copies one block after another, in one thread: each checkpoint's to the writers of that checkpoint."""

    def __init__(
        self,
        reader: TileReader,
        entries: Mapping[str, TensorInfo],
        writers: Sequence[Sequence[TensorWriter]],
        *,
        tile: int,
    ) -> None:
        self._reader = reader
        self._entries = entries
        self._writers = writers
        self._tile = tile

    def __call__(self, blocks: Sequence[Block]) -> Sequence[None]:
        if len(blocks) == 1:
            self._copy_block(blocks[0])
        else:
            group = Group(blocks)
            memory = torch.empty(group.size * self._entries[blocks[0].name].item_bytes, dtype=torch.uint8)
            for index, writers in enumerate(self._writers):
                self._reader.raw_group(index, group, memory)
                for writer in writers:
                    put_whole(writer, group, memory)
        return [None] * len(blocks)

    def _copy_block(self, block: Block) -> None:
        item = self._entries[block.name].item_bytes
        for start, stop in block.tiles(self._tile):
            for index, writers in enumerate(self._writers):
                stored = self._reader.raw(index, block.name, start * item, stop * item)
                for writer in writers:
                    writer.put(block.name, start * item, stored)
