"""Stage *verify*, fourth, for checkpoints that are not on this machine: the addresses in the record are opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.context import OnProgress
from ckavg.errors import CkavgError, CorruptFileError, SettingError
from ckavg.output.record import Input
from ckavg.output.side_files import MOST_BYTES
from ckavg.remote.fetching import fetch_all
from ckavg.remote.listing import INDEX, tree_at
from ckavg.remote.mirror import Mirror
from ckavg.remote.store import Tree
from ckavg.storage.address import Address, address_of
from ckavg.verify.findings import Finding


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The checkpoints of a record that are not on this machine.

    Attributes:
        mirror: where they are shown.
        checkpoints: by index; None for those that take no part, are on this machine, or are not what they were.
        findings: why they are not.
    """

    mirror: Mirror
    checkpoints: tuple[Checkpoint | None, ...]
    findings: tuple[Finding, ...]


def is_elsewhere(recorded: Input) -> bool:
    """Whether a checkpoint is known by an address, be it of a kind that is read or not."""
    try:
        return address_of(recorded.directory) is not None
    except SettingError:
        return True


def places_of(inputs: Iterable[Input]) -> tuple[str, ...]:
    """The repositories and buckets that checkpoints lie in, each with their number. Asks none of them."""
    found: Counter[str] = Counter()
    for recorded in inputs:
        with suppress(SettingError):  # of a kind that is not read: said in its turn
            address = address_of(recorded.directory)
            if address is not None:
                parts = address.place.split("/")[: 3 if address.scheme == "hf" else 1]  # a repository, or a bucket
                found[str(Address(address.scheme, "/".join(parts)))] += 1
    return tuple(f"{place} ({count} checkpoints)" for place, count in found.items())


def open_elsewhere(inputs: Sequence[Input], *, first: int) -> Elsewhere:
    """Open the checkpoints that have addresses: their headers are fetched, none of their weights.

    Args:
        inputs: of the record.
        first: index of the first checkpoint that takes part.
    """
    mirror = Mirror("sources")
    checkpoints: list[Checkpoint | None] = []
    found: list[Finding] = []
    for index, recorded in enumerate(inputs):
        checkpoint = None
        if index >= first:
            try:
                address = address_of(recorded.directory)
                if address is not None:
                    checkpoint = _opened(mirror, address, recorded, mirror.root / str(index))
            except CkavgError as error:
                found.append(Finding("sources", f"step {recorded.step}: {mirror.told(error.message)}"))
        checkpoints.append(checkpoint)
    mirror.seal()
    identified = (None if each is None else mirror.identified(each) for each in checkpoints)
    return Elsewhere(mirror, tuple(identified), tuple(found))


def fetch_elsewhere(elsewhere: Elsewhere, on_progress: OnProgress | None) -> None:
    """Fetch all of their weights, for what reads single elements.

    Raises:
        SettingError: there is no room for them.
        HubError, ReadError: they could not be fetched.
    """
    here = [each for each in elsewhere.checkpoints if each is not None]
    fetch_all(elsewhere.mirror, [shard.path for each in here for shard in each.shards], on_progress)


def _opened(mirror: Mirror, address: Address, recorded: Input, place: Path) -> Checkpoint:
    tree = tree_at(address)
    for name, size in recorded.files.items():
        there = tree.files.get(name)
        if there is None:
            raise CorruptFileError(f"{address}/{name} is not there; it was averaged.")
        if there.size != size:
            raise CorruptFileError(
                f"{address}/{name} is {there.size:,} bytes long; it was {size:,} when it was averaged."
            )
    mirror.add(place, tree, recorded.files)
    folders = {str(PurePosixPath(name).parent) for name in recorded.files}
    mirror.bring(place, tree, [name for name in tree.files if _tells_parts(tree, name, folders)])
    mirror.open_headers(place / name for name in recorded.files)
    return read_checkpoint(place, recorded.step)


def _tells_parts(tree: Tree, name: str, folders: Collection[str]) -> bool:
    """Whether a file tells which weight files are loaded as one, and so how the names of their tensors begin."""
    path = PurePosixPath(name)
    tells = name == "model_index.json" or (INDEX in path.name and str(path.parent) in folders)
    return tells and tree.files[name].size <= MOST_BYTES
