"""Stage *engine*: the threads that carry a pass over all blocks of a run."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ckavg.engine.ahead import Ahead, announcer
from ckavg.engine.blocks import TILE, Block, check_tile, sizes_of
from ckavg.engine.devices import available_cores
from ckavg.engine.files import Files
from ckavg.engine.progress import OnProgress, Pass, Progress
from ckavg.engine.ranks import ALONE, Ranks
from ckavg.engine.shares import OfAll, own_share
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
        ranks: the processes that share the work.
        compiled_from_bytes: how much a pass must read for a compiled kernel to be worth loading, where there is one.
    """

    device: str = "cpu"
    threads: int | None = None
    tile: int = TILE
    on_progress: OnProgress | None = None
    ranks: Ranks = ALONE
    compiled_from_bytes: int = 16 << 30


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
    """Work on every block once, and return what came of all of them in every process.

    Args:
        stage: which pass this is, for whoever listens to its progress.
        checkpoints: what the workers read, all of them in every block.
        blocks: the work.
        make_worker: called once in each thread; what it returns is called with one block after another.
        settings: threads, tile, listener and processes.

    Raises:
        Exception: whatever a worker raised first; the blocks not yet begun are dropped.
    """
    ranks = settings.ranks
    if ranks.world == 1:
        return _stream_own(stage, checkpoints, blocks, make_worker, settings)
    own = own_share(checkpoints, blocks, ranks)
    listener = OfAll(stage, checkpoints, blocks, settings.on_progress)
    of_own = dataclasses.replace(settings, on_progress=listener.of_own)
    part = _stream_own(stage, checkpoints, [blocks[place] for place in own], make_worker, of_own)
    parts = ranks.gather((own, part))
    listener.end()
    results = {place: result for places, each in parts for place, result in zip(places, each.results, strict=True)}
    in_order = tuple(results[place] for place in range(len(blocks)))
    return Streamed(in_order, sum(each.bytes_read for _, each in parts))


def by_tensor(blocks: Sequence[Block], results: Sequence[Result]) -> dict[str, list[Result]]:
    """What came of each block, by the name of its tensor and in order."""
    grouped: dict[str, list[Result]] = {}
    for block, result in zip(blocks, results, strict=True):
        grouped.setdefault(block.name, []).append(result)
    return grouped


def _stream_own(
    stage: Pass,
    checkpoints: Sequence[Checkpoint],
    blocks: Sequence[Unit],
    make_worker: Callable[[TileReader], Callable[[Unit], Result]],
    settings: Settings,
) -> Streamed[Result]:
    """Work on every block once in this process alone; arguments and errors as of `stream`."""
    threads = settings.threads or min(available_cores(settings.ranks.local_world), _MOST_THREADS)
    tile = check_tile(settings.tile)
    own = threading.local()
    readers: list[TileReader] = []

    def work(place: int, block: Unit) -> Result:
        settings.ranks.check()
        if not hasattr(own, "worker"):
            readers.append(TileReader(checkpoints, open_files.enter_context(Files(threads=threads + 1)), tile=tile))
            own.reader, own.worker = readers[-1], make_worker(readers[-1])
        reader: TileReader = own.reader
        reader.begin(lambda: ahead.miss(place))
        ahead.begin(place)
        result: Result = own.worker(block)
        return result

    results: dict[int, Result] = {}
    with ExitStack() as open_files, _one_core_per_kernel():
        announce = announcer(checkpoints, open_files.enter_context(Files(threads=threads + 1)))
        ahead = open_files.enter_context(Ahead(checkpoints, blocks, announce))
        executor = ThreadPoolExecutor(threads, thread_name_prefix="ckavg")
        try:
            places = {executor.submit(work, place, block): place for place, block in enumerate(blocks)}
            report = _reporter(stage, checkpoints, blocks, settings.on_progress)
            for future in as_completed(places):
                results[places[future]] = future.result()
                report(places[future])
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
        return Streamed(
            tuple(results[place] for place in range(len(blocks))), sum(reader.bytes_read for reader in readers)
        )


def _reporter(
    stage: Pass, checkpoints: Sequence[Checkpoint], blocks: Sequence[Block], on_progress: OnProgress | None
) -> Callable[[int], None]:
    if on_progress is None:
        return lambda _: None
    listener = on_progress
    sizes = sizes_of(checkpoints, blocks)
    total = sum(sizes)
    done = 0
    listener(Progress(stage, 0, total))

    def report(place: int) -> None:
        nonlocal done
        done += sizes[place]
        listener(Progress(stage, done, total))

    return report


@contextmanager
def _one_core_per_kernel() -> Iterator[None]:
    """The threads above are the parallelism; kernels that spawn their own would fight them for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
