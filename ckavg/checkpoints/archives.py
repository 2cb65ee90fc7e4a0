"""Stage *discover*: the position of every file in a zip archive of `torch.save`, so that it is read in place.

Such an archive stores files uncompressed. Its directory, at the end, is checked against the size of the archive, and
files may not overlap.
"""

from __future__ import annotations

import itertools
import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckavg.storage.base import AnyPath
from ckavg.storage.download import thread_map
from ckavg.storage.local import storage_of

FIRST_BYTES = b"PK\3\4"
"""The first bytes of an archive."""

_MOST_DIRECTORY_BYTES = 100_000_000
_MOST_FILES = 500_000

_TAIL_BYTES = (1 << 16) + (1 << 15)
"""Bytes of the first read at the end: the longest comment, and the directory of about 300 tensors."""

_AHEAD_BYTES, _KEPT = 1 << 10, 4
"""The file with the byte order follows the pickle."""

_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR, _HAS_DESCRIPTOR, _ENCRYPTED = 16, 8, 1
_LARGE, _LARGEST = 0xFFFF_FFFF, 1 << 62
_ALIGNMENT = 64
"""torch aligns every file of an archive to this many bytes."""


Read = Callable[[int, int], bytes]
"""Returns the bytes of a file from one offset to another."""


class CutOffError(ValueError):
    """An archive without an end: it is still being written, or was cut off."""


@dataclass(frozen=True, slots=True)
class Span:
    """The position of a file's bytes in the archive, and whether they are its plain content."""

    start: int
    nbytes: int
    is_stored: bool = True


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of the archive's directory; the file's own header is at `offset`."""

    name: str
    flags: int
    nbytes: int
    offset: int
    is_stored: bool


def reader(path: AnyPath, size: int) -> Read:
    """A function that reads from a file of `size` bytes; it reads ahead and caches the last read.

    It raises ValueError for bytes outside the file, CutOffError if the file has become shorter, and errors of the
    storage.
    """
    pieces: deque[tuple[int, bytes]] = deque(maxlen=_KEPT)

    def read(start: int, stop: int) -> bytes:
        if not 0 <= start <= stop <= size:
            raise ValueError("it refers to bytes beyond its end")
        for begin, piece in tuple(pieces):
            if begin <= start and stop <= begin + len(piece):
                return piece[start - begin : stop - begin]
        piece = storage_of(path).read(path, start, min(stop + _AHEAD_BYTES, size))
        if len(piece) < stop - start:
            raise CutOffError("it became shorter while it was read")
        pieces.append((start, piece))
        return piece[: stop - start]

    return read


def read_directory(read: Read, size: int, *, is_remote: bool) -> Mapping[str, Span]:
    """The files of an archive of `size` bytes, by name.

    Raises:
        CutOffError: it has no end.
        ValueError: it is damaged, or was not written by `torch.save`.
        OSError, CkavgError: it cannot be read.
    """
    begin = max(0, size - _TAIL_BYTES)
    try:
        start, stop, count = _find_directory(read(begin, size), begin, read)
        entries = _parse_directory(read(start, stop), count)
    except (struct.error, StopIteration) as error:
        raise ValueError("its directory is damaged") from error
    starts = [entry.offset for entry in entries]
    if starts != sorted(set(starts)) or (starts and starts[0] != 0) or len(entries) < 2:
        raise ValueError("its files overlap, or other bytes precede them")
    spans = _spans(entries, start) or _spans_by_headers(entries, read, is_remote=is_remote)
    for entry, after in zip(entries, [*starts[1:], start], strict=True):
        if spans[entry.name].start + entry.nbytes > after:
            raise ValueError(f"its file {entry.name[:80]!r} is longer than its place in the archive")
    return spans


def _find_directory(tail: bytes, begin: int, read: Read) -> tuple[int, int, int]:
    """The offsets of the directory's begin and end, and how many files it lists."""
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) - place < _END.size:
        raise CutOffError("it has no end")
    _, disk, first_disk, here, count, nbytes, start, comment = _END.unpack_from(tail, place)
    if disk or first_disk or here != count or comment != len(tail) - place - _END.size:
        raise ValueError("its end is damaged")
    stop = begin + place
    if stop >= _LOCATOR.size + _END_64.size:
        signature, disk, where, _ = _LOCATOR.unpack(read(stop - _LOCATOR.size, stop))
        if signature == b"PK\6\7":
            stop -= _LOCATOR.size + _END_64.size
            signature, _, _, _, disk, first_disk, here, count, nbytes, start = _END_64.unpack(
                read(stop, stop + _END_64.size)
            )
            if signature != b"PK\6\6" or where != stop or disk or first_disk or here != count:
                raise ValueError("its end is damaged")
    if start + nbytes != stop or nbytes > _MOST_DIRECTORY_BYTES or count > _MOST_FILES:
        raise ValueError("its directory is not before its end record")
    return start, stop, count


