"""Stage *discover*: read the tensors of a `torch.save` file like a header, without executing anything in it.

The file is a zip archive. Its `data.pkl` describes each tensor and names the file of the archive with its elements.
Those files are uncompressed, so the engine reads them in place. All statements are checked first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckavg.checkpoints.archives import FIRST_BYTES, CutOffError, Span, read_directory, reader
from ckavg.checkpoints.headers import LARGEST, RESAVE, STILL_WRITTEN, Header, product, shown
from ckavg.checkpoints.model_names import count_moments
from ckavg.checkpoints.run import ITEM_BYTES, TensorInfo
from ckavg.checkpoints.saved_tensors import DTYPES, STORAGES
from ckavg.checkpoints.state_dict import find_weights_in, step_of
from ckavg.checkpoints.unpickler import Global, Opaque, unpickled
from ckavg.errors import CorruptFileError, MissingShardError, ReadError, TruncatedShardError
from ckavg.storage.base import AnyPath, FileInfo, RemotePath
from ckavg.storage.local import storage_of

_MOST_PICKLE_BYTES = 64_000_000
_MOST_DIMENSIONS = 64
_HEAD_BYTES = 64
_LEGACY = (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"sys_info\0")
"""The first bytes of the layouts before torch 1.6, and before 0.2."""


class UnreadPickleError(Exception):
    """A valid file of `torch.save` with unsupported content; the message continues after the file's name.

    Args:
        why: such as "is a TorchScript program".
        can_convert: whether loading it and saving it again makes it a supported file.
    """

    def __init__(self, why: str, *, can_convert: bool = True) -> None:
        super().__init__(why)
        self.why = why
        self.can_convert = can_convert


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage of elements: one file of the archive. `dtype` is a code, or the class if that has none."""

    key: str
    dtype: Any


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as described by the pickle; `offset` is in bytes of its storage. `problem` says why it cannot be read,
    and `can_convert` whether torch can save it again in a supported form.
    """

    dtype: str = ""
    shape: tuple[int, ...] = ()
    key: str = ""
    offset: int = 0
    problem: str = ""
    can_convert: bool = False


@dataclass(frozen=True, slots=True)
class _Saved:
    """The saved value of a file, and the positions of the archive's files, by name without that of the archive."""

    value: Any
    spans: Mapping[str, Span]
    info: FileInfo


def read_pickle(path: AnyPath, *, shard: int = 0) -> Header:
    """The tensors of the model in a file of `torch.save`, which is number `shard` of its checkpoint. The header is
    empty if the file holds no tensors.

    Raises:
        MissingShardError, ReadError: there is no such file, or it cannot be read.
        TruncatedShardError: the file has no end.
        CorruptFileError: it is damaged, or not a file of torch.
        UnreadPickleError: it has an older layout, or the model has tensors of an unsupported kind.
    """
    saved = _read(path)
    try:
        tensors, left_out = find_weights_in(saved.value, _Tensor)
        entries = {name: _located(name, tensor, saved.spans, shard) for name, tensor in tensors.items()}
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} cannot be read: {error}.", hint=RESAVE) from error
    in_order = sorted(
        entries, key=lambda name: entries[name].offset
    )  # stable: of several names for one tensor, the first stays first
    entries = {name: entries[name] for name in in_order}
    return Header(entries, saved.info, {}, count_moments(entries), left_out=tuple(left_out))


def is_saved_by_torch(path: AnyPath) -> bool:
    """Whether a file begins like those of `torch.save`; True if it cannot be read, since reading it reports that."""
    try:
        with storage_of(path).open(path) as (_, read):
            return read(_HEAD_BYTES).startswith((FIRST_BYTES, *_LEGACY))
    except OSError:
        return True


def pickled_step(path: AnyPath) -> int | None:
    """The optimizer step that a trainer saved beside the model; None if it saved none.

    Raises:
        CkavgError, UnreadPickleError: see `read_pickle`.
    """
    return step_of(_read(path).value)


def _read(path: AnyPath) -> _Saved:
    try:
        with storage_of(path).open(path) as (info, read_next):
            first = read_next(_HEAD_BYTES)
        if not first.startswith(FIRST_BYTES):
            raise _not_an_archive(path, first)
        read = reader(path, info.nbytes)
        spans = _without_prefix(read_directory(read, info.nbytes, is_remote=isinstance(path, RemotePath)))
        pickle = spans["data.pkl"]
        if pickle.nbytes > _MOST_PICKLE_BYTES:
            raise ValueError(f"its pickle is longer than {_MOST_PICKLE_BYTES:,} bytes")
        value = unpickled(read(pickle.start, pickle.start + pickle.nbytes), known=_KNOWN, persistent=_storage)
        order = spans.get("byteorder")
        if order is not None and (order.nbytes != 6 or read(order.start, order.start + 6) != b"little"):
            raise UnreadPickleError("was saved by a machine with another byte order")
    except FileNotFoundError as error:
        raise MissingShardError(f"{path} does not exist.", hint=STILL_WRITTEN) from error
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror}.", hint="Check that you may read it.") from error
    except CutOffError as error:
        raise TruncatedShardError(f"{path} is cut off: {error}.", hint=STILL_WRITTEN) from error
    except ValueError as error:
        raise CorruptFileError(f"{path} cannot be read: {error}.", hint=RESAVE) from error
    return _Saved(value, spans, info)


