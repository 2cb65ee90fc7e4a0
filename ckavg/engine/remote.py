"""Stage *engine*: bytes of remote files, fetched ahead of the workers, used and dropped.

The bytes that a pass will read are cut into pieces of some megabytes, in the order of reading. A few connections fetch
as many pieces as fit into memory; a piece is dropped once all its needed bytes have been read. A worker that needs a
missing piece has it fetched next. Requests run in their own threads: one may take long to fail, and the end of the work
must not wait for it. Whole downloads come before the pass (`fetch`).
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.blocks import Block
from ckavg.engine.context import OnProgress, Progress
from ckavg.errors import SettingError
from ckavg.storage.base import AnyPath, RemotePath
from ckavg.storage.download import Stopped
from ckavg.storage.remote import Fetching, download_all, plan_fetching

HELD_BYTES = 384 << 20
"""Bytes held at once; up to twice as much if workers need more at the same time."""

CONNECTIONS = 16

_LARGEST_PIECE, _SMALLEST_PIECE = 32 << 20, 1 << 20
_LARGEST_GAP, _GAP_OF_NEEDED = 32 << 10, 8
"""Largest gap of unneeded bytes to fetch rather than split a request: in bytes, and as a fraction of the needed bytes
before it."""

_SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(slots=True)
class _Piece:
    """Bytes `begin` to `end` of a file; `left` of them have yet to be read."""

    path: RemotePath
    begin: int
    end: int
    left: int
    data: bytes | None = None
    error: BaseException | None = None
    is_asked: bool = False


class RemoteReader:
    """Fetches and reads the remote files of a pass; shared by its threads. A context.

    Args:
        checkpoints: read for every block.
        blocks: in the order of work.
        stopped: whether the pass is over, even if blocks are left.
        nbytes: how much to hold.
        connections: how many pieces to fetch at the same time.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        blocks: Sequence[Block],
        stopped: Callable[[], bool],
        *,
        nbytes: int = HELD_BYTES,
        connections: int = CONNECTIONS,
    ) -> None:
        self._stopped = stopped
        self._nbytes = nbytes
        self._far = far_files(checkpoints)
        far = [each for each in checkpoints if any(shard.path in self._far for shard in each.shards)]
        largest = min(_LARGEST_PIECE, max(_SMALLEST_PIECE, nbytes // (4 * max(1, len(far)))))
        needed = [_needed(self._far, far, block) for block in blocks]
        self._pieces = _cut(needed, largest)
        self._ahead = _in_order(self._pieces, needed)
        self._urgent: deque[_Piece] = deque()
        self._held: OrderedDict[int, _Piece] = OrderedDict()
        self.held_bytes = 0
        """Bytes held or being fetched."""
        self._changed = threading.Condition()
        self._ended = False
        for _ in range(connections if far else 0):
            threading.Thread(target=self._run, name="ckavg-fetch", daemon=True).start()

    def has(self, path: AnyPath) -> bool:
        """Whether a file is remote, and read here."""
        return path in self._far

    def read_into(self, path: AnyPath, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `path` from `offset` on.

        Raises:
            CkavgError: fetching failed.
            Stopped: the pass is over.
        """
        assert isinstance(path, RemotePath)  # noqa: S101 - see `has`
        filled = 0
        while filled < len(buffer):
            at, end = offset + filled, offset + len(buffer)
            piece = self._piece_at(path, at)
            stop = end if piece is None else min(end, piece.end)
            if piece is None or piece.left <= 0:  # not planned, or already used and dropped
                buffer[filled : filled + stop - at] = path.storage.read(path, at, stop)
            else:
                data = self._wait_for(piece)
                buffer[filled : filled + stop - at] = data[at - piece.begin : stop - piece.begin]
                self._used(piece, stop - at)
            filled += stop - at

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop fetching. Busy connections end on their own."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _piece_at(self, path: RemotePath, at: int) -> _Piece | None:
        pieces = self._pieces.get(path, [])
        place = _place_of(at, pieces)
        return pieces[place] if place >= 0 and at < pieces[place].end else None

    def _wait_for(self, piece: _Piece) -> bytes:
        with self._changed:
            while piece.data is None and piece.error is None:
                if self._stopped() or self._ended:
                    raise Stopped
                if not piece.is_asked:
                    piece.is_asked = True
                    self._urgent.append(piece)
                    self._changed.notify_all()
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)
            if piece.data is None:
                raise piece.error or Stopped
            return piece.data

    def _used(self, piece: _Piece, nbytes: int) -> None:
        with self._changed:
            piece.left -= nbytes
            if piece.left <= 0:
                self._drop(piece)
            elif id(piece) in self._held:
                self._held.move_to_end(id(piece))

    def _drop(self, piece: _Piece) -> None:
        if self._held.pop(id(piece), None) is not None:
            piece.data, piece.is_asked = None, False
            self.held_bytes -= piece.end - piece.begin
            self._changed.notify_all()

    def _run(self) -> None:
        while (piece := self._next()) is not None:
            try:
                data: bytes | None = piece.path.storage.read(piece.path, piece.begin, piece.end)
                error = None
            except Exception as failure:  # raised in the worker that waits for the piece
                data, error = None, failure
            with self._changed:
                piece.data, piece.error = data, error
                self._changed.notify_all()

    def _next(self) -> _Piece | None:
        """Wait for room, and return the next piece to fetch; None at the end."""
        with self._changed:
            while not (self._ended or self._stopped()):
                piece = self._urgent.popleft() if self._urgent else self._upcoming()
                if piece is not None:
                    piece.is_asked = True
                    self._held[id(piece)] = piece
                    self.held_bytes += piece.end - piece.begin
                    self._make_room(but=piece)
                    return piece
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)
            return None

    def _upcoming(self) -> _Piece | None:
        if self.held_bytes >= self._nbytes:
            return None
        return next((piece for piece in self._ahead if not piece.is_asked and piece.left > 0), None)

    def _make_room(self, *, but: _Piece) -> None:
        """Drop the least recently used pieces if far too much is held; they are fetched again if needed."""
        for piece in list(self._held.values()):
            if self.held_bytes <= 2 * self._nbytes:
                return
            if piece.data is not None and piece is not but:
                self._drop(piece)


def far_files(checkpoints: Iterable[Checkpoint]) -> frozenset[RemotePath]:
    """The remote weight files."""
    paths = (shard.path for each in checkpoints for shard in each.shards)
    return frozenset(path for path in paths if isinstance(path, RemotePath) and path.storage.local(path) is None)


_Ranges = list[tuple[RemotePath, int, int]]
"""Ranges of files: path, first byte, end."""


def _needed(far: frozenset[RemotePath], checkpoints: Sequence[Checkpoint], block: Block) -> _Ranges:
    """The ranges of remote files that a block reads."""
    return [
        (path, begin, end)
        for checkpoint in checkpoints
        for start, stop in block.ranges
        for path, begin, end in checkpoint.ranges(block.name, start, stop)
        if isinstance(path, RemotePath) and path in far
    ]


def _cut(needed: Iterable[_Ranges], largest: int) -> dict[RemotePath, list[_Piece]]:
    """The pieces of each file, in the order of their bytes."""
    of_path: dict[RemotePath, list[tuple[int, int]]] = {}
    for ranges in needed:
        for path, begin, end in ranges:
            of_path.setdefault(path, []).append((begin, end))
    return {path: list(_pieces(path, sorted(ranges), largest)) for path, ranges in of_path.items()}


def _pieces(path: RemotePath, ranges: Sequence[tuple[int, int]], largest: int) -> Iterator[_Piece]:
    """Pieces from ranges: close ranges are merged, and split again where that is too large."""
    begin = end = left = 0
    for first, last in ranges:
        while first < last:
            if left and (first - end > min(_LARGEST_GAP, left // _GAP_OF_NEEDED) or first - begin >= largest):
                yield _Piece(path, begin, end, left)
                left = 0
            if not left:
                begin = first
            stop = min(last, begin + largest)
            end, left, first = stop, left + stop - first, stop
    if left:
        yield _Piece(path, begin, end, left)


def _place_of(at: int, pieces: Sequence[_Piece]) -> int:
    """The index of the last piece that begins at or before this byte; -1 if none does."""
    return bisect_right(pieces, at, key=lambda piece: piece.begin) - 1


def _in_order(pieces: Mapping[RemotePath, list[_Piece]], needed: Iterable[_Ranges]) -> Iterator[_Piece]:
    """The pieces in the order in which workers need them: by position in a block, then by checkpoint."""
    seen: set[int] = set()
    for ranges in needed:
        of_ranges = [
            pieces[path][_place_of(begin, pieces[path]) : _place_of(end - 1, pieces[path]) + 1]
            for path, begin, end in ranges
        ]
        for row in itertools.zip_longest(*of_ranges):
            for piece in row:
                if piece is not None and id(piece) not in seen:
                    seen.add(id(piece))
                    yield piece


def fetch(fetching: Fetching | None, on_progress: OnProgress | None) -> None:
    """Make the whole downloads of a plan.

    Raises:
        HubError, ReadError: a download failed. The part received so far stays.
    """
    if fetching is None or not fetching.whole:
        return
    done = 0

    def on_bytes(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress:
            on_progress(Progress("fetch", done, fetching.whole_bytes))

    on_bytes(0)
    download_all(fetching.whole, on_bytes)


def fetch_all(checkpoints: Iterable[Checkpoint], on_progress: OnProgress | None) -> None:
    """Download all weights of checkpoints, for work that needs local files.

    Raises:
        SettingError: there is no room for all of them.
        HubError, ReadError: a download failed. The part received so far stays.
    """
    shards = (shard.path for checkpoint in checkpoints for shard in checkpoint.shards)
    readings = {path: 2.0 for path in shards if isinstance(path, RemotePath)}
    if not readings:
        return
    fetching = plan_fetching(readings, other_bytes=0)
    if fetching.streamed_bytes:
        raise SettingError(
            f"All weights must be downloaded, {fetching.streamed_bytes / 2e9:.2f} GB, but there is room for "
            f"{fetching.room / 1e9:.2f} GB at {fetching.directory}.",
            hint="Choose fewer checkpoints, or make room with --max-disk or HF_HOME.",
        )
    fetch(fetching, on_progress)
