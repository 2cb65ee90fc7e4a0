"""Stage *verify*, fourth, for checkpoints that are not on this machine: the addresses in the record are opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import PurePosixPath

from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.run import Checkpoint
from ckavg.errors import CkavgError, CorruptFileError, SettingError
from ckavg.output.record import Input
from ckavg.storage.address import Address, address_of
from ckavg.storage.download import thread_map
from ckavg.storage.remote import open_storage
from ckavg.verify.findings import Finding

_INDEX = ".safetensors.index"


def is_remote(recorded: Input) -> bool:
    """Whether a checkpoint is known by an address, be it of a kind that is read or not."""
    try:
        return address_of(recorded.directory) is not None
    except SettingError:
        return True


def addresses_in(inputs: Iterable[Input]) -> tuple[str, ...]:
    """The repositories and buckets that checkpoints lie in, each with their number. Asks none of them."""
    found: Counter[str] = Counter()
    for recorded in inputs:
        with suppress(SettingError):  # of a kind that is not read: said in its turn
            address = address_of(recorded.directory)
            if address is not None:
                parts = address.place.split("/")[: 3 if address.scheme == "hf" else 1]  # a repository, or a bucket
                found[str(Address(address.scheme, "/".join(parts)))] += 1
    return tuple(f"{place} ({count} checkpoints)" for place, count in found.items())


def open_remote(inputs: Sequence[Input], *, first: int) -> tuple[list[Checkpoint | None], list[Finding]]:
    """Open the checkpoints that have addresses: their headers are fetched, none of their weights.

    Args:
        inputs: of the record.
        first: index of the first checkpoint that takes part.

    Returns:
        The checkpoints by index, None for those that take no part, are on this machine, or are not what they were; and
        why they are not.
    """

    def opened(index: int) -> Checkpoint | CkavgError | None:
        try:
            address = address_of(inputs[index].directory) if index >= first else None
            return None if address is None else _opened(address, inputs[index])
        except CkavgError as error:
            return error

    outcomes = thread_map(opened, range(len(inputs)))
    found = [
        Finding("sources", f"step {recorded.step}: {outcome.message}")
        for recorded, outcome in zip(inputs, outcomes, strict=True)
        if isinstance(outcome, CkavgError)
    ]
    return [None if isinstance(outcome, CkavgError) else outcome for outcome in outcomes], found


def _opened(address: Address, recorded: Input) -> Checkpoint:
    folders = {str(PurePosixPath(name).parent) for name in recorded.files}

    def is_shown(name: str) -> bool:
        """Weights that were averaged, and what tells which of them are loaded as one: so the names of tensors begin."""
        path = PurePosixPath(name)
        is_index = _INDEX in path.name and str(path.parent) in folders
        return name in recorded.files or name == "model_index.json" or is_index

    storage = open_storage(address, show=is_shown)
    for name, size in recorded.files.items():
        there = storage.info(storage.root / name)
        if there is None:
            raise CorruptFileError(f"{address}/{name} is not there; it was averaged.")
        if there.nbytes != size:
            raise CorruptFileError(
                f"{address}/{name} is {there.nbytes:,} bytes long; it was {size:,} when it was averaged."
            )
    return read_checkpoint(storage.root, recorded.step)
