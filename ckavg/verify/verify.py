"""Stage *verify*, all of it in order: the record, the files, the weights, the sources, the elements."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ckavg import __version__
from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.context import OnProgress, Pass, Progress
from ckavg.errors import CkavgError, SettingError, listed
from ckavg.output.record import Output, Record, read_record
from ckavg.storage.address import address_of
from ckavg.storage.atomic import resolved
from ckavg.storage.remote import storages_of
from ckavg.verify.arithmetic import check_arithmetic
from ckavg.verify.files import check_digests, check_others, find_files
from ckavg.verify.findings import Check, Finding, Verified
from ckavg.verify.weights import check_finite, open_weights

ELEMENTS = 10_000


def verify_result(
    result: Path | str,
    *,
    replay: bool = False,
    sources: bool = False,
    source: Path | str | None = None,
    init: Path | str | None = None,
    fetch: bool = False,
    elements: int = ELEMENTS,
    seed: int | None = None,
    on_progress: OnProgress | None = None,
    on_places: OnPlaces | None = None,
) -> Verified:
    """Read a result again and check it against its record and, where that is asked for, against its sources.

    Nothing is written, neither to the result nor to the sources. A result that a killed process had moved aside, to put
    another in its place, gets its name back first.

    Args:
        result: directory of a result, or of one of its snapshots; it may have been moved, renamed or copied.
        replay: compute elements, drawn at random, again from the checkpoints, and compare them.
        sources: read all checkpoints again, and compare their checksums with the record.
        source: directory of the checkpoints; None: where they were, as seen from the result or by its record.
        init: the anchor that was given apart from the run; None likewise.
        fetch: ask the repositories and buckets that the record names for the checkpoints; a record may name any.
        elements: how many elements `replay` computes, in the result and in each of its snapshots.
        seed: which elements; None: others each time.
        on_progress: called now and then in this thread.
        on_places: called with the places where checkpoints will be read, before anything there is opened.

    Returns:
        What is not as it was recorded. There is a result that can be relied on where `problems` is empty.

    Raises:
        RecordError: there is no record, or not one that can be understood.
        ReadError: the system would not let us read it.
        SettingError: `elements` is less than 1, or `seed` is negative; the checkpoints are not on this machine, and are
            not to be fetched; or `source` or `init` is an address.
    """
    begun = time.perf_counter()
    if elements < 1:
        raise SettingError(f"elements is {elements}; it must be 1 or more.")
    if seed is not None and seed < 0:
        raise SettingError(f"seed is {seed}; it must be 0 or more.")
    for name, place in (("source", source), ("init", init)):
        if place is not None and (address := address_of(place)) is not None:
            raise SettingError(f"{name} is {address}; it must be on this machine.", hint="Fetch it, and name the copy.")
    directory = Path(result)
    work = _Work(directory, read_record(directory), on_progress, Path(source) if source else None)
    work.init = Path(init) if init else None
    if sources or replay:
        work.check_places(on_places or (lambda places: None), fetch=fetch)
    work.check_record()
    outputs = work.check_result()
    work.check_copied(outputs)
    copied = frozenset(work.record.copied)
    outputs = {index: (name, each.with_copied(copied)) for index, (name, each) in outputs.items()}
    with work.told("weights"):
        work.check_weights(outputs)
    checks: list[Check] = ["record", "files", "weights"]
    if sources or replay:
        work.find_sources(outputs, on_places or (lambda places: None))
    if sources:
        checks.append("sources")
        with work.told("sources"):
            work.check_sources(outputs)
    if replay:
        checks.append("replay")
        seed = secrets.randbelow(2**32) if seed is None else seed
        with work.told("replay"):
            work.recompute(outputs, elements, seed)
    work.remove_downloads()
    return Verified(
        result=directory,
        title=work.title,
        ckavg_version=work.record.ckavg_version,
        checks=tuple(checks),
        findings=tuple(dict.fromkeys(work.findings)),
        files=work.files,
        elements=work.elements if replay else None,
        largest_deviation=work.largest_deviation if replay else None,
        seed=seed if replay else None,
        bytes_read=work.bytes_read,
        seconds=time.perf_counter() - begun,
    )


OnPlaces = Callable[[Sequence[str]], None]

Outputs = Mapping[int, tuple[str, Checkpoint]]
"""The result and its snapshots as checkpoints, by the index after which each was written; see `Recomputation`."""


@dataclass(slots=True)
class _Work:
    """One verification: what it is of, and what was found by now."""

    directory: Path
    record: Record
    on_progress: OnProgress | None
    source: Path | None
    init: Path | None = None
    checkpoints: tuple[Checkpoint | None, ...] = ()
    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    bytes_read: int = 0
    elements: int = 0
    largest_deviation: float = 0.0

    @property
    def title(self) -> str:
        """What the record says it is."""
        record, scheme = self.record, self.record.to_scheme()
        stated = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in scheme.stated.items())
        steps = f"{len(record.steps)} checkpoints, steps {record.steps[0]} to {record.steps[-1]}"
        of_step = f", as of step {record.output.step}" if record.output.step != record.steps[-1] else ""
        return f"{scheme.title}: {f'{stated}; ' if stated else ''}{steps}{of_step}"

    def listener(self, stage: Pass) -> Callable[[int, int], None]:
        """Who is told of the bytes done and to do."""
        listen = self.on_progress
        return (lambda done, total: listen(Progress(stage, done, total))) if listen else (lambda done, total: None)

    @contextmanager
    def told(self, check: Check) -> Iterator[None]:
        """Have an error end this check alone, as one more thing that is found."""
        try:
            yield
        except CkavgError as error:
            self.findings.append(Finding(check, error.message))

    def remove_downloads(self) -> None:
        """Remove what was downloaded of the checkpoints. After an error, it stays for the next time."""
        for storage in storages_of(each.path for each in self.checkpoints if each is not None):
            storage.remove_downloads()

    def places(self) -> dict[int, tuple[str, Path, Output]]:
        """The snapshots and the result: what stands before names, the directory, and the entry, by index."""
        places = {self.record.output_index: ("", self.directory, self.record.output)}
        for output in self.record.outputs[:-1]:
            place = self.directory / output.name
            if resolved(self.directory) in resolved(place).parents:
                places[self.record.steps.index(output.step)] = f"{output.name}/", place, output
        return dict(sorted(places.items()))

    def check_record(self) -> None:
        """Do the numbers follow from each other, and do the records of the snapshots say the same?"""
        if self.record.ckavg_version != __version__:
            told = f"It was made with ckavg {self.record.ckavg_version}, and is checked with {__version__}."
            self.findings.append(Finding("record", told, is_problem=False))
        self.findings += check_arithmetic(self.record)
        places = self.places()
        if len(places) < len(self.record.outputs):
            inside = {place.name for _, place, _ in places.values()}
            self.findings += [
                Finding("files", f"{each.name} is a link that leads out of the result.")
                for each in self.record.outputs[:-1]
                if each.name not in inside
            ]
        for shown, directory, output in places.values():
            if directory == self.directory or not directory.is_dir():
                continue  # that it is not there shows with its files
            try:
                own = read_record(directory)
            except CkavgError as error:
                self.findings.append(Finding("record", f"{shown}{RESULT_RECORD}: {error.message}"))
                continue
            self.findings += [
                Finding("record", f"{shown}{RESULT_RECORD}: {each.message}") for each in check_arithmetic(own)
            ]
            if _told_alike(own, own.output) != _told_alike(self.record, output):
                told = f"{shown}{RESULT_RECORD} is not of the same average as that of the result."
                self.findings.append(Finding("record", told))

    def check_result(self) -> Outputs:
        """Are all files there and as they were, and would the weights load? Gives those that would."""
        places = self.places()
        present = {
            index: find_files(place, output, within=self.directory, shown=shown)
            for index, (shown, place, output) in places.items()
        }
        snapshots = [each.name for each in self.record.outputs[:-1]]
        listen, done = self.listener("files"), 0
        total = sum(sum(each.sizes.values()) for each in present.values())
        open_writers: dict[int, tuple[str, Checkpoint]] = {}
        for index, (shown, place, output) in places.items():
            sizes = present[index].sizes
            self.findings += present[index].findings
            self.findings += check_others(place, output, () if shown else snapshots, shown=shown)

            def hashed(name: str, sizes: Mapping[str, int] = sizes) -> None:
                nonlocal done
                done += sizes[name]
                listen(done, total)

            self.findings += check_digests(place, output, sizes, on_done=hashed, shown=shown)
            if all(name in sizes for name in output.files if name.endswith(".safetensors")):
                checkpoint, found = open_weights(place, output, sizes, shown=shown)
                self.findings += found
                if checkpoint is not None:
                    open_writers[index] = shown, checkpoint
        self.files += sum(len(each.sizes) for each in present.values())
        self.bytes_read += done
        return open_writers

    def check_weights(self, outputs: Outputs) -> None:
        """Is every element a number?"""
        if not self.record.allow_nonfinite:
            found, nbytes = check_finite(
                list(outputs.values()), self.listener("weights"), infinite=self.record.infinite
            )
            self.findings += found
            self.bytes_read += nbytes

    def check_copied(self, outputs: Outputs) -> None:
        """Are the tensors that were copied rather than averaged tensors of the result?"""
        for _, checkpoint in list(outputs.values())[-1:]:
            floating = {name for name, entry in checkpoint.entries.items() if entry.is_floating}
            unknown = [name for name in self.record.copied if name not in floating]
            if unknown:
                told = f"copied names {unknown[0]!r}, which is no floating tensor of the result."
                self.findings.append(Finding("record", told))

    @property
    def first(self) -> int:
        """Index of the first checkpoint that took part."""
        took_part = (index for index, each in enumerate(self.record.inputs) if each.checksum)
        return min(next(took_part, 0), self.record.steps.index(self.record.anchor_step))

    def check_places(self, on_places: OnPlaces, *, fetch: bool) -> None:
        """Tell whom the record has us ask for checkpoints, and refuse it unless that was asked for."""
        if self.source is not None:
            return
        from ckavg.verify.elsewhere import places_of

        places = places_of(self.record.inputs[self.first :])
        if places and not fetch:
            raise SettingError(
                f"The checkpoints are not on this machine; the record names {listed(places)}.",
                hint="If you trust these places, have them read with --fetch; or name the directory of a copy with "
                "--source.",
            )
        if places:
            on_places(places)

    def find_sources(self, outputs: Outputs, on_places: OnPlaces) -> None:
        """Where are the checkpoints, and do they look like those that were averaged?"""
        from ckavg.verify.sources import find_sources

        entries = [checkpoint.entries for _, checkpoint in outputs.values()]
        found = find_sources(
            self.record,
            self.directory,
            entries[-1] if entries else {},
            first=self.first,
            source=self.source,
            init=self.init,
            on_places=on_places,
        )
        self.findings += found.findings
        self.checkpoints = found.checkpoints

    def check_sources(self, outputs: Outputs) -> None:
        """Are the checkpoints those that were averaged, every byte of them?"""
        from ckavg.verify.sources import check_checksums

        like = [checkpoint for _, checkpoint in outputs.values()] or [each for each in self.checkpoints if each]
        entries = like[-1].entries if like else {}
        names = [name for name, entry in entries.items() if entry.is_floating and entry.numel]
        found, nbytes = check_checksums(self.record, self.checkpoints, names, self.listener("sources"))
        self.findings += found
        self.bytes_read += nbytes

    def recompute(self, outputs: Outputs, elements: int, seed: int) -> None:
        """Are elements that are drawn what the checkpoints give?"""
        from ckavg.averaging.plan import fetch_all
        from ckavg.verify.replaying import check_elements

        fetch_all([each for each in self.checkpoints if each is not None], self.on_progress)
        done = check_elements(
            self.record,
            outputs,
            self.checkpoints,
            source=self.source,
            elements=elements,
            seed=seed,
            on_progress=self.listener("elements"),
        )
        self.findings += done.findings
        self.bytes_read += done.bytes_read
        self.elements, self.largest_deviation = done.elements, done.largest_deviation


def _told_alike(record: Record, output: Output) -> tuple[object, ...]:
    """What a result and its snapshot must agree on."""
    return (
        record.to_scheme(),
        record.steps,
        record.path_length,
        record.betas,
        record.alphas,
        record.accumulate,
        record.inputs,
        output.step,
        output.files,
        output.sha256,
    )
