"""Verifies a result in order: the record, the files, the weights, the sources, the elements."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckavg import __version__
from ckavg.checkpoints.adapters import names_of_pairs
from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.context import OnProgress
from ckavg.engine.remote import fetch_all
from ckavg.errors import CkavgError, SettingError, listed
from ckavg.output.fetched import here
from ckavg.output.record import Output, Record, read_record
from ckavg.storage.address import AddressPath, address_of
from ckavg.storage.atomic import resolved
from ckavg.storage.remote import storages_of
from ckavg.verify.files import Part, check_files, check_finite, check_others, open_weights
from ckavg.verify.findings import Check, Report, Verified
from ckavg.verify.sources import addresses_in, check_checksums, find_sources

ELEMENTS = 10_000


OnAddresses = Callable[[Sequence[str]], None]

Outputs = Mapping[int, tuple[str, Checkpoint]]
"""The result and its snapshots as checkpoints, by the index after which each was written; see `Comparison`."""


def verify_result(
    result: Record | Path | str,
    *,
    replay: bool = False,
    sources: bool = False,
    source: Path | str | None = None,
    init: Path | str | None = None,
    fetch: bool = False,
    elements: int = ELEMENTS,
    seed: int | None = None,
    on_progress: OnProgress | None = None,
    on_addresses: OnAddresses | None = None,
) -> Verified:
    """Read a result again and check it against its record and, if asked for, against its sources.

    Nothing is written to the result or to the sources. But a result that a killed process had moved aside is moved back
    first.

    Args:
        result: a result, or the directory of one or of one of its snapshots; it may have been moved, renamed or
            copied. A result at an address is downloaded, and the copy removed.
        replay: compute random elements again from the checkpoints, and compare them.
        sources: read all checkpoints again, and compare their checksums with the record.
        source: directory of the checkpoints; None means where they were, relative to the result or by its record.
        init: the anchor given with `init`; None means where it was.
        fetch: read checkpoints from the repositories and buckets that the record names; a record may name any.
        elements: how many elements `replay` computes, in the result and in each of its snapshots.
        seed: of the random choice of elements; None means different ones each time.
        on_progress: called from time to time in this thread.
        on_addresses: called with the places of the checkpoints, before anything there is opened.

    Returns:
        All differences from the record. The result is reliable if `problems` is empty.

    Raises:
        RecordError: the record is missing or invalid.
        ReadError: the result cannot be read.
        SettingError: `elements` is less than 1, or `seed` is negative; the checkpoints are not on this machine and
            `fetch` is not set; or `source` or `init` is an address.
    """
    begun = time.perf_counter()
    result = result.directory if isinstance(result, Record) else result
    if elements < 1:
        raise SettingError(f"elements is {elements}; it must be 1 or more.")
    if seed is not None and seed < 0:
        raise SettingError(f"seed is {seed}; it must be 0 or more.")
    for name, place in (("source", source), ("init", init)):
        if place is not None and (address := address_of(place)) is not None:
            raise SettingError(
                f"{name} is {address}; it must be on this machine.", hint="Download it, and give the copy."
            )
    if (address := address_of(result)) is not None:
        options: dict[str, Any] = {"replay": replay, "sources": sources, "source": source, "init": init, "fetch": fetch}
        options |= {"elements": elements, "seed": seed, "on_progress": on_progress, "on_addresses": on_addresses}
        with here(Path(result), on_progress) as copy:
            return dataclasses.replace(verify_result(copy, **options), result=AddressPath(str(address)))
    directory, record, report = Path(result), read_record(Path(result)), Report(on_progress)
    source, init = Path(source) if source else None, Path(init) if init else None
    on_addresses = on_addresses or (lambda places: None)
    took_part = (index for index, each in enumerate(record.inputs) if each.checksum)
    first = min(next(took_part, 0), record.steps.index(record.anchor_step))
    addresses = addresses_in(record.inputs[first:]) if (sources or replay) and source is None else ()
    if addresses and not fetch:
        raise SettingError(
            f"The checkpoints are not on this machine; the record names {listed(addresses)}.",
            hint="If you trust these places, add --fetch to read them; or name the directory of a copy with --source.",
        )
    if addresses:
        on_addresses(addresses)
    parts = _parts(directory, record)
    _check_record(report, record, parts)
    outputs = _check_files(report, directory, record, parts)
    with report.ending("weights"):
        if not record.allow_nonfinite:
            check_finite(report, outputs.values(), infinite=record.infinite)
    checks: list[Check] = ["record", "files", "weights"]
    if sources or replay:
        from ckavg.verify.replay import check_elements

        seed = secrets.randbelow(2**32) if seed is None else seed
        outputs_only = [checkpoint for _, checkpoint in outputs.values()]
        tensors = outputs_only[-1].entries if outputs else {}
        if outputs and record.lora == "product":  # their shapes depend on the rank
            tensors = outputs_only[-1].without(names_of_pairs(outputs_only[-1])).entries
        found = find_sources(
            report, record, directory, tensors, first=first, source=source, init=init, on_addresses=on_addresses
        )
        if sources:
            checks.append("sources")
            with report.ending("sources"):
                check_checksums(report, record, found, outputs_only)
        present = [each for each in found if each is not None]
        if replay:
            checks.append("replay")
            with report.ending("replay"):
                fetch_all(present, on_progress)
                check_elements(report, record, outputs, found, source=source, elements=elements, seed=seed)
        for storage in storages_of(each.path for each in present):
            storage.remove_downloads()  # after an error they stay for the next attempt
    return Verified(
        result=directory,
        title=_title(record),
        ckavg_version=record.ckavg_version,
        checks=tuple(checks),
        findings=tuple(dict.fromkeys(report.findings)),
        files=report.files,
        elements=report.elements if replay else None,
        largest_deviation=report.largest_deviation if replay else None,
        seed=seed if replay else None,
        bytes_read=report.bytes_read,
        seconds=time.perf_counter() - begun,
    )


def _title(record: Record) -> str:
    """The title of a record: scheme, settings and steps."""
    scheme = record.to_scheme()
    stated = "".join(f"{name.replace('_', '-')} {value}, " for name, value in scheme.stated.items())
    steps = f"{len(record.steps)} checkpoints, steps {record.steps[0]} to {record.steps[-1]}"
    snapshot = f", as of step {record.output.step}" if record.output.step != record.steps[-1] else ""
    return f"{scheme.title}: {f'{stated[:-2]}; ' if stated else ''}{steps}{snapshot}"


def _parts(directory: Path, record: Record) -> dict[int, Part]:
    """The snapshots and the result, by the index after which each was written, without links that leave the result."""
    parts = {record.output_index: Part(directory, record.output)}
    for output in record.outputs[:-1]:
        place = directory / output.name
        if resolved(directory) in resolved(place).parents:
            parts[record.steps.index(output.step)] = Part(place, output, f"{output.name}/")
    return dict(sorted(parts.items()))


def _check_record(report: Report, record: Record, parts: Mapping[int, Part]) -> None:
    """Check that the numbers follow from each other, and that the records of the snapshots agree."""
    from ckavg.verify.arithmetic import check_arithmetic  # numpy is slow to import

    if record.ckavg_version != __version__:
        version = f"It was made by ckavg {record.ckavg_version}, and is checked by {__version__}."
        report.warning("record", version)
    for each in check_arithmetic(record):
        report.problem("record", each)
    inside = {part.output.name for part in parts.values()}
    for output in record.outputs:
        if output.name not in inside:
            report.problem("files", f"{output.name} is a link that leaves the result.")
    for part in parts.values():
        if not part.prefix or not part.directory.is_dir():
            continue  # its missing files are reported later
        try:
            own = read_record(part.directory)
        except CkavgError as error:
            wrong = [f": {error.message}"]
        else:
            wrong = [f": {each}" for each in check_arithmetic(own)]
            if _identity(own, own.output) != _identity(record, part.output):
                wrong.append(" is of another average than the result.")
        for each in wrong:
            report.problem("record", f"{part.prefix}{RESULT_RECORD}{each}")


def _identity(record: Record, output: Output) -> tuple[object, ...]:
    """What a result and its snapshot must have in common."""
    average = record.to_scheme(), record.steps, record.path_length, record.betas, record.alphas
    return *average, record.accumulate, record.inputs, output.step, output.files, output.sha256


def _check_files(report: Report, directory: Path, record: Record, parts: Mapping[int, Part]) -> Outputs:
    """Check that all files exist unchanged and that the weights load; return those that do."""
    snapshots = [each.name for each in record.outputs[:-1]]
    for part in parts.values():
        check_others(report, part, () if part.prefix else snapshots)
    present = check_files(report, list(parts.values()), within=directory)
    copied = frozenset(record.copied)
    named = {"copied": copied, "infinite": frozenset(record.infinite), "uncorrected": frozenset(record.uncorrected)}
    opened: dict[int, tuple[str, Checkpoint]] = {}
    unknown: dict[str, str] = {}
    for (index, part), sizes in zip(parts.items(), present, strict=True):
        if all(name in sizes for name in part.output.files if name.endswith(".safetensors")):
            checkpoint = open_weights(report, part, sizes)
            if checkpoint is not None:
                floating = {name for name, entry in checkpoint.entries.items() if entry.is_floating}
                unknown |= {field: min(names - floating) for field, names in named.items() if names - floating}
                opened[index] = part.prefix, checkpoint.with_copied(copied)
    for field, name in unknown.items():
        report.problem("record", f"{field} names {name!r}, which is not a floating tensor of the result.")
    return opened