def _not_an_archive(path: AnyPath, first: bytes) -> Exception:
    if not first:
        return TruncatedShardError(f"{path} is empty.", hint=STILL_WRITTEN)
    if first.startswith(_LEGACY):
        return UnreadPickleError("has the layout that torch wrote before 1.6")
    if first.startswith(b"\x80"):
        return UnreadPickleError("is a pickle that torch.save did not write", can_convert=False)
    return CorruptFileError(f"{path} is not a file of torch.save: it does not begin like a zip archive.", hint=RESAVE)


def _without_prefix(found: Mapping[str, Span]) -> dict[str, Span]:
    """The files of an archive, by name without the prefix of the archive."""
    (prefix, *more) = [name[:-8] for name in found if name.count("/") == 1 and name.endswith("/data.pkl")] or [""]
    spans = {name.removeprefix(prefix): span for name, span in found.items() if prefix and name.startswith(prefix)}
    if "constants.pkl" in spans:
        raise UnreadPickleError("is a TorchScript program", can_convert=False)
    if "data.pkl" not in spans or more:
        raise ValueError("it is a zip archive that torch.save did not write")
    packed = next((name for name, span in spans.items() if not span.is_stored), None)
    if packed is not None:
        raise ValueError(f"its file {shown(packed)} is compressed or encrypted")
    return spans


def _located(name: str, tensor: _Tensor, spans: Mapping[str, Span], shard: int) -> TensorInfo:
    """The position of a tensor in the file, checked against the sizes of both."""
    if tensor.problem:
        why = f"holds tensor {shown(name)}, which {tensor.problem}"
        raise UnreadPickleError(why, can_convert=tensor.can_convert)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{shown(name)} is not valid Unicode") from error
    nbytes = product(ITEM_BYTES[tensor.dtype], tensor.shape)
    span = spans.get(f"data/{tensor.key}")
    if span is None or nbytes is None or tensor.offset + nbytes > span.nbytes:
        there = "none" if span is None else f"{span.nbytes:,}"
        raise ValueError(
            f"tensor {shown(name)} ({tensor.dtype}, {shown(tensor.shape)}) begins at byte {tensor.offset:,} of its "
            f"storage, which has {there}"
        )
    return TensorInfo(tensor.dtype, tensor.shape, shard, span.start + tensor.offset)


# --- names that a pickle may use ---


def _storage(identifier: Any) -> Any:
    """The storage of a persistent id: its class, its file, its device, and its number of elements."""
    if type(identifier) is not tuple or len(identifier) != 5 or identifier[0] != "storage":
        return Opaque("persistent", ())
    _, dtype, key, _, _ = identifier
    if type(key) is not str:
        raise ValueError("the pickle describes a storage incorrectly")
    return _Storage(key, dtype)


def _typed(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _Tensor:
    """A tensor whose dtype is given by the class of its storage."""
    metadata = more[2] if len(more) > 2 else None
    return _tensor(storage, storage.dtype, offset, shape, stride, metadata)


def _untyped(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> _Tensor:
    """A tensor with its own dtype."""
    return _tensor(storage, dtype, offset, shape, stride, metadata)


def _tensor(storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any, metadata: Any) -> _Tensor:
    if not (type(storage) is _Storage and type(offset) is int and 0 <= offset <= LARGEST):
        raise ValueError("the pickle describes a tensor incorrectly")
    if not (_are_counts(shape) and _are_counts(stride) and len(shape) == len(stride)):
        raise ValueError("the pickle describes the shape of a tensor incorrectly")
    if type(dtype) is not str or dtype not in ITEM_BYTES:
        return _Tensor(problem=f"has an unsupported dtype, {dtype.name}" if type(dtype) is Global else "has no dtype")
    if metadata:
        return _Tensor(problem="is conjugated or negated when it is read")
    if 0 not in shape and not _is_contiguous(shape, stride):
        why = "is not stored in the order of its elements: it is transposed, or a part of another"
        return _Tensor(problem=why, can_convert=True)
    return _Tensor(dtype, tuple(shape), storage.key, offset * ITEM_BYTES[dtype])


def _are_counts(values: Any) -> bool:
    return (
        type(values) is tuple
        and len(values) <= _MOST_DIMENSIONS
        and all(type(number) is int and 0 <= number <= LARGEST for number in values)
    )


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _same(tensor: Any, *_: Any) -> Any:
    """A parameter is its tensor."""
    return tensor


def _from_type(function: Any, _kind: Any, args: Any, _state: Any) -> Any:
    """A tensor with attributes, or of a subclass that is stored like a plain tensor."""
    if function not in (_typed, _untyped, _same) or type(args) is not tuple:
        return _Tensor(problem="is of an unsupported class")
    return function(*args)


def _unread(problem: str) -> Any:
    return lambda *_: _Tensor(problem=problem)


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("torch", "Size"): lambda values=(): tuple(values),
    **{("torch", name): code for name, code in {**DTYPES, **STORAGES}.items()},
    ("torch._utils", "_rebuild_tensor"): _typed,
    ("torch._utils", "_rebuild_tensor_v2"): _typed,
    ("torch._utils", "_rebuild_tensor_v3"): _untyped,
    ("torch._utils", "_rebuild_parameter"): _same,
    ("torch._utils", "_rebuild_parameter_with_state"): _same,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch._utils", "_rebuild_qtensor"): _unread("is quantized"),
    ("torch._utils", "_rebuild_sparse_tensor"): _unread("is sparse"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _unread("is sparse"),
    ("torch._utils", "_rebuild_nested_tensor"): _unread("is nested"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unread("has no elements: it was on the meta device"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _unread("is of an unsupported class"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _unread("is of an unsupported device"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _unread("is of an unsupported device"),
}
"""The only names that a pickle can use; each gives a plain value of ours."""
