"""Stage *engine*: the threads that carry a pass over all blocks of a run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ckavg.engine.blocks import TILE, Block, check_tile
from ckavg.engine.files import Files
from ckavg.engine.progress import OnProgress, Pass, Progress
from ckavg.engine.tiles import TileReader
from ckavg.run.values import Checkpoint

Result = TypeVar("Result")
Unit = TypeVar("Unit", bound=Block)

_MOST_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a pass runs. Nothing here changes what it computes.

    Attributes:
        device: where the arithmetic happens, as torch names it.
        threads: how many threads read and compute, each on one core; None: one for each core.
        tile: elements computed at once: a power of two.
        on_progress: called in the caller's thread now and then.
    """

    device: str = "cpu"
    threads: int | None = None
    tile: int = TILE
    on_progress: OnProgress | None = None


@dataclass(frozen=True, slots=True)
class Streamed(Generic[Result]):
    """What the workers returned, in the order of the blocks, and how many bytes they read."""

    results: tuple[Result, ...]
    bytes_read: int


def stream(
    stage: Pass,
    checkpoints: Sequence[Checkpoint],
    blocks: Sequence[Unit],
    make_worker: Callable[[TileReader], Callable[[Unit], Result]],
    settings: Settings,
) -> Streamed[Result]:
    """Work on every block once.

    Args:
        stage: which pass this is, for whoever listens to its progress.
        checkpoints: what the workers read, all of them in every block.
        blocks: the work.
        make_worker: called once in each thread; what it returns is called with one block after another.
        settings: threads, tile and listener.

    Raises:
        Exception: whatever a worker raised first; the blocks not yet begun are dropped.
    """
    threads = settings.threads or _available_cores()
    tile = check_tile(settings.tile)
    own = threading.local()
    readers: list[TileReader] = []

    def work(block: Unit) -> Result:
        if not hasattr(own, "worker"):
            readers.append(TileReader(checkpoints, open_files.enter_context(Files(threads=threads)), tile=tile))
            own.reader, own.worker = readers[-1], make_worker(readers[-1])
        own.reader.begin(block)
        result: Result = own.worker(block)
        return result

    results: dict[int, Result] = {}
    with ExitStack() as open_files, _one_core_per_kernel():
        executor = ThreadPoolExecutor(threads, thread_name_prefix="ckavg")
        try:
            places = {executor.submit(work, block): place for place, block in enumerate(blocks)}
            report = _reporter(stage, checkpoints, blocks, settings.on_progress)
            for future in as_completed(places):
                results[places[future]] = future.result()
                report(blocks[places[future]])
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
        return Streamed(
            tuple(results[place] for place in range(len(blocks))), sum(reader.bytes_read for reader in readers)
        )


def _reporter(
    stage: Pass, checkpoints: Sequence[Checkpoint], blocks: Sequence[Block], on_progress: OnProgress | None
) -> Callable[[Block], None]:
    if on_progress is None:
        return lambda _: None
    listener = on_progress
    items = {block.name: sum(c.entries[block.name].item_bytes for c in checkpoints) for block in blocks}
    total = sum(items[block.name] * block.size for block in blocks)
    done = 0
    listener(Progress(stage, 0, total))

    def report(block: Block) -> None:
        nonlocal done
        done += items[block.name] * block.size
        listener(Progress(stage, done, total))

    return report


def _available_cores() -> int:
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    return max(1, min(cores, _MOST_THREADS))


@contextmanager
def _one_core_per_kernel() -> Iterator[None]:
    """The threads above are the parallelism; kernels that spawn their own would fight them for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
