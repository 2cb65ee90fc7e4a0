"""The weight files of a result: their layout, how several threads write tiles into them, and SHA-256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ckavg.checkpoints.headers import KNOWN_HASHES
from ckavg.checkpoints.run import DTYPE_NAMES, ITEM_BYTES, Checkpoint, Shard, TensorInfo
from ckavg.engine.job import SECONDS_BETWEEN_LOOKS
from ckavg.errors import ReadError, WriteError
from ckavg.storage.atomic import create_whole

if TYPE_CHECKING:
    from torch import Tensor

# Write-only: a network file system then writes only the given bytes instead of whole pages.
_WRITE = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW

_CODES = {name: code for code, name in DTYPE_NAMES.items()}
_ALIGNMENT = 8
_as_text = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_quoted = json.encoder.encode_basestring
_IN_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
"""The order of dtypes in a file of the safetensors library; tensors of one dtype are ordered by name."""

_FLAT_NAME = "model.safetensors"
LARGEST_SHARD = 5_000_000_000
"""Bytes of tensors in a file, for a result that does not take over the shards of its checkpoints."""

_LEGACY_START, _LEGACY_BYTES = 1 << 20, 1 << 16
_MOST_THREADS = 8
HASHED_AT_ONCE = 1 << 20
"""Bytes read at once of a file that is hashed."""


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One safetensors file to write.

    Attributes:
        name: its path in the result.
        header: its first bytes, length prefix included.
        offsets: where each tensor begins in the file, in bytes.
        nbytes: its size.
        part: of the model; see `Shard`.
        metadata: the `__metadata__` of its header.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int
    part: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """All weight files of a result, and the output dtype of every floating tensor, as a safetensors code."""

    shards: tuple[ShardPlan, ...]
    dtypes: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def names(self) -> list[str]:
        """Their names, those of the largest part first."""
        return [
            shard.name for shard in sorted(self.shards, key=lambda one: -sum(each.nbytes for each in self.of(one.part)))
        ]

    def of(self, part: str = "") -> list[ShardPlan]:
        """The files of a part."""
        return [shard for shard in self.shards if shard.part == part]

    def index_of(self, part: str = "") -> tuple[dict[str, str], int]:
        """The content of a part's shard index: the file of every tensor, and the total bytes."""
        shards = self.of(part)
        files = {PurePath(shard.name).name: shard.offsets for shard in shards}
        placed = {name.removeprefix(part): file for file, offsets in files.items() for name in offsets}
        return dict(sorted(placed.items())), sum(shard.nbytes - len(shard.header) for shard in shards)


def plan_weights(like: Checkpoint, dtype: str = "source", *, file_name: str = "") -> WeightPlan:
    """Lay out the result with the file names, shards and header metadata of its last checkpoint.

    Floating tensors get `dtype`: `source` (their own), `float32`, `bfloat16`, `float16` or `float64`. If the
    checkpoints are single files, the result is one, named `file_name`. So is the result of checkpoints in other
    formats, in shards of at most 5 GB.
    """
    out = {
        name: entry.dtype if dtype == "source" or not entry.is_floating else _CODES[dtype]
        for name, entry in like.entries.items()
    }
    floating = {name: code for name, code in out.items() if like.entries[name].is_floating}
    if like.saved_as and like.kind != "file":
        return WeightPlan(_cut(like.entries, out, file_name), floating)
    by_shard: list[dict[str, TensorInfo]] = [{} for _ in like.shards]
    for name, entry in like.entries.items():
        by_shard[entry.shard][name] = entry
    names = (file_name or _FLAT_NAME,) if like.kind == "file" else like.names_of_result
    shards = tuple(
        _plan_shard(name, entries, out, shard)
        for name, entries, shard in zip(names, by_shard, like.shards, strict=True)
    )
    return WeightPlan(shards, floating)


def _cut(entries: Mapping[str, TensorInfo], dtypes: Mapping[str, str], file_name: str) -> tuple[ShardPlan, ...]:
    """One file for all tensors; if it would be too large, several, named as transformers names them."""
    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, entry in sorted(entries.items()):
        nbytes = entry.numel * ITEM_BYTES[dtypes[name]]
        if groups[-1] and size + nbytes > LARGEST_SHARD:
            groups.append({})
            size = 0
        groups[-1][name] = entry
        size += nbytes
    stem, count = file_name.removesuffix(".safetensors"), len(groups)
    names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return tuple(
        _plan_shard(name, group, dtypes)
        for name, group in zip(names if count > 1 else [file_name], groups, strict=True)
    )


