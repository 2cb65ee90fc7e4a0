"""Stage *engine*: from the device a user names to one that is there, and to a tile and threads that suit it."""

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
"""How many tiles a thread may have under way: the one that is being read, and the one before it, being copied."""

Mark = TypeVar("Mark")


class Streams(Protocol[Mark]):
    """Two queues of work for a device, one that copies and one that computes; a mark is a place in one of them."""

    def pinned(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 in this machine's memory, from where the device copies by itself."""

    def resident(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 in the device's memory; it may still be in use by what was asked before of computing."""

    def mark(self) -> Mark:
        """The end of what has been asked of computing so far."""

    def wait(self, mark: Mark) -> None:
        """Return when the device has got that far."""

    def send(self, source: Tensor, target: Tensor, *, after: Mark) -> Mark:
        """Ask copying to fill `target`, in the device's memory, from the pinned `source`; not before a mark."""

    def widen(self, source: Tensor, out: Tensor, *, after: Mark) -> Mark:
        """Ask computing to convert `source` into `out`, both in the device's memory; not before a mark."""


@dataclass(slots=True)
class _Buffer(Generic[Mark]):
    """The way of one tile: pinned memory, the same of the device, and until when each is taken."""

    pinned: Tensor
    resident: Tensor
    sent: Mark
    widened: Mark


class Uploader(Generic[Mark]):
    """Carries tiles from files to a device; one for each thread.

    Args:
        streams: the device.
        buffers: how many tiles may be under way at once.
    """

    def __init__(self, streams: Streams[Mark], *, buffers: int = BUFFERS) -> None:
        self._streams = streams
        self._buffers: list[_Buffer[Mark] | None] = [None] * buffers
        self._next = 0

    def upload(
        self, fill: Callable[[memoryview], None], nbytes: int, dtype: torch.dtype, out: Tensor, *, room: int
    ) -> None:
        """Read a tile and have it widened into `out`, for whatever is asked of computing after this.

        Args:
            fill: reads the tile into the memory it is given.
            nbytes: size of the tile as it is stored.
            dtype: in which it is stored.
            out: (n,) in the device's memory.
            room: the most bytes that any tile of this dtype has.
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
    """Two CUDA streams. That of the arithmetic becomes the current stream of the thread that makes this.

    Args:
        device: `cuda` or `cuda:N`.
    """

    def __init__(self, device: str) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # what an earlier pass has left can be used by its own streams alone
        self._device = torch.device(device)
        self._copying = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._computing = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._computing)

    def pinned(self, nbytes: int) -> Tensor:
        """See `Streams`."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def resident(self, nbytes: int) -> Tensor:
        """See `Streams`: memory that is freed goes to what is asked next of the stream it was taken in."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def mark(self) -> torch.cuda.Event:
        """See `Streams`."""
        return _recorded(self._computing)

    def wait(self, mark: torch.cuda.Event) -> None:
        """See `Streams`; other threads go on meanwhile."""
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
    # Blocking: who waits for it leaves the core to others.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


_GPU_FEEDERS = 8
"""Threads that are enough to feed a GPU; not measured yet."""

_GPU_BYTES = 4_000_000_000
_GPU_SHARE = 0.8
"""Most memory of a GPU that is taken, in bytes, and of what is free there."""

_TILES = 10
_TILES_OF_AVERAGE = 2
"""Tiles in float64 that a thread has on a GPU: what is under way, widened or rounded; and the states of an average."""


def resolve_device(device: str) -> str:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:N`; `auto` is the CPU until GPUs have been measured.

    Raises:
        SettingError: the name means nothing, or there is no such device here.
    """
    if device in ("auto", "cpu"):
        return "cpu"
    named = re.fullmatch("cuda(?::([0-9]+))?", device)
    if named is None:
        raise SettingError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N.")
    number = int(named[1] or 0)
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        raise SettingError(f"device is {device!r}, but torch finds no such GPU here.", hint="Use --device cpu.")
    return device if named[1] is None else f"cuda:{number}"


def tuned(context: Context, *, averages: int = 1) -> Context:
    """The context with the device of this process, and the threads and the tile that suit it.

    Args:
        context: the device as the user named it, and threads if a number was asked for.
        averages: how many averages are formed at once.

    Raises:
        SettingError: there is no such device, or it has too little memory free.
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
            hint="Wait until it is, or use --device cpu.",
        )
    return dataclasses.replace(context, threads=threads, tile=tile)


def gpu_tile(threads: int, averages: int, nbytes: int) -> int | None:
    """The largest tile with which all threads together take no more than some bytes of a GPU; None if none is.

    Args:
        threads: how many threads work at the same time.
        averages: how many averages each forms at once.
        nbytes: memory that may be taken.

    >>> gpu_tile(8, 1, 4_000_000_000), gpu_tile(8, 8, 4_000_000_000), gpu_tile(8, 1, 100_000_000)
    (4194304, 2097152, None)
    """
    tile = BLOCK
    while threads * (_TILES + _TILES_OF_AVERAGE * averages) * tile * 8 > nbytes:
        if tile == TILE:
            return None
        tile //= 2
    return tile
