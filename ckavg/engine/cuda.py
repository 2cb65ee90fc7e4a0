"""Stage *engine*: bytes on their way to a GPU while it computes on those before them.

A tile is read into one of a few pinned buffers in rotation, copied as it is stored on a stream of its own, and widened
on the stream of the arithmetic. The thread that reads waits only for a buffer whose last copy is not done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

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
        """As of `Streams`."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def resident(self, nbytes: int) -> Tensor:
        """As of `Streams`: memory that is freed goes to what is asked next of the stream it was taken in."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def mark(self) -> torch.cuda.Event:
        """As of `Streams`."""
        return _recorded(self._computing)

    def wait(self, mark: torch.cuda.Event) -> None:
        """As of `Streams`; other threads go on meanwhile."""
        mark.synchronize()

    def send(self, source: Tensor, target: Tensor, *, after: torch.cuda.Event) -> torch.cuda.Event:
        """As of `Streams`."""
        self._copying.wait_event(after)
        with torch.cuda.stream(self._copying):
            target.copy_(source, non_blocking=True)
        return _recorded(self._copying)

    def widen(self, source: Tensor, out: Tensor, *, after: torch.cuda.Event) -> torch.cuda.Event:
        """As of `Streams`."""
        self._computing.wait_event(after)
        out.copy_(source)
        return _recorded(self._computing)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # Blocking: who waits for it leaves the core to others.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
