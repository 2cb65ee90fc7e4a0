"""`verify --sources` and `--replay`: finds the checkpoints, and checks whether they are the averaged ones.

A record says where they were. A run is looked for where the user says, beside the result, and where it was before. For
an address, only headers are downloaded.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ckavg.checkpoints.archives import FIRST_BYTES
from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.configs import ADAPTER_CONFIG
from ckavg.checkpoints.distributed import METADATA, SLICES
from ckavg.checkpoints.run import Checkpoint, TensorInfo
from ckavg.errors import CkavgError, CorruptFileError, ReadError, SettingError
from ckavg.output.published import Local, read_local
from ckavg.output.record import BASE_MODEL, Input, Record
from ckavg.storage.address import Address, address_of
from ckavg.storage.download import thread_map
from ckavg.storage.local import open_regular
from ckavg.storage.remote import open_storage
from ckavg.verify.findings import Report

_ACTING = ("/net/", "/sys/", "/proc/")
"""Looking below `/net` mounts directories of other machines; reading files of the kernel has side effects."""

_INDEXES = (".safetensors.index", ".bin.index")
_LENGTH = 8
"""Bytes that hold the length of a header."""

Place = Mapping[str, Path]
"""Possible paths of a checkpoint's weight files, by their names in the record."""

Sources = Sequence[Checkpoint | None]
"""The checkpoints by index; None for those that take no part, are missing, or have changed."""


def is_remote(recorded: Input) -> bool:
    """Whether a checkpoint has an address, even of an unsupported kind."""
    try:
        return address_of(recorded.directory) is not None
    except SettingError:
        return True


def addresses_in(inputs: Iterable[Input]) -> tuple[str, ...]:
    """The repositories and buckets of checkpoints, each with their number. Makes no request."""
    found: Counter[str] = Counter()
    for recorded in inputs:
        with suppress(SettingError):  # of an unsupported kind: reported later
            address = address_of(recorded.directory)
            if address is not None:
                parts = address.place.split("/")[: 3 if address.scheme == "hf" else 1]  # a repository, or a bucket
                found[str(Address(address.scheme, "/".join(parts)))] += 1
    return _with_counts(found)


def _with_counts(places: Counter[str]) -> tuple[str, ...]:
    return tuple(f"{place} ({count} checkpoints)" for place, count in places.items())


def find_sources(
    report: Report,
    record: Record,
    directory: Path,
    tensors: Mapping[str, TensorInfo],
    *,
    first: int,
    source: Path | None,
    init: Path | None,
    on_addresses: Callable[[Sequence[str]], None],
) -> Sources:
    """Find the checkpoints of a result and read their headers. Sizes are compared before a file is opened.

    Args:
        report: to add to.
        record: of the result.
        directory: of the result.
        tensors: of the result; every checkpoint must have all of them in the same shape.
        first: index of the first checkpoint that takes part.
        source: directory of the run; None means where it was.
        init: directory of the anchor given with `--init`.
        on_addresses: called with the places of the checkpoints, before a file there is opened.
    """
    located: dict[int, Place | Address] = {}
    stated = record.selection.get("prefix")
    prefix = stated if isinstance(stated, str) else None
    local = read_local(directory)
    for index, recorded in enumerate(record.inputs):
        if index >= first:
            try:
                located[index] = locate(record, index, directory, local, source=source, init=init)
            except CkavgError as error:
                report.problem("sources", f"step {recorded.step}: {error.message}")
    above = (str(_directory(each).parent) for each in located.values() if not isinstance(each, Address))
    on_addresses(_with_counts(Counter(above)))

    def opened(index: int) -> Checkpoint | CkavgError:
        place, recorded = located[index], record.inputs[index]
        try:
            if isinstance(place, Address):
                checkpoint = _open_remote(place, recorded, prefix)
            else:
                checkpoint = _open_local(place, record, recorded, prefix)
            checkpoint = checkpoint.with_copied(frozenset(record.copied))
            _check_tensors(checkpoint, tensors, skipped=record.copied if index < len(record.inputs) - 1 else ())
        except CkavgError as error:
            return error
        return checkpoint

    checkpoints: list[Checkpoint | None] = [None] * len(record.inputs)
    for index, outcome in zip(located, thread_map(opened, list(located)), strict=True):
        if isinstance(outcome, CkavgError):
            report.problem("sources", f"step {record.inputs[index].step}: {outcome.message}")
        else:
            checkpoints[index] = outcome
    return checkpoints