def _plan_shard(
    file: str, entries: Mapping[str, TensorInfo], dtypes: Mapping[str, str], source: Shard | None = None
) -> ShardPlan:
    """Lay out one file, in the order of its source, or in that of the safetensors library for other formats.

    In the file, names of tensors lack the name of the part.
    """
    part, metadata = (source.part, source.metadata) if source is not None else ("", {})
    keeps_order = source is not None and source.saved_as == source.path.name

    def place(name: str) -> tuple[int, int, str]:
        # Widest items first, as the safetensors library lays them out: every tensor is aligned to its item size.
        entry = entries[name]
        of_source = entry.offset if keeps_order else _IN_ORDER.index(entry.dtype)
        return -ITEM_BYTES[dtypes[name]], of_source, name

    to_come = {key: "0" * digits for key, digits in KNOWN_HASHES.items() if key in metadata}
    metadata = {**metadata, **to_come} or {"format": "pt"}
    declared = bytearray(_as_text({"__metadata__": metadata})[:-1].encode())
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(entries, key=place):
        offsets[name], end = end, end + entries[name].numel * ITEM_BYTES[dtypes[name]]
        key, shape = _quoted(name.removeprefix(part)), ",".join(map(str, entries[name].shape))
        tensor = f',{key}:{{"dtype":"{dtypes[name]}","shape":[{shape}],"data_offsets":[{offsets[name]},{end}]}}'
        declared += tensor.encode()
    header = _as_header(declared + b"}")
    for name in offsets:
        offsets[name] += len(header)
    return ShardPlan(file, header, offsets, len(header) + end, part, metadata)


def _as_header(declared: bytes | bytearray) -> bytes:
    """The first bytes of a safetensors file, as the safetensors library writes them, from its JSON."""
    padding = -len(declared) % _ALIGNMENT
    return b"".join((struct.pack("<Q", len(declared) + padding), declared, b" " * padding))


class WeightFiles:
    """The weight files of a result, written tile by tile from several threads.

    Args:
        directory: where they go; created if it does not exist.
        shards: their layout.
        create: create the files. One process does so, unless an interrupted attempt has.
        keep_open: keep all files open. If there are too many, each is opened for every tile.

    Raises:
        WriteError: a file cannot be written.
    """

    def __init__(
        self, directory: Path, shards: tuple[ShardPlan, ...], *, create: bool = True, keep_open: bool = True
    ) -> None:
        self._paths = {directory / shard.name: shard for shard in shards}
        self._first, *others = self._paths.items()
        self._others = {name: file for file in others for name in file[1].offsets}
        self._open: dict[Path, int] = {}
        for path, shard in self._paths.items():
            with write_errors(path):
                if create:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _create(path, shard)
                if keep_open:
                    self._open[path] = os.open(path, _WRITE)

    def put(self, name: str, offset: int, values: Tensor) -> None:
        """Write bytes of tensor `name`, beginning at its byte `offset`: (n,) uint8 in CPU memory."""
        path, shard = self._others.get(name, self._first)
        with self._handle(path) as handle:
            _write_at(handle, values.numpy().data, shard.offsets[name] + offset)

    def put_whole(self, tensors: Mapping[str, memoryview]) -> None:
        """Write whole tensors; those side by side in a file at once."""
        from ckavg.engine.coalescing import side_by_side  # imports torch

        files = ((self._others.get(name, self._first), name, data) for name, data in tensors.items())
        placed = ((path, shard.offsets[name], data) for (path, shard), name, data in files)
        for path, start, parts in side_by_side(placed):
            with self._handle(path) as handle:
                _write_at(handle, memoryview(b"".join(parts)), start)

    def sync(self) -> None:
        """Wait until every byte is on the disk."""
        for path in self._paths:
            with self._handle(path) as handle:
                os.fsync(handle)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    @contextmanager
    def _handle(self, path: Path) -> Iterator[int]:
        with write_errors(path):
            if path in self._open:
                yield self._open[path]
                return
            handle = os.open(path, _WRITE)
            try:
                yield handle
            finally:
                os.close(handle)


