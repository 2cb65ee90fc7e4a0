"""Stage *engine*: bytes of files that are not on this machine, fetched ahead of the workers, used, and dropped.

What a pass will read of such files is cut into pieces of some megabytes, in the order in which it is read. A few
connections fetch them, as many as fit into the window; a piece goes when all of it that is needed has been read. A
worker that needs a piece which is not there yet has it fetched next.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ckavg.checkpoints.run import Checkpoint, Remote
from ckavg.engine.blocks import Block

WINDOW_BYTES = 384 << 20
"""How much is held at once, as a rule; twice as much where workers need more than that at the same time."""

CONNECTIONS = 16

_LARGEST_PIECE, _SMALLEST_PIECE = 32 << 20, 1 << 20
_LARGEST_GAP, _GAP_OF_NEEDED = 32 << 10, 8
"""Bytes that nobody needs are fetched all the same, rather than asked for around them, where they are few: in all, and
as a part of those that are needed before them."""

_SECONDS_BETWEEN_LOOKS = 0.1


class Stopped(Exception):  # noqa: N818 - nothing is wrong with what it stops
    """The pass ends before its work is done; raised in a thread of it, and seen by nobody else."""


@dataclass(slots=True)
class _Piece:
    """Bytes `begin` to `end` of a file; `left` of them are still to be read."""

    path: Path
    begin: int
    end: int
    left: int
    data: bytes | None = None
    error: BaseException | None = None
    is_asked: bool = False

    @property
    def size(self) -> int:
        return self.end - self.begin


class Window:
    """What is fetched of the files of a pass that are not here; shared by its threads. A context.

    Args:
        remote: where the files are.
        checkpoints: what is read of every block.
        blocks: the work, in its order.
        stopped: whether the pass is over, whatever is left of it.
        nbytes: how much is held.
        connections: how many pieces are fetched at the same time.
    """

    def __init__(
        self,
        remote: Remote,
        checkpoints: Sequence[Checkpoint],
        blocks: Sequence[Block],
        stopped: Callable[[], bool],
        *,
        nbytes: int = WINDOW_BYTES,
        connections: int = CONNECTIONS,
    ) -> None:
        self._remote = remote
        self._stopped = stopped
        self._nbytes = nbytes
        self._far = far_files(remote, checkpoints)
        far = [each for each in checkpoints if any(shard.path in self._far for shard in each.shards)]
        largest = min(_LARGEST_PIECE, max(_SMALLEST_PIECE, nbytes // (4 * max(1, len(far)))))
        needed = _Needed(self._far, far, blocks)
        self._pieces = _cut(needed, largest)
        self._begins = {path: [piece.begin for piece in pieces] for path, pieces in self._pieces.items()}
        self._ahead = _in_order(self._pieces, self._begins, needed)
        self._urgent: deque[_Piece] = deque()
        self._held: OrderedDict[int, _Piece] = OrderedDict()
        self._bytes = 0
        self._changed = threading.Condition()
        self._ended = False
        self._threads = [
            threading.Thread(target=self._run, name="ckavg-fetch", daemon=True)
            for _ in range(connections if far else 0)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def held_bytes(self) -> int:
        """How much is held, or on its way."""
        return self._bytes

    def has(self, path: Path) -> bool:
        """Whether a file is read here, rather than from this machine."""
        return path in self._far

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `path` from `offset` on.

        Raises:
            CkavgError: they could not be fetched.
            Stopped: the pass is over.
        """
        filled = 0
        while filled < len(buffer):
            at, end = offset + filled, offset + len(buffer)
            piece = self._piece_at(path, at)
            if piece is None or piece.left <= 0:  # not of the plan, or read before
                stop = end if piece is None else min(end, piece.end)
                buffer[filled : filled + stop - at] = self._remote.read(path, at, stop)
            else:
                stop = min(end, piece.end)
                data = self._wait_for(piece)
                buffer[filled : filled + stop - at] = data[at - piece.begin : stop - piece.begin]
                self._used(piece, stop - at)
            filled += stop - at

    def close(self) -> None:
        """Fetch nothing more. Connections that are busy end by themselves."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _piece_at(self, path: Path, at: int) -> _Piece | None:
        pieces = self._pieces.get(path)
        place = bisect_right(self._begins[path], at) - 1 if pieces else -1
        return pieces[place] if pieces and place >= 0 and at < pieces[place].end else None

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
            if piece.error is not None:
                raise piece.error
            assert piece.data is not None  # noqa: S101 - waited for
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
            self._bytes -= piece.size
            self._changed.notify_all()

    def _run(self) -> None:
        while (piece := self._next()) is not None:
            try:
                data: bytes | None = self._remote.read(piece.path, piece.begin, piece.end)
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
                    self._bytes += piece.size
                    self._make_room(but=piece)
                    return piece
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)
            return None

    def _upcoming(self) -> _Piece | None:
        if self._bytes >= self._nbytes:
            return None
        return next((piece for piece in self._ahead if not piece.is_asked and piece.left > 0), None)

    def _make_room(self, *, but: _Piece) -> None:
        """Drop what was used longest ago where workers hold on to far more than was meant; it is fetched again."""
        for piece in list(self._held.values()):
            if self._bytes <= 2 * self._nbytes:
                return
            if piece.data is not None and piece is not but:
                self._drop(piece)


def far_files(remote: Remote, checkpoints: Iterable[Checkpoint]) -> frozenset[Path]:
    """The weight files that are not on this machine."""
    return frozenset(shard.path for each in checkpoints for shard in each.shards if remote.is_far(shard.path))


@dataclass(frozen=True, slots=True)
class _Needed:
    """What blocks read of files that are not here."""

    far: frozenset[Path]
    checkpoints: Sequence[Checkpoint]
    blocks: Sequence[Block]

    def __iter__(self) -> Iterator[list[tuple[Path, int, int]]]:
        """For each block: path, first byte, end."""
        for block in self.blocks:
            found = []
            for checkpoint in self.checkpoints:
                entry = checkpoint.entries[block.name]
                path, item = checkpoint.shards[entry.shard].path, entry.item_bytes
                if path in self.far:
                    found += [
                        (path, entry.offset + start * item, entry.offset + stop * item) for start, stop in block.ranges
                    ]
            yield found


def _cut(needed: _Needed, largest: int) -> dict[Path, list[_Piece]]:
    """All that is read of each file, as pieces in the order of their bytes."""
    of_path: dict[Path, list[tuple[int, int]]] = {}
    for ranges in needed:
        for path, begin, end in ranges:
            of_path.setdefault(path, []).append((begin, end))
    return {path: list(_pieces(path, sorted(ranges), largest)) for path, ranges in of_path.items()}


def _pieces(path: Path, ranges: Sequence[tuple[int, int]], largest: int) -> Iterator[_Piece]:
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


def _in_order(pieces: dict[Path, list[_Piece]], begins: dict[Path, list[int]], needed: _Needed) -> Iterator[_Piece]:
    """The pieces in the order in which workers will want them: by place in a block, then by checkpoint."""
    seen: set[int] = set()
    for ranges in needed:
        of_ranges = []
        for path, begin, end in ranges:
            first = bisect_right(begins[path], begin) - 1
            stop = bisect_right(begins[path], end - 1)
            of_ranges.append(pieces[path][first:stop])
        for row in itertools.zip_longest(*of_ranges):
            for piece in row:
                if piece is not None and id(piece) not in seen:
                    seen.add(id(piece))
                    yield piece