def locate(
    record: Record,
    index: int,
    directory: Path,
    local: Local,
    *,
    source: Path | None = None,
    init: Path | None = None,
) -> Place | Address:
    """The address of a checkpoint, or the first directory in which its files have the recorded sizes. Opens nothing.

    Raises:
        CkavgError: there is none; the message is about the most likely directory.
    """
    recorded = record.inputs[index]
    if source is None and (address := address_of(recorded.directory)) is not None:
        return address
    errors: list[CkavgError] = []
    for place in _candidates(record, index, directory, local, source=source, init=init):
        wrong = None if source is not None else _refused(place)
        wrong = wrong or _wrong_size(place, recorded)
        if wrong is None:
            return place
        errors.append(wrong)
    if not errors:
        raise CorruptFileError("the record does not say where it is. Name it with --init or --source.")
    raise errors[0]


def _candidates(
    record: Record, index: int, directory: Path, local: Local, *, source: Path | None, init: Path | None
) -> list[Place]:
    """Where a checkpoint may be, the most likely first; a single place if the user named it."""
    recorded = record.inputs[index]
    was, is_init = Path(recorded.directory), index == 0 and record.anchor_is_init
    if is_init and init is not None:
        if init.is_file() and len(recorded.files) == 1:
            return [dict.fromkeys(recorded.files, init)]
        directories = [init]
    elif not is_init and source is not None:
        inside = was.relative_to(record.source) if was.is_relative_to(record.source) else Path(was.name)
        directories = [source / (inside if is_remote(recorded) else was)]
    elif was == Path(BASE_MODEL):
        directories = [Path(local.init)] if local.init else []
    else:
        directories = [root / was for root in (local.source and Path(local.source), directory / record.source) if root]
    return [{name: place / name for name in recorded.files} for place in directories]


def _directory(place: Place) -> Path:
    name, path = next(iter(place.items()))
    return Path(str(path).removesuffix(name))


def _refused(place: Place) -> CkavgError | None:
    """Refuse a path of a record whose mere lookup has side effects: on other machines, or in the kernel."""
    directory = os.path.normpath(_directory(place).absolute())
    if directory.startswith(_ACTING):
        return CorruptFileError(
            f"{directory} is not opened because a record names it. If it is right, name it with --source."
        )
    return None


def _wrong_size(place: Place, recorded: Input) -> CkavgError | None:
    for name, path in place.items():
        try:
            status = path.stat()
        except (OSError, ValueError):
            return CorruptFileError(f"{path} is missing; it was averaged.")
        size, expected = status.st_size, recorded.files[name]
        if not stat.S_ISREG(status.st_mode):
            return CorruptFileError(f"{path} is not a plain file.")
        if size <= _LENGTH:
            return CorruptFileError(f"{path} is {size} bytes long: too short to hold weights.")
        if size != expected:
            return CorruptFileError(f"{path} is {size:,} bytes long; it was {expected:,} when it was averaged.")
    return None


def _open_remote(address: Address, recorded: Input, prefix: str | None) -> Checkpoint:
    """Open a checkpoint at an address: only headers are downloaded."""
    folders = {str(PurePosixPath(name).parent) for name in recorded.files}

    def is_shown(name: str) -> bool:
        """Whether to list a file: averaged weights, and the indexes and configs that say how to load them."""
        path = PurePosixPath(name)
        is_listed = any(each in path.name for each in _INDEXES) or path.name == METADATA
        is_index = is_listed and str(path.parent) in folders
        return name in recorded.files or path.name in ("model_index.json", ADAPTER_CONFIG) or is_index

    storage = open_storage(address, show=is_shown)
    for name, size in recorded.files.items():
        there = storage.info(storage.root / name)
        if there is None:
            raise CorruptFileError(f"{address}/{name} is missing; it was averaged.")
        if there.nbytes != size:
            raise CorruptFileError(
                f"{address}/{name} is {there.nbytes:,} bytes long; it was {size:,} when it was averaged."
            )
    return read_checkpoint(storage.root, recorded.step, prefix=prefix)


def _open_local(place: Place, record: Record, recorded: Input, prefix: str | None) -> Checkpoint:
    """The checkpoint of these files: all or some parts of their directory, or a single file among others."""
    directory, files = _directory(place), set(place.values())
    for each in files:  # before other files are opened
        if each.suffix != SLICES:
            _check_length(each)
    is_single = len(files) == 1
    shares_directory = sum(each.directory == recorded.directory for each in record.inputs) > 1
    if not (is_single and shares_directory):
        try:
            whole = read_checkpoint(directory, recorded.step, prefix=prefix)
            checkpoint = whole.with_parts({shard.part for shard in whole.shards if shard.path in files})
            if {shard.path for shard in checkpoint.shards} == files:
                return checkpoint
        except CkavgError:
            if not is_single:
                raise
    if not is_single:
        raise CorruptFileError(f"{directory} holds other weights than those that were averaged.")
    return read_checkpoint(files.pop(), recorded.step)


