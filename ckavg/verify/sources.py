"""`verify --sources` and `--replay`: where the checkpoints are now, and whether they are what was averaged.

A record says where they were. A run that was moved is looked for beside the result, where it was before, and where the
user says that it is.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.run import Checkpoint, TensorInfo
from ckavg.errors import CkavgError, CorruptFileError, ReadError
from ckavg.output.published import Local, read_local
from ckavg.output.record import BASE_MODEL, Input, Record
from ckavg.storage.local import open_regular
from ckavg.verify.findings import Report
from ckavg.verify.remote import is_remote, open_remote

_ACTING = ("/net/", "/sys/", "/proc/")
"""To look below `/net` is to mount what another machine offers; files of the kernel act when they are read."""

_LENGTH = 8
"""Bytes that state the length of a header."""

Place = Mapping[str, Path]
"""Where the weight files of a checkpoint may be, by their names in the record."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The checkpoints of a result.

    Attributes:
        checkpoints: by index; None for those that take no part, are not there, or are not what they were.
    """

    checkpoints: tuple[Checkpoint | None, ...] = ()


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
    """Find the checkpoints of a result and read their headers; sizes are compared before a file is opened.

    Args:
        report: to add to.
        record: of the result.
        directory: of the result.
        tensors: of the result, all of which every checkpoint must hold in the same shape.
        first: index of the first checkpoint that takes part.
        source: where the run is now; None: where it was.
        init: where the anchor given with `--init` is now.
        on_addresses: called with the directories in which they are read, before a file there is opened.
    """
    remote: list[Checkpoint | None] = []
    if source is None and any(is_remote(each) for each in record.inputs[first:]):
        remote, found = open_remote(record.inputs, first=first)
        report.findings += found
    local = read_local(directory)
    places: dict[int, Place] = {}
    for index, recorded in enumerate(record.inputs):
        if index >= first and (not remote or not is_remote(recorded)):
            candidates = _candidates(record, index, directory, local, source=source, init=init)
            try:
                places[index] = _first_match(recorded, candidates, is_trusted=source is not None)
            except CkavgError as error:
                report.problem("sources", f"step {recorded.step}: {error.message}")
    above = Counter(str(_directory(place).parent) for place in places.values())
    on_addresses([f"{place} ({count} checkpoints)" for place, count in above.items()])
    checkpoints: list[Checkpoint | None] = []
    for index, recorded in enumerate(record.inputs):
        checkpoint = remote[index] if remote else None
        try:
            if index in places:
                checkpoint = _opened(places[index], record, recorded)
            if checkpoint is not None:
                checkpoint = checkpoint.with_copied(frozenset(record.copied))
                is_last = index == len(record.inputs) - 1
                _check_tensors(checkpoint, tensors, skipped=() if is_last else record.copied)
        except CkavgError as error:
            report.problem("sources", f"step {recorded.step}: {error.message}")
            checkpoint = None
        checkpoints.append(checkpoint)
    return Sources(tuple(checkpoints))


def _candidates(
    record: Record, index: int, directory: Path, local: Local, *, source: Path | None, init: Path | None
) -> list[Place]:
    """Where a checkpoint may be, the likeliest first; one place alone where the user has named it."""
    recorded, output = record.inputs[index], record.output.directory
    was, is_init = Path(recorded.directory), index == 0 and record.anchor_is_init
    is_published = output == Path()  # such a record names checkpoints as seen from the run
    if is_init and init is not None:
        if init.is_file() and len(recorded.files) == 1:
            return [dict.fromkeys(recorded.files, init)]
        directories = [init]
    elif not is_init and source is not None:
        directories = [source / (was if is_published else _below(was, Path(record.source)))]
    elif is_published and was == Path(BASE_MODEL):
        directories = [Path(local.init)] if local.init else []
    elif is_published:
        upwards = directory if os.pardir in was.parts else None  # as older records have it, from the result itself
        run = Path(local.source) if local.source else None
        directories = [root / was for root in (run, directory / record.source, upwards) if root]
    elif was.is_absolute():
        directories = [was, directory / os.path.relpath(was, output)] if output.is_absolute() else [was]
    else:
        directories = [was] if output.is_absolute() else [directory / os.path.relpath(was, output), was]
    return [{name: place / name for name in recorded.files} for place in directories]


def _directory(place: Place) -> Path:
    name, path = next(iter(place.items()))
    return Path(str(path).removesuffix(name))


def _below(directory: Path, source: Path) -> Path:
    return directory.relative_to(source) if directory.is_relative_to(source) else Path(directory.name)


def _first_match(recorded: Input, candidates: Sequence[Place], *, is_trusted: bool) -> Place:
    """The first place where the files of a checkpoint have the sizes they had. Opens nothing.

    Raises:
        CkavgError: there is none; of the likeliest place, what is wrong there.
    """
    errors: list[CkavgError] = []
    for place in candidates:
        wrong = None if is_trusted else _refused(place)
        wrong = wrong or _wrong_size(place, recorded)
        if wrong is None:
            return place
        errors.append(wrong)
    if not errors:
        raise CorruptFileError("the record does not tell where it is; name it with --init or --source.")
    raise errors[0]


def _refused(place: Place) -> CkavgError | None:
    """What a record must not have us look at, since looking is an act: of other machines, or of the kernel."""
    directory = os.path.normpath(_directory(place).absolute())
    if directory.startswith(_ACTING):
        return CorruptFileError(f"{directory} is not looked at for a record. Name it with --source, if it is right.")
    return None


def _wrong_size(place: Place, recorded: Input) -> CkavgError | None:
    for name, path in place.items():
        try:
            status = path.stat()
        except (OSError, ValueError):
            return CorruptFileError(f"{path} is not there; it was averaged.")
        size, expected = status.st_size, recorded.files[name]
        if not stat.S_ISREG(status.st_mode):
            return CorruptFileError(f"{path} is not a plain file.")
        if size <= _LENGTH:
            return CorruptFileError(f"{path} is {size} bytes long: too short to hold weights.")
        if size != expected:
            return CorruptFileError(f"{path} is {size:,} bytes long; it was {expected:,} when it was averaged.")
    return None


def _opened(place: Place, record: Record, recorded: Input) -> Checkpoint:
    """The checkpoint that these files are: all or some parts of their directory, or a single file among others."""
    directory, files = _directory(place), set(place.values())
    for each in files:  # before anything beside it is looked at
        _check_length(each)
    is_single = len(files) == 1
    shares_directory = sum(each.directory == recorded.directory for each in record.inputs) > 1
    if not (is_single and shares_directory):
        try:
            whole = read_checkpoint(directory, recorded.step)
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
    """Refuse a file that does not begin as weights do."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ReadError(f"{path} cannot be read: {reason}.", hint="Check that you may read it.") from error
    if not 2 <= length <= size - _LENGTH:
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
        outputs: the results; their tensors tell which were averaged.

    Raises:
        TruncatedShardError, ReadError: a file became shorter meanwhile, or cannot be read.
    """
    from ckavg.engine.blocks import TILE, Block, cut_blocks
    from ckavg.engine.checksums import checksums
    from ckavg.engine.context import Context
    from ckavg.engine.stream import stream
    from ckavg.engine.tiles import TileReader

    unread = [str(each.step) for each in record.inputs if each.checksum is None]
    if unread:
        no_part = "took no part in the average" + (", and have no checksums" if len(unread) > 1 else "")
        report.warning("sources", f"Not read, then and now: step {', '.join(unread)} {no_part}.")
    pairs = zip(sources.checkpoints, record.inputs, strict=True)
    here = [(each, recorded) for each, recorded in pairs if each is not None and recorded.checksum is not None]
    read = [checkpoint for checkpoint, _ in here]
    like = (*read, *outputs)[-1].entries if here or outputs else {}
    names = [name for name, entry in like.items() if entry.is_floating and entry.numel]
    if not read or not names:
        return
    blocks = cut_blocks({name: read[-1].entries[name] for name in names})

    def make_worker(reader: TileReader) -> Callable[[Block], tuple[str, ...]]:
        def hashes(block: Block) -> tuple[str, ...]:
            sums = reader.sum_up(block)
            for start, stop in block.tiles(TILE):
                for index, checkpoint in enumerate(read):
                    item = checkpoint.entries[block.name].item_bytes
                    reader.raw(index, block.name, start * item, stop * item)
            return sums.hashes()

        return hashes

    listen = report.listener("sources")
    context = Context(on_progress=lambda news: listen(news.done, news.total))
    streamed = stream("sources", read, blocks, make_worker, context)
    report.bytes_read += streamed.bytes_read
    for (checkpoint, recorded), checksum in zip(here, checksums(read, blocks, streamed.results), strict=True):
        if checksum != recorded.checksum:
            changed = f"step {recorded.step}: the weights in {checkpoint.path} are not those that were averaged"
            sums = f"their checksum is {checksum[:12]}…, it was {recorded.checksum}."
            report.problem("sources", f"{changed}: {sums}")