def _parse_directory(data: bytes, count: int) -> list[_Entry]:
    entries: list[_Entry] = []
    at = 0
    while at < len(data):
        signature, _, _, flags, method, _, _, _, packed, nbytes, name_bytes, extra, comment, disk, _, _, offset = (
            _ENTRY.unpack_from(data, at)
        )
        name = data[at + _ENTRY.size : at + _ENTRY.size + name_bytes].decode()
        at += _ENTRY.size + name_bytes
        if _LARGE in (packed, nbytes, offset):
            packed, nbytes, offset = _large(data[at : at + extra], packed, nbytes, offset)
        at += extra + comment
        if signature != b"PK\1\2" or at > len(data) or disk:
            raise ValueError("its directory is damaged")
        if packed > _LARGEST or offset > _LARGEST:
            raise ValueError("its directory refers to bytes beyond it")
        is_stored = not method and packed == nbytes and not flags & _ENCRYPTED
        entries.append(_Entry(name, flags, packed, offset, is_stored))
    if len(entries) != count or len({entry.name for entry in entries}) != count:
        raise ValueError("its directory lists a file twice, or states another number of files")
    return sorted(entries, key=lambda entry: entry.offset)


def _large(extra: bytes, *values: int) -> list[int]:
    """Sizes and offset of a large file; those that need more than 32 bits are in a field after its name."""
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack(f"<{nbytes // 8}Q", extra[at + 4 : at + 4 + nbytes // 8 * 8]))
            packed, whole, offset = values
            whole = next(wide) if whole == _LARGE else whole  # in this order, and those alone
            packed = next(wide) if packed == _LARGE else packed
            return [packed, whole, next(wide) if offset == _LARGE else offset]
        at += 4 + nbytes
    raise ValueError("its directory is damaged")


def _spans(entries: list[_Entry], end: int) -> dict[str, Span] | None:
    """The positions of all files from the directory alone: a file ends before its descriptor and the next file.

    None if a file would not begin at a multiple of 64 bytes, as torch aligns them: then each header must be read.
    """
    spans: dict[str, Span] = {}
    for entry, after in itertools.zip_longest(entries, entries[1:]):
        stop = (end if after is None else after.offset) - (_DESCRIPTOR if entry.flags & _HAS_DESCRIPTOR else 0)
        start = stop - entry.nbytes
        if start % _ALIGNMENT or start < entry.offset + _LOCAL.size + len(entry.name.encode()):
            return None
        spans[entry.name] = Span(start, entry.nbytes, entry.is_stored)
    return spans


def _spans_by_headers(entries: list[_Entry], read: Read, *, is_remote: bool) -> dict[str, Span]:
    """The positions of all files from the header before each of them."""

    def span(entry: _Entry) -> Span:
        name = entry.name.encode()
        header = read(entry.offset, entry.offset + _LOCAL.size + len(name))
        signature, _, _, method, _, _, _, _, _, name_bytes, extra = _LOCAL.unpack_from(header)
        is_other = header[_LOCAL.size :] != name or name_bytes != len(name) or (method and entry.is_stored)
        if signature != FIRST_BYTES or is_other:
            raise ValueError(f"its file {entry.name[:80]!r} has another name than in its directory")
        return Span(entry.offset + _LOCAL.size + name_bytes + extra, entry.nbytes, entry.is_stored)

    spans = thread_map(span, entries) if is_remote else map(span, entries)
    return {entry.name: each for entry, each in zip(entries, spans, strict=True)}
