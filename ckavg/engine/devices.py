"""Stage *engine*: from the device a user names to one that is there, and to a tile and threads that suit it."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

import torch

from ckavg.engine.blocks import BLOCK, TILE
from ckavg.engine.cores import available_cores
from ckavg.errors import SettingError

if TYPE_CHECKING:
    from ckavg.engine.stream import Settings

_MOST_CORES = 16

_CPU_PER_BYTE = 0.30e-9, 0.15e-9
"""Seconds of one core for each byte that is read: once, and for each average. Measured on 2 cores, page cache warm."""

_GPU_START = 1.0
_GPU_PER_CORE = 6e9
_GPU_AT_MOST = 20e9
_GPU_FEEDERS = 8
"""A guess at a GPU: seconds until it is ready, then bytes a second that one core can feed it and that the bus carries,
and how many cores are enough to feed it. `make gpu-check` measures them."""

_GPU_IS_TRIED = False
"""Whether `make gpu-check` has been passed on a GPU, and the numbers above are measured ones."""

_GPU_BYTES = 4_000_000_000
_GPU_SHARE = 0.8
"""Most memory of a GPU that is taken, in bytes, and of what is free there."""

_TILES = 10
_TILES_OF_AVERAGE = 2
"""Tiles in float64 that a thread has on a GPU: what is under way, widened or rounded; and the states of an average."""


def resolve_device(device: str, *, nbytes: int = 0, averages: int = 1) -> str:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:N`.

    `auto` is a GPU where one is there, has room, and would be done sooner: what it saves on so many bytes must be more
    than the second that it takes to start. Where the CPU would be, no GPU is even looked for. As long as `make
    gpu-check` has not been passed on a GPU, `auto` is the CPU in any case: nobody gets what was never tried unasked.

    Args:
        device: as it was named.
        nbytes: bytes of checkpoints to be read in all passes.
        averages: how many averages are formed of them.

    Raises:
        SettingError: the name means nothing, or there is no such device here.
    """
    if device == "auto":
        sooner = _GPU_IS_TRIED and gpu_is_faster(nbytes, averages, available_cores()) and _gpu_has_room()
        return "cuda" if sooner else "cpu"
    if device == "cpu":
        return device
    named = re.fullmatch("cuda(?::([0-9]+))?", device)
    if named is None:
        raise SettingError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N.")
    number = int(named[1] or 0)
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        raise SettingError(f"device is {device!r}, but torch finds no such GPU here.", hint="Use --device cpu.")
    return device if named[1] is None else f"cuda:{number}"


def fitted(settings: Settings, *, averages: int = 1) -> Settings:
    """Settings with the threads and the tile that suit their device; for the CPU, as they are.

    Args:
        settings: device, and threads if a number was asked for.
        averages: how many averages are formed at once.

    Raises:
        SettingError: the device has too little memory free.
    """
    if settings.device == "cpu":
        return settings
    threads = settings.threads or min(available_cores(settings.ranks.local_world), _GPU_FEEDERS)
    free, _ = torch.cuda.mem_get_info(torch.device(settings.device))
    tile = gpu_tile(threads, averages, min(_GPU_BYTES, int(_GPU_SHARE * free)))
    if tile is None:
        raise SettingError(
            f"device is {settings.device!r}, but only {free / 1e9:.1f} GB of its memory are free.",
            hint="Wait until it is, or use --device cpu.",
        )
    return dataclasses.replace(settings, threads=threads, tile=tile)


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


def gpu_is_faster(nbytes: int, averages: int, cores: int) -> bool:
    """Whether a GPU would be done with a run sooner than the CPU, its start included.

    Args:
        nbytes: bytes of checkpoints to be read in all passes.
        averages: how many averages are formed of them.
        cores: how many cores read, and compute where there is no GPU.

    >>> [gpu_is_faster(nbytes, 1, 2) for nbytes in (0, 5_000_000_000, 10_000_000_000)]
    [False, False, True]
    >>> gpu_is_faster(100_000_000_000, 1, 16), gpu_is_faster(100_000_000_000, 8, 16)
    (False, True)
    """
    once, each = _CPU_PER_BYTE
    on_cpu = nbytes * (once + each * averages) / min(cores, _MOST_CORES)
    on_gpu = _GPU_START + nbytes / min(_GPU_PER_CORE * min(cores, _GPU_FEEDERS), _GPU_AT_MOST)
    return on_gpu < on_cpu


def _gpu_has_room() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        free, _ = torch.cuda.mem_get_info()
    except RuntimeError:  # it is there, but not for us
        return False
    return bool(_GPU_SHARE * free >= _GPU_BYTES)
