"""Stage *engine*: the threads that carry a pass over all blocks of a run."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar, cast

import torch

from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.blocks import TILE, Block, check_tile, sizes_of
from ckavg.engine.coalescing import SMALL, Key, alone, cut_groups
from ckavg.engine.context import Context, OnProgress, Pass, Progress
from ckavg.engine.distributed import PassJournal, Ranks, worker_threads
from ckavg.engine.job import SECONDS_BETWEEN_LOOKS
from ckavg.engine.prefetch import Prefetch, announcer
from ckavg.engine.reader import Files
from ckavg.engine.remote import RemoteReader, far_files
from ckavg.engine.tiles import TileReader

Result = TypeVar("Result")
Unit = TypeVar("Unit", bound=Block)

SECONDS_BETWEEN_NOTES = 2.0
"""How much work may be lost to a crash. A note waits for the disk, in a thread that has nothing else to do."""


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
    context: Context,
    journal: PassJournal[Result] | None = None,
) -> Streamed[Result]:
    """Work on every block once, and return what came of all of them in every process.

    Args:
        stage: which pass this is, for whoever listens to its progress.
        checkpoints: what the workers read, all of them in every block.
        blocks: the work.
        make_worker: called once in each thread; what it returns is called with one block after another.
        context: threads, tile, listener and processes.
        journal: what is done already; where several processes share the work, what comes of it goes through it.

    Raises:
        Exception: whatever a worker raised first; the blocks not yet begun are dropped.
        MissingPartsError: other parts of the work are missing, and this process does not wait for them.
    """

    def make_single(reader: TileReader) -> Callable[[Sequence[Unit]], Sequence[Result]]:
        worker = make_worker(reader)
        return lambda group: [worker(block) for block in group]

    return stream_groups(stage, checkpoints, blocks, make_single, alone, context, journal)


def stream_groups(
    stage: Pass,
    checkpoints: Sequence[Checkpoint],
    blocks: Sequence[Unit],
    make_worker: Callable[[TileReader], Callable[[Sequence[Unit]], Sequence[Result]]],
    key: Key,
    context: Context,
    journal: PassJournal[Result] | None = None,
) -> Streamed[Result]:
    """As `stream`, with workers that are called with one group of blocks after another: small tensors with the same
    key, or a block alone; they return what came of each block.
    """
    if context.device != "cpu" or far_files(checkpoints):
        key = alone
    journal = journal or PassJournal({}, (), lambda _: None)
    work = _Work(stage, checkpoints, blocks, sizes_of(checkpoints, blocks), key, journal)
    places = range(len(blocks))
    left = [place for place in places if place not in journal.done] if journal.done else places
    if context.ranks.is_shared:
        return _stream_share(work, left, make_worker, context)
    work = dataclasses.replace(work, kept_bytes=sum(work.sizes) - sum(work.sizes[place] for place in left))
    results, nbytes = _stream_own(work, left, make_worker, context)
    if journal.found:
        by_place = {**journal.found, **dict(zip(left, results, strict=True))}
        results = [by_place[place] for place in places]
    return Streamed(tuple(results), nbytes)


def _stream_share(
    work: _Work[Unit, Result],
    left: Sequence[int],
    make_worker: Callable[[TileReader], Callable[[Sequence[Unit]], Sequence[Result]]],
    context: Context,
) -> Streamed[Result]:
    """Work on the share of this process, and wait for those of the others; errors as of `stream`."""
    ranks, blocks, sizes, places = context.ranks, work.blocks, work.sizes, range(len(work.blocks))
    # A part's share is the same whatever the others have done, a job's of what is left at its beginning.
    dealt = left if ranks.mode == "job" else places
    owners = dict(zip(dealt, _deal(work, dealt, ranks), strict=True))
    own = [place for place in left if owners[place] == ranks.rank and ranks.mode != "join"]
    listener = None
    if ranks.mode == "job":
        to_do = [blocks[place] for place in left]
        kept = sum(sizes) - sum(sizes[place] for place in left)
        listener = GlobalProgress(work.stage, work.checkpoints, to_do, context.on_progress, kept=kept)
        context = dataclasses.replace(context, on_progress=listener.on_own_progress)
    results = dict(work.journal.found)
    if own:
        results |= zip(own, _stream_own(work, own, make_worker, context)[0], strict=True)

    def late() -> set[int]:
        results.update(work.journal.read())
        return {owners.get(place, 0) for place in places if place not in results}

    ranks.wait(late, f"pass {1 if work.stage == 'path' else 2}")
    if listener is not None:
        listener.end()
    nbytes = sum(sizes[place] for place in dealt)
    return Streamed(tuple(results[place] for place in places), nbytes)


def is_worth_compiling(checkpoints: Sequence[Checkpoint], blocks: Sequence[Block], context: Context) -> bool:
    """Whether compiled code would compute with enough bytes. Small tensors are joined instead."""
    large = [block for block in blocks if block.stop > SMALL]
    return context.device == "cpu" and sum(sizes_of(checkpoints, large)) >= context.compiled_from_bytes


def by_tensor(blocks: Sequence[Block], results: Sequence[Result]) -> dict[str, list[Result]]:
    """What came of each block, by the name of its tensor and in order."""
    grouped: dict[str, list[Result]] = {}
    for block, result in zip(blocks, results, strict=True):
        grouped.setdefault(block.name, []).append(result)
    return grouped


@dataclass(frozen=True, slots=True)
class _Work(Generic[Unit, Result]):
    """A pass: what is read, all of the blocks and their bytes, which of them are worked on together, what was done of
    them before, and how many bytes that saves.
    """

    stage: Pass
    checkpoints: Sequence[Checkpoint]
    blocks: Sequence[Unit]
    sizes: Sequence[int]
    key: Key
    journal: PassJournal[Result]
    kept_bytes: int = 0

    def groups(self, places: Sequence[int], threads: int, tile: int = TILE) -> Sequence[int]:
        """Where each group of these blocks ends; a block alone is one, too."""
        if self.key is alone:
            return range(1, len(places) + 1)
        return cut_groups([self.blocks[place] for place in places], self.key, threads=threads, tile=tile)


def _stream_own(
    work: _Work[Unit, Result],
    own: Sequence[int],
    make_worker: Callable[[TileReader], Callable[[Sequence[Unit]], Sequence[Result]]],
    context: Context,
) -> tuple[list[Result], int]:
    """Work on some blocks, by place: what came of each, in their order, and the bytes read; errors as of `stream`."""
    if not own:
        return [], 0
    threads = context.threads or worker_threads(context.ranks.local_world)
    tile = check_tile(context.tile)
    blocks, sizes = [work.blocks[place] for place in own], [work.sizes[place] for place in own]
    ends = work.groups(own, threads, tile)
    of_thread = threading.local()
    readers: list[TileReader] = []
    stop = threading.Event()
    remote: RemoteReader | None = None

    def do(number: int, start: int, end: int) -> Sequence[Result]:
        if not hasattr(of_thread, "worker"):
            files = open_files.enter_context(Files(threads=threads + 1, remote=remote))
            of_thread.reader = TileReader(work.checkpoints, files, tile=tile, stopped=stop.is_set)
            readers.append(of_thread.reader)
            of_thread.worker = make_worker(of_thread.reader)
        reader: TileReader = of_thread.reader
        reader.begin(lambda: prefetch.miss(number))
        prefetch.begin(number)
        first = blocks[start]
        with context.ranks.working_on(f"{first.name!r}, elements {first.start:,} to {first.stop:,}"):
            results: Sequence[Result] = of_thread.worker(blocks[start:end])
        return results

    results: list[Result | None] = [None] * len(own)
    with ExitStack() as open_files, one_core_per_kernel():
        if far_files(work.checkpoints):
            remote = open_files.enter_context(RemoteReader(work.checkpoints, blocks, stop.is_set))
        files = open_files.enter_context(Files(threads=threads + 1, remote=remote))
        announce = announcer(work.checkpoints, files, stop.is_set)
        starts = [0, *ends[:-1]]
        group_sizes = [sum(sizes[start:end]) for start, end in zip(starts, ends, strict=True)]
        prefetch = open_files.enter_context(
            Prefetch(group_sizes, lambda number: announce(blocks[starts[number] : ends[number]]))
        )
        executor = ThreadPoolExecutor(threads, thread_name_prefix="ckavg")
        try:
            report = _reporter(work, sum(sizes), context.on_progress)
            note = _Notes(work.journal)
            for number, found in _as_done(zip(starts, ends, strict=True), do, stop, executor, threads, context.ranks):
                results[starts[number] : ends[number]] = found
                report(group_sizes[number])
                note(own[starts[number] : ends[number]], found)
            if context.ranks.is_shared:
                note.flush()
        except BaseException:
            stop.set()  # not only between two blocks: a block may be a second's work, or many on slow storage
            raise
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
        return cast("list[Result]", results), sum(reader.bytes_read for reader in readers)


def _as_done(
    bounds: Iterable[tuple[int, int]],
    do: Callable[[int, int, int], Sequence[Result]],
    stop: threading.Event,
    executor: ThreadPoolExecutor,
    threads: int,
    ranks: Ranks,
) -> Iterator[tuple[int, Sequence[Result]]]:
    """The number of every group with what came of its blocks, as it is done; raises what a worker raised first.
    Meanwhile, the other processes are looked at.

    Each thread takes the next group by itself. A future for each block would take half a gigabyte for a model of 10¹²
    parameters, and a short queue of them would run empty while the thread that reads this waits for the disk.
    """
    to_do = iter(enumerate(bounds))  # of which several threads may take the next: no Python code runs in it
    done: SimpleQueue[tuple[int, Sequence[Result]] | Future[None]] = SimpleQueue()

    def work() -> None:
        for number, (start, end) in to_do:
            if stop.is_set():
                return
            done.put((number, do(number, start, end)))

    for _ in range(threads):
        executor.submit(work).add_done_callback(done.put)
    while threads:
        ranks.check()
        try:
            each = done.get(timeout=SECONDS_BETWEEN_LOOKS if ranks.is_shared else None)
        except Empty:
            continue
        if isinstance(each, Future):
            each.result()
            threads -= 1
        else:
            yield each


def _deal(work: _Work[Unit, Result], places: Sequence[int], ranks: Ranks) -> list[int]:
    """The process that each of these blocks falls to.

    They are dealt out in the order of the files, whatever the order of the pass: what a machine has read in pass 1, and
    may have in memory still, falls to it in pass 2. Blocks that are worked on together stay together.
    """
    entries, blocks = work.checkpoints[-1].entries, work.blocks

    def position(place: int) -> tuple[int, int, int]:
        entry = entries[blocks[place].name]
        return entry.shard, entry.offset, blocks[place].start

    in_files = sorted(places, key=position)
    ends = work.groups(in_files, ranks.world)
    bounds = list(zip([0, *ends], ends, strict=False))
    shares = ranks.share([sum(work.sizes[place] for place in in_files[start:end]) for start, end in bounds])
    owners = {place: owner for (start, end), owner in zip(bounds, shares, strict=True) for place in in_files[start:end]}
    return [owners[place] for place in places]


class GlobalProgress:
    """Tells how far a pass is for all processes, taking this one to be as far as the others.

    Args:
        stage: which pass it is.
        checkpoints, blocks: all that is read in it.
        listener: whom to tell, if anybody.
        kept: bytes that an earlier attempt has read.
    """

    def __init__(
        self,
        stage: Pass,
        checkpoints: Sequence[Checkpoint],
        blocks: Sequence[Block],
        listener: OnProgress | None,
        *,
        kept: int = 0,
    ) -> None:
        self._stage = stage
        self._kept = kept
        self._total = sum(sizes_of(checkpoints, blocks))
        self._listener = listener

    def on_own_progress(self, news: Progress) -> None:
        """Hear how far this process is with its own share. That it is done is not passed on: others may not be."""
        if news.done == 0 or news.done < news.total:
            self._tell(self._total * news.done // max(1, news.total))

    def end(self) -> None:
        """Tell that all are done."""
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        if self._listener is not None:
            self._listener(Progress(self._stage, done, self._total, self._kept))


class _Notes(Generic[Result]):
    """Has finished blocks noted every few seconds, never sooner: a short pass is not worth a note."""

    def __init__(self, journal: PassJournal[Result]) -> None:
        self._journal = journal
        self._new: list[tuple[Sequence[int], Sequence[Result]]] = []
        self._noted = time.monotonic()

    def __call__(self, places: Sequence[int], finished: Sequence[Result]) -> None:
        self._new.append((places, finished))
        if time.monotonic() - self._noted >= SECONDS_BETWEEN_NOTES:
            self.flush()

    def flush(self) -> None:
        """Note what is new now."""
        if self._new:
            self._journal.note({place: each for pair in self._new for place, each in zip(*pair, strict=True)})
        self._new = []
        self._noted = time.monotonic()


def _reporter(work: _Work[Unit, Result], total: int, on_progress: OnProgress | None) -> Callable[[int], None]:
    if on_progress is None:
        return lambda _: None
    listener = on_progress
    done = 0
    listener(Progress(work.stage, 0, total, work.kept_bytes))

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        listener(Progress(work.stage, done, total, work.kept_bytes))

    return report


@contextmanager
def one_core_per_kernel() -> Iterator[None]:
    """Threads of ours are the parallelism; kernels that spawn their own would fight them for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
