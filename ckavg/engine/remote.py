"""Stage *engine*: bytes of files that are not on this machine, fetched ahead of the workers, used, and dropped.

What a pass will read of such files is cut into pieces of some megabytes, in the order in which it is read. A few
connections fetch them, as many as fit into memory; a piece goes when all of it that is needed has been read. A worker
that needs a piece which is not there yet has it fetched next. It never waits for a request itself, since one may take
long to fail, and the end of the work does not wait for that. What is downloaded whole comes before the pass (`fetch`).
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
"""How much is held at once, as a rule; twice as much where workers need more than that at the same time."""

CONNECTIONS = 16

_LARGEST_PIECE, _SMALLEST_PIECE = 32 << 20, 1 << 20
_LARGEST_GAP, _GAP_OF_NEEDED = 32 << 10, 8
"""Bytes that nobody needs are fetched all the same, rather than asked for around them, where they are few: in all, and
as a part of those that are needed before them."""

_SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(slots=True)
class _Piece:
    """Bytes `begin` to `end` of a file; `left` of them are still to be read."""

    path: RemotePath
    begin: int
    end: int
    left: int
    data: bytes | None = None
    error: BaseException | None = None
    is_asked: bool = False


class RemoteReader:
    """What is fetched of the files of a pass that are not here; shared by its threads. A context.

    Args:
        checkpoints: what is read of every block.
        blocks: the work, in its order.
        stopped: whether the pass is over, whatever is left of it.
        nbytes: how much is held.
        connections: how many pieces are fetched at the same time.
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
        """How much is held, or on its way."""
        self._changed = threading.Condition()
        self._ended = False
        for _ in range(connections if far else 0):
            threading.Thread(target=self._run, name="ckavg-fetch", daemon=True).start()

    def has(self, path: AnyPath) -> bool:
        """Whether a file is read here, rather than from this machine."""
        return path in self._far

    def read_into(self, path: AnyPath, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `path` from `offset` on.

        Raises:
            CkavgError: they could not be fetched.
            Stopped: the pass is over.
        """
        assert isinstance(path, RemotePath)  # noqa: S101 - as `has` told
        filled = 0
        while filled < len(buffer):
            at, end = offset + filled, offset + len(buffer)
            piece = self._piece_at(path, at)
            stop = end if piece is None else min(end, piece.end)
            if piece is None or piece.left <= 0:  # not of the plan, or read before
                buffer[filled : filled + stop - at] = path.storage.read(path, at, stop)
            else:
                data = self._wait_for(piece)
                buffer[filled : filled + stop - at] = data[at - piece.begin : stop - piece.begin]
                self._used(piece, stop - at)
            filled += stop - at

    def __enter__(self) -> RemoteReader:
        return self

    def __exit__(self, *_: object) -> None:
        """Fetch nothing more. Connections that are busy end by themselves."""
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
            except Exception as failure:  # whoever waits for it raises it
                data, error = None, failure
            with self._changed:
                piece.data, piece.error = data, error
                self._changed.notify_all()

    def _next(self) -> _Piece | None:
        """The piece to fetch now, as soon as there is room for it; None at the end."""
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
        """Drop what was used longest ago where workers hold on to far more than was meant; it is fetched again."""
        for piece in list(self._held.values()):
            if self.held_bytes <= 2 * self._nbytes:
                return
            if piece.data is not None and piece is not but:
                self._drop(piece)


def far_files(checkpoints: Iterable[Checkpoint]) -> frozenset[RemotePath]:
    """The weight files that are not on this machine."""
    paths = (shard.path for each in checkpoints for shard in each.shards)
    return frozenset(path for path in paths if isinstance(path, RemotePath) and path.storage.local(path) is None)


_Ranges = list[tuple[RemotePath, int, int]]
"""What is read of files: path, first byte, end."""


def _needed(far: frozenset[RemotePath], checkpoints: Sequence[Checkpoint], block: Block) -> _Ranges:
    """What a block reads of files that are not here."""
    return [
        (path, begin, end)
        for checkpoint in checkpoints
        for start, stop in block.ranges
        for path, begin, end in checkpoint.ranges(block.name, start, stop)
        if isinstance(path, RemotePath) and path in far
    ]


def _cut(needed: Iterable[_Ranges], largest: int) -> dict[RemotePath, list[_Piece]]:
    """All that is read of each file, as pieces in the order of their bytes."""
    of_path: dict[RemotePath, list[tuple[int, int]]] = {}
    for ranges in needed:
        for path, begin, end in ranges:
            of_path.setdefault(path, []).append((begin, end))
    return {path: list(_pieces(path, sorted(ranges), largest)) for path, ranges in of_path.items()}


def _pieces(path: RemotePath, ranges: Sequence[tuple[int, int]], largest: int) -> Iterator[_Piece]:
    """Ranges with little between them as one, and cut where that becomes too large."""
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
    """The last piece that does not begin after this byte; -1 where none does."""
    return bisect_right(pieces, at, key=lambda piece: piece.begin) - 1


def _in_order(pieces: Mapping[RemotePath, list[_Piece]], needed: Iterable[_Ranges]) -> Iterator[_Piece]:
    """The pieces in the order in which workers will want them: by place in a block, then by checkpoint."""
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
    """Download what is to be downloaded.

    Raises:
        HubError, ReadError: it could not be downloaded. What came of it stays.
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
    """Download all weights of checkpoints, for a work that reads them as files.

    Raises:
        SettingError: there is no room for all of them.
        HubError, ReadError: they could not be downloaded. What came of them stays.
    """
    shards = (shard.path for checkpoint in checkpoints for shard in checkpoint.shards)
    readings = {path: 2.0 for path in shards if isinstance(path, RemotePath)}
    if not readings:
        return
    fetching = plan_fetching(readings, other_bytes=0)
    if fetching.streamed_bytes:
        raise SettingError(
            f"All weights are to be read as files, {fetching.streamed_bytes / 2e9:.2f} GB; there is room for "
            f"{fetching.room / 1e9:.2f} GB at {fetching.directory}.",
            hint="Choose fewer checkpoints, or more room with --max-disk or HF_HOME.",
        )
    fetch(fetching, on_progress)
