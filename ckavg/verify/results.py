"""Lists the results of a run: what their records say, and whether they are up to date. Reads no weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.fingerprints import fingerprint_files
from ckavg.errors import CkavgError, ReadError, RecordError, listed
from ckavg.output.output_path import CARD, PLOT, is_result
from ckavg.output.published import Local, read_local
from ckavg.output.record import MOST_BYTES, Record, parse_record, read_record
from ckavg.output.staging import bring_back_all
from ckavg.storage.address import Address, AddressPath, address_of
from ckavg.storage.base import AnyPath
from ckavg.storage.objects import ObjectTree
from ckavg.verify.sources import locate

State = Literal["up to date", "sources changed", "copied or edited", "unknown"]


@dataclass(frozen=True, slots=True)
class Result:
    """A directory with a record.

    Attributes:
        directory: its path.
        record: its content; None if it is invalid.
        made: when its weights were written, in seconds since 1970; None if there are none.
        state: whether its checkpoints and its files are unchanged since it was made; `unknown` if the checkpoints are
            not on this machine, or cannot be compared.
        problem: what is wrong with it; empty if nothing is.
    """

    directory: Path
    record: Record | None
    made: float | None
    state: State
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        names = (
            *("scheme", "parameters", "selection", "steps", "dtype", "ckavg_version"),
            *("evaluation", "effective_count", "mean_age", "anchor_weight"),
        )
        said = {} if self.record is None else self.record.to_dict()
        return {
            "name": self.directory.name,
            "directory": str(self.directory),
            **{name: said.get(name) for name in names},
            "made_at": self.made and datetime.fromtimestamp(self.made, UTC).isoformat(timespec="seconds"),
            "state": self.state,
            "problem": self.problem,
        }


def list_results(source: AnyPath | str) -> list[Result]:
    """The results in a directory and in its folder `averaged`, by name; for a remote run, those below the current one.

    Args:
        source: a run, a directory of results, or a result.

    Raises:
        ReadError: it cannot be listed.
    """
    address = address_of(str(source))
    home = Path(source) if address is None else Path()
    averaged = home / "averaged"
    for place in (home, averaged):
        bring_back_all(place)
    found = [home] if is_result(home) else []
    try:
        found += _results_in(home)
        found += [] if averaged.is_symlink() or not averaged.is_dir() else _results_in(averaged)
    except OSError as error:
        raise ReadError(
            f"{home} cannot be listed: {error.strerror}.", hint="Give a run, or a directory of results."
        ) from error
    results = [_examine(each) for each in found]
    if address is not None and address.scheme != "hf":
        results += _results_at(address)
    return sorted(results, key=lambda each: (each.directory.name, each.directory))


def _results_at(address: Address) -> Iterator[Result]:
    """The results at an address and in its folder `averaged`; whether they are up to date is unknown."""
    tree = ObjectTree(address)
    for name, info in tree.list_files().items():
        *folders, last = name.split("/")
        if last == RESULT_RECORD and (len(folders) < 2 or (len(folders) == 2 and folders[0] == "averaged")):
            directory = AddressPath(str(address)).joinpath(*folders)
            try:
                record = parse_record(tree.read_whole(name, info) if info.nbytes <= MOST_BYTES else b"", directory)
            except RecordError as error:
                yield Result(directory, None, None, "unknown", error.message.splitlines()[0])
            else:
                yield Result(directory, record, None, "unknown")


def _results_in(directory: Path) -> list[Path]:
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return [directory / name for name in names if not name.startswith(".") and is_result(directory / name)]


def _examine(directory: Path) -> Result:
    made = None
    with suppress(OSError, ValueError):
        made = max(path.stat().st_mtime for path in directory.rglob("*.safetensors"))
    try:
        record = read_record(directory)
    except CkavgError as error:
        return Result(directory, None, made, "unknown", error.message.splitlines()[0])
    local, files = read_local(directory), _files(record)
    if missing := [name for name in files if not (directory / name).is_file()]:
        return Result(directory, record, made, "unknown", f"{listed(missing)} is missing.")
    return Result(directory, record, made, _state(record, directory, local, files))


def _files(record: Record) -> list[str]:
    """The files of all outputs, by path in the result."""
    *snapshots, output = record.outputs
    return [f"{each.name}/{file}" for each in snapshots for file in each.files] + list(output.files)


def _state(record: Record, directory: Path, local: Local, files: Sequence[str]) -> State:
    if local.made is None:
        return "unknown"
    before, own = local.made.source_fingerprints, local.made.own_fingerprints
    try:
        fixed = [name for name in files if Path(name).name not in (CARD, PLOT, RESULT_RECORD)]
        if any(own.get(name) != fingerprint_files([directory / name]) for name in fixed):
            return "copied or edited"
        if len(before) != len(record.inputs) or None in before:
            return "unknown"
        for index, fingerprint in enumerate(before):
            place = locate(record, index, directory, local)
            if isinstance(place, Address):
                return "unknown"
            if fingerprint_files(place.values()) != fingerprint:
                return "sources changed"
    except (CkavgError, OSError):
        return "sources changed"
    return "up to date"
