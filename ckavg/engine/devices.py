"""Stage *engine*: resolve the device that a user names; choose threads and a tile for it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ckavg.engine.blocks import BLOCK, TILE
from ckavg.engine.distributed import available_cores
from ckavg.errors import SettingError

if TYPE_CHECKING:
    from ckavg.engine.context import Context


BUFFERS = 2
"""Tiles in flight per thread: one being read, and the one before it being copied."""

Mark = TypeVar("Mark")


class Streams(Protocol[Mark]):
    """Two queues of a device, one that copies and one that computes; a mark is a position in one of them."""

    def pinned(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 in pinned host memory, which the device reads directly."""

    def resident(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 in the device's memory; earlier work in the computing queue may still use it."""

    def mark(self) -> Mark:
        """The current end of the computing queue."""

    def wait(self, mark: Mark) -> None:
        """Wait until the device has reached a mark."""

    def send(self, source: Tensor, target: Tensor, *, after: Mark) -> Mark:
        """Queue a copy from the pinned `source` to `target` in the device's memory, after a mark."""

    def widen(self, source: Tensor, out: Tensor, *, after: Mark) -> Mark:
        """Queue the conversion of `source` into `out`, both in the device's memory, after a mark."""


@dataclass(slots=True)
class _Buffer(Generic[Mark]):
    """The buffers of one tile, pinned and on the device, and until when each is in use."""

    pinned: Tensor
    resident: Tensor
    sent: Mark
    widened: Mark


class Uploader(Generic[Mark]):
    """Carries tiles from files to a device; one for each thread.

    Args:
        streams: the device.
        buffers: how many tiles may be in flight at once.
    """

    def __init__(self, streams: Streams[Mark], *, buffers: int = BUFFERS) -> None:
        self._streams = streams
        self._buffers: list[_Buffer[Mark] | None] = [None] * buffers
        self._next = 0

    def upload(
        self, fill: Callable[[memoryview], None], nbytes: int, dtype: torch.dtype, out: Tensor, *, room: int
    ) -> None:
        """Read a tile and queue its widening into `out`; later work in the computing queue sees the values.

        Args:
            fill: reads the tile into a buffer.
            nbytes: size of the tile as stored.
            dtype: as stored.
            out: (n,) in the device's memory.
            room: the largest size of a tile of this dtype, in bytes.
        """
        place, self._next = self._next, (self._next + 1) % len(self._buffers)
        buffer = self._buffers[place]
        if buffer is not None:
            self._streams.wait(buffer.sent)
        if buffer is None or buffer.pinned.numel() < room:
            buffer = self._buffers[place] = self._new(room)
        fill(buffer.pinned[:nbytes].numpy().data)
        resident = buffer.resident[:nbytes]
        buffer.sent = self._streams.send(buffer.pinned[:nbytes], resident, after=buffer.widened)
        buffer.widened = self._streams.widen(resident.view(dtype), out, after=buffer.sent)

    def _new(self, nbytes: int) -> _Buffer[Mark]:
        pinned, resident = self._streams.pinned(nbytes), self._streams.resident(nbytes)
        free = self._streams.mark()
        return _Buffer(pinned, resident, free, free)


class CudaStreams:
    """Two CUDA streams. The computing one becomes the current stream of this thread.

    Args:
        device: `cuda` or `cuda:N`.
    """

    def __init__(self, device: str) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # memory cached by an earlier pass is usable only in its streams
        self._device = torch.device(device)
        self._copying = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._computing = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._computing)

    def pinned(self, nbytes: int) -> Tensor:
        """See `Streams`."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def resident(self, nbytes: int) -> Tensor:
        """See `Streams`: freed memory is reused by later work in the stream that allocated it."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def mark(self) -> torch.cuda.Event:
        """See `Streams`."""
        return _recorded(self._computing)

    def wait(self, mark: torch.cuda.Event) -> None:
        """See `Streams`; other threads keep running."""
        mark.synchronize()

    def send(self, source: Tensor, target: Tensor, *, after: torch.cuda.Event) -> torch.cuda.Event:
        """See `Streams`."""
        self._copying.wait_event(after)
        with torch.cuda.stream(self._copying):
            target.copy_(source, non_blocking=True)
        return _recorded(self._copying)

    def widen(self, source: Tensor, out: Tensor, *, after: torch.cuda.Event) -> torch.cuda.Event:
        """See `Streams`."""
        self._computing.wait_event(after)
        out.copy_(source)
        return _recorded(self._computing)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # Blocking: a thread that waits leaves its core to others.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


_GPU_FEEDERS = 8
"""Threads that feed a GPU; not measured yet."""

_GPU_BYTES = 4_000_000_000
_GPU_SHARE = 0.8
"""Largest memory to take on a GPU: in bytes, and as a fraction of what is free."""

_TILES = 10
_TILES_OF_AVERAGE = 2
"""Tiles in float64 per thread on a GPU: in flight, widened or rounded; and for the states of each average."""


def resolve_device(device: str) -> str:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:N`; `auto` is the CPU until GPUs have been measured.

    Raises:
        SettingError: the name is not valid, or there is no such device.
    """
    if device in ("auto", "cpu"):
        return "cpu"
    named = re.fullmatch("cuda(?::([0-9]+))?", device)
    if named is None:
        raise SettingError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N.")
    number = int(named[1] or 0)
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        raise SettingError(f"device is {device!r}, but torch finds no such GPU.", hint="Use --device cpu.")
    return device if named[1] is None else f"cuda:{number}"


def tuned(context: Context, *, averages: int = 1) -> Context:
    """The context with the resolved device, and threads and a tile for it.

    Args:
        context: the device as the user named it, and threads if a number was requested.
        averages: how many averages are formed at once.

    Raises:
        SettingError: there is no such device, or it has too little free memory.
    """
    context = dataclasses.replace(context, device=context.ranks.own_device(resolve_device(context.device)))
    if context.device == "cpu":
        return context
    threads = context.threads or min(available_cores(context.ranks.local_world), _GPU_FEEDERS)
    free, _ = torch.cuda.mem_get_info(torch.device(context.device))
    tile = gpu_tile(threads, averages, min(_GPU_BYTES, int(_GPU_SHARE * free)))
    if tile is None:
        raise SettingError(
            f"device is {context.device!r}, but only {free / 1e9:.1f} GB of its memory are free.",
            hint="Wait until more is free, or use --device cpu.",
        )
    return dataclasses.replace(context, threads=threads, tile=tile)


def gpu_tile(threads: int, averages: int, nbytes: int) -> int | None:
    """The largest tile with which all threads together fit into `nbytes` of a GPU; None if none does.

    Args:
        threads: how many threads work at the same time.
        averages: how many averages each forms at once.
        nbytes: available memory.

    >>> gpu_tile(8, 1, 4_000_000_000), gpu_tile(8, 8, 4_000_000_000), gpu_tile(8, 1, 100_000_000)
    (4194304, 2097152, None)
    """
    tile = BLOCK
    while threads * (_TILES + _TILES_OF_AVERAGE * averages) * tile * 8 > nbytes:
        if tile == TILE:
            return None
        tile //= 2
    return tile
