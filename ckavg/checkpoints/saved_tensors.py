"""Stage *discover*: tensors written by `torch.save` one after another into a file; find the data of each.

Each is a zip archive of its own: a pickle with dtype, shape and strides, some notes, and the uncompressed data. The
kilobyte before the data is read, and must agree with what is expected.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckavg.checkpoints.run import ITEM_BYTES
from ckavg.checkpoints.unpickler import Global, Opaque, unpickled

HEAD_BYTES = 1 << 10
"""First read of each archive, in bytes. The data is preceded by 700 bytes, or more if it is aligned to more than 64."""

_LONGEST_HEAD = 1 << 18
_MOST_OPCODES = 2000
_ENTRY = struct.Struct("<4s5H3L2H")
_LARGE = 0xFFFFFFFF

DTYPES: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""torch's dtypes by name, as safetensors codes."""

STORAGES: Mapping[str, str] = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
"""torch's storage classes by name, as safetensors codes."""

_STORAGES = {**STORAGES, "UntypedStorage": ""}


class NotInOrderError(ValueError):
    """The elements of a tensor are not in row-major order."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor expected in an archive of its own: name, dtype, sizes, and the place of the archive."""

    name: str
    dtype: str
    sizes: tuple[int, ...]
    offset: int
    nbytes: int


def find_data(tensor: SavedTensor, head: bytes, more: Callable[[int], bytes]) -> int:
    """The offset of a tensor's data in its file.

    Args:
        tensor: what is expected.
        head: the first bytes of its archive.
        more: returns the bytes of its archive up to an offset in the file.

    Raises:
        NotInOrderError: it is stored transposed.
        ValueError: it is not what is expected.
    """
    while True:
        try:
            return tensor.offset + _find_data(tensor, head)
        except _TooShortError:
            longest = min(_LONGEST_HEAD, tensor.nbytes)
            if len(head) >= longest:
                raise ValueError("no data was found where it should be") from None
            head = more(tensor.offset + longest)


class _TooShortError(Exception):
    """The bytes read from an archive end before its data begins."""


def _find_data(tensor: SavedTensor, head: bytes) -> int:
    at, key = 0, ""
    while True:
        name, begin, size, following = _entry(head, at)
        if at == 0:
            if not name.endswith("data.pkl"):
                raise ValueError("it is not an archive of torch.save")
            key = _check_pickle(tensor, head[begin : begin + size])
        elif name.endswith("/byteorder") and head[begin : begin + size] != b"little":
            raise ValueError("its byte order is not little-endian")
        elif name.endswith(f"/data/{key}"):
            if begin + math.prod(tensor.sizes) * ITEM_BYTES[tensor.dtype] > tensor.nbytes:
                raise ValueError("its data is longer than its place in the file")
            return begin
        at = following


def _entry(head: bytes, at: int) -> tuple[str, int, int, int]:
    """One entry of an archive: its name, the offset of its data, its size, and the offset of the next entry. For tensor
    data the size is not determined.
    """
    if len(head) < at + _ENTRY.size:
        raise _TooShortError
    mark, _, flags, method, _, _, _, packed, size, name_size, extra_size = _ENTRY.unpack_from(head, at)
    if mark != b"PK\x03\x04":
        raise ValueError("it is not an archive of torch.save")
    if method != 0 or flags & 1:
        raise ValueError("it is compressed")
    begin = at + _ENTRY.size + name_size + extra_size
    if len(head) < begin:
        raise _TooShortError
    name = head[at + _ENTRY.size :][:name_size].decode("utf-8", "replace")
    if "/data/" in name:
        return name, begin, 0, begin
    if flags & 8 == 0:
        if packed != size or size == _LARGE:
            raise ValueError("it is compressed")
        return name, begin, size, begin + size
    end = begin  # the size is stored after the data: find the place where it fits
    while True:
        end = head.find(b"PK\x07\x08", end)
        if end < 0 or len(head) < end + 28:
            raise _TooShortError
        if int.from_bytes(head[end + 8 : end + 12], "little") == end - begin:
            is_wide = head[end + 16 : end + 20] != b"PK\x03\x04"
            return name, begin, end - begin, end + (24 if is_wide else 16)
        end += 1


def _check_pickle(tensor: SavedTensor, data: bytes) -> str:
    """The name of the data that a pickle refers to; the tensor it describes must be the expected one."""
    found = unpickled(data, known={("torch", "Size"): tuple}, persistent=_Storage, most=_MOST_OPCODES)
    if type(found) is Opaque and found.name == "torch._utils._rebuild_parameter" and found.args:
        found = found.args[0]
    name = found.name.rpartition(".")[2] if type(found) is Opaque else ""
    if name not in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_tensor"):
        raise ValueError(f"it is not a plain tensor, but {name or 'something else'}")
    storage, start, sizes, strides = found.args[:4]
    dtype = storage.dtype if type(storage) is _Storage else None
    if dtype == "" and len(found.args) > 6 and type(found.args[6]) is Global:
        dtype = DTYPES.get(found.args[6].name.rpartition(".")[2])
    if dtype != tensor.dtype or sizes != tensor.sizes:
        raise ValueError(f"it is {dtype} {_shown(sizes)}, not {tensor.dtype} {_shown(tensor.sizes)}")
    if start != 0 or not _is_in_order(sizes, strides):
        raise NotInOrderError
    return str(storage.key)


class _Storage:
    """The storage of a tensor, as described by a pickle."""

    __slots__ = ("dtype", "key")

    def __init__(self, identifier: Any) -> None:
        kind, storage, self.key, *_ = identifier if type(identifier) is tuple else (None, None, None)
        if kind != "storage" or type(storage) is not Global or type(self.key) is not str:
            raise ValueError("it refers to no data")
        self.dtype = _STORAGES.get(storage.name.rpartition(".")[2])


def _is_in_order(sizes: Sequence[int], strides: Any) -> bool:
    """Whether elements with these strides are in row-major order without gaps."""
    if type(strides) is not tuple or len(strides) != len(sizes):
        return False
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _shown(value: Any) -> str:
    return repr(value)[:80]