def write_own_hashes(path: Path, shard: ShardPlan) -> None:
    """Write the hashes of its tensors into the header of a finished file, if the header has such entries (sd-scripts).

    `sshs_model_hash` is the SHA-256 of everything after the header. `sshs_legacy_hash` is 8 digits of the SHA-256 of
    64 KiB at 1 MiB into the file, taken as if its header had only the training entries.

    Raises:
        WriteError: the file cannot be read or written.
    """
    if not KNOWN_HASHES.keys() & shard.metadata.keys():
        return
    declared = json.loads(shard.header[8:])
    of_training = {key: value for key, value in shard.metadata.items() if key.startswith("ss_")}
    head = _as_header(_as_text(declared | {"__metadata__": of_training}).encode())
    with write_errors(path), os.fdopen(os.open(path, _WRITE & ~os.O_WRONLY | os.O_RDWR), "r+b") as file:
        file.seek(len(shard.header))
        whole = hashlib.file_digest(file, "sha256").hexdigest()
        piece = head[_LEGACY_START : _LEGACY_START + _LEGACY_BYTES]
        file.seek(len(shard.header) + max(0, _LEGACY_START - len(head)))
        piece += file.read(_LEGACY_BYTES - len(piece))
        hashes = {"sshs_model_hash": whole, "sshs_legacy_hash": sha256(piece)[:8]}
        stated = {key: hashes.get(key, value) for key, value in shard.metadata.items()}
        file.seek(0)
        file.write(_as_header(_as_text(declared | {"__metadata__": stated}).encode()))


def _create(path: Path, shard: ShardPlan) -> None:
    # For appending: if the file system cannot reserve blocks, the C library would otherwise write to every one.
    handle = os.open(path, _WRITE | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
    try:
        _write_at(handle, memoryview(shard.header), 0)
        _reserve(handle, shard.nbytes)
        os.truncate(handle, shard.nbytes)
    finally:
        os.close(handle)


def create_shared(directory: Path, shards: Sequence[ShardPlan]) -> None:
    """Create weight files, possibly in several processes at once: each appears once, with header and size.

    Raises:
        WriteError: a file cannot be written.
    """
    for path, shard in [(directory / shard.name, shard) for shard in shards]:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                create_whole(path, shard.header, nbytes=shard.nbytes)


def _reserve(handle: int, nbytes: int) -> None:
    """Reserve blocks for a file, if the file system can: writing into them is twice as fast."""
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except AttributeError:
        pass  # not on this operating system
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        count = os.pwrite(handle, data[done:], offset + done)
        if count == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += count


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a `WriteError` about `path`."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written: {error.strerror or error}.",
            hint="No incomplete result has the final name. Free some space, or choose another place with --out.",
        ) from error


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(
    paths: Sequence[Path],
    *,
    beside: Sequence[Callable[[], None]] = (),
    on_done: Callable[[int], None] = lambda place: None,
    working_on: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    on_wait: Callable[[], None] = lambda: None,
) -> list[str]:
    """SHA-256 of files in hexadecimal digits, several at a time, while the functions in `beside` run.

    Args:
        paths: the files.
        beside: functions, each called in a thread.
        on_done: called in this thread with the place of whatever is done, files first, what is beside them after that.
        working_on: entered in other threads for each piece of a file, with what is done.
        on_wait: called in this thread, several times a second.

    Raises:
        ReadError: a file cannot be read.
        Exception: what a function in `beside` raised, or `on_wait`.
    """
    with ThreadPoolExecutor(min(_MOST_THREADS, (os.cpu_count() or 1) + len(beside))) as executor:
        try:
            others = [executor.submit(each) for each in beside]
            hashed = [executor.submit(_sha256_of_file, path, working_on) for path in paths]
            futures: list[Future[Any]] = [*hashed, *others]
            places = {each: place for place, each in enumerate(futures)}
            left = set(places)
            while left:
                done, left = wait(left, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                on_wait()
                for each in done:
                    each.result()
                    on_done(places[each])
            return [each.result() for each in hashed]
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _sha256_of_file(path: Path, working_on: Callable[[str], AbstractContextManager[Any]]) -> str:
    digest, piece, size = hashlib.sha256(), memoryview(bytearray(HASHED_AT_ONCE)), 1
    try:
        with path.open("rb", buffering=0) as file:
            while size:
                with working_on(f"hashing {path.name}"):
                    size = file.readinto(piece)
                    digest.update(piece[:size])
        return digest.hexdigest()
    except OSError as error:
        raise ReadError(
            f"{path} cannot be read: {error.strerror}.", hint="Check the disk and your permissions."
        ) from error
