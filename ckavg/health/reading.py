"""Stage *health*: the threads that read every weight file once, hash its bytes and measure its tensors.

Nothing grows with the model or with the number of checkpoints but the statistics themselves: a thread holds one piece
of one tensor, of three checkpoints at a time.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from ckavg.checkpoints.run import Checkpoint, TensorInfo
from ckavg.engine.context import OnProgress, Progress
from ckavg.engine.reader import Files
from ckavg.engine.stream import one_core_per_kernel
from ckavg.health.hashing import Digests, hash_file
from ckavg.health.plan import PIECE, Piece, Walk, WeightFile, data_start, plan_walk
from ckavg.health.statistics import Gathered, Measured, PieceStatistics
from ckavg.health.values import TensorStatistics

_BUFFER_BYTES = PIECE * 8
_AHEAD_BYTES = 64 << 20
"""How much of all files together is announced before it is read, where they are not in memory."""

_LEAST_AHEAD_BYTES = 4 * _BUFFER_BYTES


@dataclass(frozen=True, slots=True)
class Reading:
    """What came of it: the statistics of every floating tensor, SHA-256 by file, and how many bytes were read."""

    tensors: tuple[TensorStatistics, ...]
    sha256: dict[WeightFile, str]
    bytes_read: int


@dataclass(frozen=True, slots=True)
class _Ended:
    """A thread ended: how many bytes it read, and what stopped it."""

    bytes_read: int
    error: BaseException | None = None


_News = tuple[Piece, Measured | None] | tuple[WeightFile, str] | int | _Ended
"""A piece is done, a file is hashed, so many bytes more are read, or a thread ended."""


def read_all(checkpoints: Sequence[Checkpoint], *, threads: int, on_progress: OnProgress | None = None) -> Reading:
    """Read every weight file, most of them once.

    Args:
        checkpoints: what is read; their tensors may differ.
        threads: how many threads read, hash and compute.
        on_progress: called in the caller's thread now and then.

    Raises:
        TruncatedShardError, ReadError: a file changed or cannot be read.
    """
    walk = plan_walk(checkpoints)
    digests = Digests()
    tell = _teller(_bytes_to_read(checkpoints, walk), on_progress)
    headers = _hash_headers(checkpoints, walk, digests)
    tell(headers)
    jobs = _Jobs(walk)
    news: SimpleQueue[_News] = SimpleQueue()
    ahead = max(_LEAST_AHEAD_BYTES, _AHEAD_BYTES // max(1, len(checkpoints)))

    def work() -> None:
        with Files(threads=threads + 1) as files:
            try:
                _Worker(checkpoints, files, digests, news, ahead).run(jobs)
                news.put(_Ended(files.bytes_read))
            except BaseException as error:  # raised again in the caller's thread
                jobs.stop()
                digests.stop()
                news.put(_Ended(files.bytes_read, error))

    with _running(work, threads, jobs, digests):
        return _collected(walk, digests, news, threads, headers, tell)


class _Jobs:
    """The work, taken one piece after another, then one file after another, by whichever thread is free."""

    def __init__(self, walk: Walk) -> None:
        self._jobs: Iterator[Piece | WeightFile] = itertools.chain(walk.pieces(), walk.apart)
        self._taking = threading.Lock()
        self._stopped = False

    def __iter__(self) -> Iterator[Piece | WeightFile]:
        return self

    def __next__(self) -> Piece | WeightFile:
        with self._taking:
            if self._stopped:
                raise StopIteration
            return next(self._jobs)

    def stop(self) -> None:
        """Hand out nothing more."""
        self._stopped = True


class _Worker:
    """One thread: its open files, its buffer, what it measures with."""

    def __init__(
        self, checkpoints: Sequence[Checkpoint], files: Files, digests: Digests, news: SimpleQueue[_News], ahead: int
    ) -> None:
        self._checkpoints = checkpoints
        self._files = files
        self._digests = digests
        self._news = news
        self._ahead = ahead
        self._raw = torch.empty(_BUFFER_BYTES, dtype=torch.uint8)
        self._bytes = memoryview(self._raw.numpy().data)
        self._statistics = PieceStatistics()
        self._from_disk = False

    def run(self, jobs: _Jobs) -> None:
        """Do one job after another until none is left."""
        for job in jobs:
            if isinstance(job, Piece):
                self._news.put((job, self._do_piece(job)))
            else:
                index, shard = job
                path = self._checkpoints[index].shards[shard].path
                nbytes = self._checkpoints[index].shards[shard].nbytes
                self._news.put((job, hash_file(self._files, path, nbytes, self._bytes, self._news.put)))

    def _do_piece(self, piece: Piece) -> Measured | None:
        """Hash the bytes of a piece, and measure it if it is one of numbers that are averaged."""
        tensor = piece.tensor

        def load(place: int) -> torch.Tensor:
            return self._load(tensor.held[place], tensor.entries[place], piece.start, piece.stop)

        if tensor.is_floating:
            return self._statistics.measure(tensor, piece.stop - piece.start, load)
        for place in range(len(tensor.held)):
            load(place)
        return None

    def _load(self, index: int, entry: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of a tensor of a checkpoint, as stored; hashed on the way."""
        offset, size = entry.offset + start * entry.item_bytes, (stop - start) * entry.item_bytes
        path = self._checkpoints[index].shards[entry.shard].path
        if self._from_disk:
            self._files.announce(path, offset + self._ahead, size)
        self._files.read_into(path, offset, self._bytes[:size], on_miss=self._missed)
        self._digests.add((index, entry.shard), offset, self._bytes[:size])
        return self._raw[:size]

    def _missed(self) -> None:
        self._from_disk = True


