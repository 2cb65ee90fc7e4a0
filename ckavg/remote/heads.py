"""Stage *remote*: the first bytes of a weight file, its header among them."""

from __future__ import annotations

import struct

from ckavg.checkpoints.headers import MAX_HEADER_BYTES
from ckavg.remote.store import Tree

HEAD_BYTES = 64 << 10
"""How much of a file is read for its header at first; most headers are shorter."""

_LENGTH = struct.Struct("<Q")


def head_of(tree: Tree, name: str) -> bytes:
    """The first bytes of a weight file, its header among them.

    Raises:
        HubError, ReadError: they could not be fetched.
    """
    size, kept = tree.files[name].size, tree.kept(name)
    if kept is not None:
        with kept.open("rb") as file:
            head = file.read(min(size, HEAD_BYTES))
            return head + file.read(_missing(head, size))
    head = tree.read(name, 0, min(size, HEAD_BYTES)) if size else b""
    rest = _missing(head, size)
    return head + tree.read(name, len(head), len(head) + rest) if rest else head


def _missing(head: bytes, size: int) -> int:
    """How many bytes of the header are not in the first ones. A length that cannot be is left to who reads it."""
    if len(head) < _LENGTH.size:
        return 0
    end = _LENGTH.size + _LENGTH.unpack(head[: _LENGTH.size])[0]
    return max(0, end - len(head)) if end <= min(size, MAX_HEADER_BYTES) else 0