def _check_length(path: Path) -> None:
    """Refuse a file that does not begin like a weight file."""
    try:
        with open_regular(path) as file:
            first = file.read(_LENGTH)
            length = int.from_bytes(first, "little")
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ReadError(f"{path} cannot be read: {reason}.", hint="Check that you may read it.") from error
    if not (2 <= length <= size - _LENGTH or first.startswith(FIRST_BYTES)):
        raise CorruptFileError(f"{path} is not safetensors: it claims a header of {length:,} bytes.")


def _check_tensors(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], *, skipped: Collection[str]) -> None:
    for name, entry in tensors.items():
        there = entry if name in skipped else checkpoint.entries.get(name)
        if there is None or there.shape != entry.shape or there.is_floating != entry.is_floating:
            wrong = (
                "is missing" if there is None else f"is {there.dtype} {there.shape}, not {entry.dtype} {entry.shape}"
            )
            raise CorruptFileError(f"{checkpoint.path}: tensor {name!r} {wrong}, as the result would have it.")


def check_checksums(report: Report, record: Record, sources: Sources, outputs: Sequence[Checkpoint]) -> None:
    """Read the averaged tensors of all checkpoints and compare their checksums with the record.

    Args:
        report: to add to.
        record: of the result.
        sources: the checkpoints.
        outputs: the results, whose tensors were averaged.

    Raises:
        TruncatedShardError, ReadError: a file became shorter, or cannot be read.
    """
    import torch

    from ckavg.engine.blocks import TILE, Block, cut_blocks
    from ckavg.engine.checksums import checksums
    from ckavg.engine.coalescing import Group, GroupSums, by_dtype
    from ckavg.engine.context import Context
    from ckavg.engine.stream import stream_groups
    from ckavg.engine.tiles import TileReader

    unread = [str(each.step) for each in record.inputs if each.checksum is None]
    if unread:
        no_part = "took no part in the average" + (", and have no checksums" if len(unread) > 1 else "")
        report.warning("sources", f"Not read, then and now: step {', '.join(unread)} {no_part}.")
    pairs = zip(sources, record.inputs, strict=True)
    here = [(each, recorded) for each, recorded in pairs if each is not None and recorded.checksum is not None]
    read = [checkpoint for checkpoint, _ in here]
    like = (*read, *outputs)[-1].entries if here or outputs else {}
    if not read:
        return
    names = [name for name, entry in read[-1].entries.items() if entry.is_floating and entry.numel and name in like]
    if not names:
        return
    blocks = cut_blocks({name: read[-1].entries[name] for name in names})

    def make_worker(reader: TileReader) -> Callable[[Sequence[Block]], Sequence[bytes]]:
        def hashes(blocks: Sequence[Block]) -> Sequence[bytes]:
            if len(blocks) == 1:
                return [hashes_of(blocks[0])]
            group = Group(blocks)
            sums = GroupSums(group, len(read))
            memory = torch.empty(group.size * read[-1].entries[blocks[0].name].item_bytes, dtype=torch.uint8)
            for index in range(len(read)):
                reader.raw_group(index, group, memory, sums)
            return sums.hashes()

        def hashes_of(block: Block) -> bytes:
            sums = reader.sum_up(block)
            for start, stop in block.tiles(TILE):
                for index, checkpoint in enumerate(read):
                    item = checkpoint.entries[block.name].item_bytes
                    reader.raw(index, block.name, start * item, stop * item)
            return sums.hashes()

        return hashes

    listen = report.listener("sources")
    context = Context(on_progress=lambda news: listen(news.done, news.total))
    streamed = stream_groups("sources", read, blocks, make_worker, by_dtype(read), context)
    report.bytes_read += streamed.bytes_read
    for (checkpoint, recorded), checksum in zip(here, checksums(read, blocks, streamed.results), strict=True):
        if checksum != recorded.checksum:
            changed = f"step {recorded.step}: the weights in {checkpoint.path} are not the averaged ones"
            sums = f"their checksum is {checksum[:12]}…, it was {recorded.checksum}."
            report.problem("sources", f"{changed}: {sums}")