def _collected(
    walk: Walk, digests: Digests, news: SimpleQueue[_News], threads: int, bytes_read: int, tell: Callable[[int], None]
) -> Reading:
    """Put together what the threads tell, the pieces in their order, until all of them have ended."""
    gathered = {id(tensor): Gathered(tensor) for tensor in walk.tensors if tensor.is_floating}
    waiting: dict[int, tuple[Piece, Measured | None]] = {}
    turn = 0
    apart: dict[WeightFile, str] = {}
    while threads:
        told = news.get()
        if isinstance(told, _Ended):
            if told.error is not None:
                raise told.error
            threads -= 1
            bytes_read += told.bytes_read
        elif isinstance(told, int):
            tell(told)
        elif isinstance(told[0], Piece):
            waiting[told[0].place] = told
            while turn in waiting:
                piece, measured = waiting.pop(turn)
                turn += 1
                if measured is not None:
                    gathered[id(piece.tensor)].add(piece.stop - piece.start, measured)
                tell((piece.stop - piece.start) * sum(entry.item_bytes for entry in piece.tensor.entries))
        else:
            apart[told[0]] = told[1]
    return Reading(tuple(each.result() for each in gathered.values()), digests.results() | apart, bytes_read)


@contextmanager
def _running(work: Callable[[], None], threads: int, jobs: _Jobs, digests: Digests) -> Iterator[None]:
    """Threads that work, each on one core; on leaving, they are told to stop and waited for."""
    workers = [threading.Thread(target=work, name=f"ckavg-health-{number}") for number in range(threads)]
    begun = []
    with one_core_per_kernel():
        try:
            for worker in workers:
                worker.start()
                begun.append(worker)
            yield
        finally:
            jobs.stop()
            digests.stop()
            for worker in begun:
                worker.join()


def _hash_headers(checkpoints: Sequence[Checkpoint], walk: Walk, digests: Digests) -> int:
    """Begin every file that is hashed on the way with its header; how many bytes those are."""
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with Files(threads=1) as files:
        for index, shard in walk.on_the_way:
            digests.begin((index, shard))
            checkpoint = checkpoints[index]
            stop = data_start(checkpoint, shard)
            for offset in range(0, stop, len(buffer)):
                part = buffer[: min(len(buffer), stop - offset)]
                files.read_into(checkpoint.shards[shard].path, offset, part, on_miss=lambda: None)
                digests.add((index, shard), offset, part)
        return files.bytes_read


def _bytes_to_read(checkpoints: Sequence[Checkpoint], walk: Walk) -> int:
    """Bytes of all files, and of those that are hashed apart once more without their headers' sake."""
    headers = sum(data_start(checkpoints[index], shard) for index, shard in walk.on_the_way)
    tensors = sum(entry.nbytes for tensor in walk.tensors for entry in tensor.entries)
    return headers + tensors + sum(checkpoints[index].shards[shard].nbytes for index, shard in walk.apart)


def _teller(total: int, on_progress: OnProgress | None) -> Callable[[int], None]:
    """What tells the listener that so many bytes more are done; at the beginning, that none are."""
    if on_progress is None:
        return lambda _: None
    listener, done = on_progress, 0
    listener(Progress("health", 0, total))

    def tell(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        listener(Progress("health", done, total))

    return tell
