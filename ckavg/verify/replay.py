"""`verify --replay`: computes random elements again from the checkpoints, and compares them with the result.

It shares only the formulas of β and α with the averaging. It measures the path again, and computes Σ_k w_k θ_k in
float64 with weights from `arithmetic.py`. It reads single elements, so it takes seconds for a model of any size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckavg.checkpoints.adapters import names_of_pairs
from ckavg.checkpoints.run import Checkpoint, Run, Selection, TensorInfo, averaged_statistics, holds_float64
from ckavg.engine.reader import Files
from ckavg.errors import CkavgError, CorruptFileError, listed
from ckavg.output.record import Record
from ckavg.path.estimate import estimate
from ckavg.path.measure import measure
from ckavg.path.plan import plan_path
from ckavg.path.table import PathLength, to_measure
from ckavg.schemes import PEMA, Coefficients, Timeline
from ckavg.verify.arithmetic import Array, allowed, coefficients_of, rounding, size_of_unit, weights_of
from ckavg.verify.findings import Report
from ckavg.verify.sources import Sources, is_remote

_PATH_TOLERANCE = 1e-5
"""Relative difference of ℓ between kernels and devices, which add in different orders; in practice 1e-7."""

_TENSOR_PATH_TOLERANCE = 1e-6
"""The same for a tensor's own path, from which its β follows."""

_READ_WHOLE = 1 << 30
"""Bytes of all checkpoints up to which the whole path is measured again."""

_SAMPLED = 1 << 22
"""Elements of each checkpoint from which the path of larger runs is estimated."""

_STANDARD_ERRORS, _PART_OF_SAMPLE = 8.0, 0.02
"""By how many standard errors, plus which fraction of ℓ, a path may differ from an estimate."""

_PER_TENSOR = 8
"""Elements chosen from each tensor, if it has as many and the budget allows."""

_BATCH = 100_000
"""Elements that are read and compared together, so that memory does not grow with their number."""

_PAGE = 4096
_MOST_WHOLE = 16 << 20
"""Bytes up to which a tensor is read whole instead of element by element."""

_THREADS = 8
_EXAMPLES = 8
_LARGE = 2.0**900

_NUMPY_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "<u1",
    "C64": "<u8", "F8_E4M3": "<u1", "F8_E5M2": "<u1", "F8_E8M0": "<u1", "F8_E4M3FNUZ": "<u1", "F8_E5M2FNUZ": "<u1",
}  # fmt: skip
"""Dtypes that numpy lacks are read as bits."""

Stored = NDArray[np.generic]
"""(n,) elements as they are stored."""

Places = Mapping[str, tuple[int, ...]]
"""Elements by the name of their tensor: row-major indices, ascending."""


def check_elements(
    report: Report,
    record: Record,
    outputs: Mapping[int, tuple[str, Checkpoint]],
    checkpoints: Sources,
    *,
    source: Path | None,
    elements: int,
    seed: int,
) -> None:
    """Compute β, then elements, again; `source` is the directory of the run, if the user named it."""
    scheme = record.to_scheme()
    per_tensor = isinstance(scheme, PEMA) and scheme.scope == "tensor"
    try:
        if not outputs:
            raise CorruptFileError("the result cannot be read.")
        coefficients = coefficients_of(record)
        taken = [each for each in checkpoints[coefficients.start :] if each is not None]
        if len(taken) < len(checkpoints) - coefficients.start:
            moved = "If they were moved, name their directory with --source."
            raise CorruptFileError(f"some of the checkpoints cannot be read. {moved}")
        if scheme.needs_path:
            selection = Selection(init=taken[0].path if record.anchor_is_init else None)
            run = Run(source or taken[-1].directory.parent, selection, tuple(taken), ())
            path = _measured(record, run, whole=per_tensor)
            report.bytes_read += path.bytes_read
            _check_path(report, record, path)
            if per_tensor:
                own = {name: path.tensor_lengths(name) for name in path.counted}
                timeline = Timeline(record.steps, record.path_length, own, record.anchor_is_init)
                coefficients = scheme.coefficients(timeline)
    except (CkavgError, ArithmeticError) as error:
        why = error.message if isinstance(error, CkavgError) else str(error)
        report.problem("replay", f"No element was computed again: {why}")
        return
    *_, (_, result) = outputs.values()
    coefficients = coefficients.sparing(averaged_statistics(result.entries))
    if coefficients.uncorrected != record.uncorrected:
        names = (
            f"uncorrected names {listed(record.uncorrected) or 'nothing'}; the running statistics of the result are "
        )
        report.problem("replay", f"{names}{listed(coefficients.uncorrected) or 'none'}.")
    paired = names_of_pairs(result) if record.lora == "product" else frozenset()
    # A record says float64 of a run with any float64 tensor; its other tensors were accumulated as was asked.
    is_mixed = holds_float64(taken)
    comparison = Comparison(
        coefficients=coefficients,
        checkpoints=(*[None] * coefficients.start, *taken),
        outputs={index: (prefix, each.without(paired)) for index, (prefix, each) in outputs.items()},
        wide=record.accumulate == "float64" and not is_mixed,
        allow_nonfinite=record.allow_nonfinite,
        beta_error=scheme.gamma * _TENSOR_PATH_TOLERANCE if isinstance(scheme, PEMA) and per_tensor else 0.0,
    )
    comparison.compare(report, elements, seed)
    if paired:
        from ckavg.verify.products import check_products

        check_products(report, record, coefficients, comparison.checkpoints, outputs, seed=seed)


def _measured(record: Record, run: Run, *, whole: bool) -> PathLength:
    """The current path of the sources, without the cache.

    It is measured exactly if that is quick or necessary, and estimated otherwise.
    """
    exclude, zero_sigma, nonfinite = record.path_exclude, record.zero_sigma, record.allow_nonfinite
    entries = to_measure(run.tensors, exclude)
    nbytes = sum(each.entries[name].nbytes for each in run.checkpoints for name in entries)
    if record.sample < 1:
        few, fraction = is_remote(record.inputs[-1]), record.sample
    elif whole or nbytes <= _READ_WHOLE:
        fresh = plan_path(run, exclude=exclude, anew=True)
        return measure(run, fresh, zero_sigma=zero_sigma, allow_nonfinite=nonfinite)
    else:
        few, fraction = True, min(0.5, _SAMPLED / sum(entry.numel for entry in entries.values()))
    return estimate(run, fraction, exclude=exclude, zero_sigma=zero_sigma, allow_nonfinite=nonfinite, few=few)


def _check_path(report: Report, record: Record, path: PathLength) -> None:
    """Compare the path of the sources with the record."""
    errors = path.standard_errors if path.sample != record.sample else None
    for place, (got, want) in enumerate(zip(record.path_length or (), path.lengths, strict=True)):
        error = _STANDARD_ERRORS * errors[place] if errors else 0.0
        relative = _PART_OF_SAMPLE if errors else _PATH_TOLERANCE
        if not math.isclose(got, want, rel_tol=relative, abs_tol=error + 1e-300):
            expected = f"about {want:.4g}, give or take {errors[place]:.1g}" if errors else f"{want}"
            at = f"path_length is {got} at step {record.steps[place]}"
            report.problem("replay", f"{at}; the path of the sources is {expected}.")
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The sources and results to compare.

    Attributes:
        coefficients: β and α, also of single tensors.
        checkpoints: the sources by index; None before the average begins.
        outputs: the results, by the index of the checkpoint after which each was written, with the prefix of its
            tensors' names in messages.
        wide: whether everything was accumulated in float64; tensors that are float64 in a checkpoint always are.
        allow_nonfinite: whether NaN and infinity were allowed.
        beta_error: relative error of β, if it comes from a path that was measured again.
    """

    coefficients: Coefficients
    checkpoints: Sequence[Checkpoint | None]
    outputs: Mapping[int, tuple[str, Checkpoint]]
    wide: bool
    allow_nonfinite: bool
    beta_error: float = 0.0

    def compare(self, report: Report, elements: int, seed: int) -> None:
        """Choose this many random elements of each output, compute them again, and compare.

        Raises:
            TruncatedShardError, ReadError: a file became shorter, or cannot be read.
        """
        read = [each for each in self.checkpoints if each is not None] + [each for _, each in self.outputs.values()]
        drawn = draw(read[-1].entries, elements, seed)
        total = sum(
            bytes_to_gather(each.entries[name], places)
            for each in read
            for name, places in drawn.items()
            if name in each.entries
        )
        tallies = {index: _Tally(prefix) for index, (prefix, _) in self.outputs.items()}
        listen, done = report.listener("elements"), 0
        for batch in _batches(drawn):
            stored: list[Mapping[str, Stored]] = []
            for values, nbytes in _gather_all(read, batch):
                stored.append(values)
                done += nbytes
                listen(done, total)
            results = dict(zip(self.outputs, stored[-len(self.outputs) :], strict=True))
            for name, places in batch.items():
                sources = [each.get(name, np.empty(0)) for each in stored[: -len(self.outputs)]]
                for index, result in results.items():
                    self._compare_tensor(index, name, places, sources, result[name], tallies[index])
        report.bytes_read += done
        for tally in tallies.values():
            tally.add_to(report)

    def _compare_tensor(
        self,
        index: int,
        name: str,
        places: tuple[int, ...],
        sources: Sequence[Stored],
        result: Stored,
        tally: _Tally,
    ) -> None:
        """Compare elements of one tensor of one output. `sources` begins with the anchor."""
        entry, start = self.outputs[index][1].entries[name], self.coefficients.start
        if not entry.is_floating:
            source = sources[index - start]
            tally.add(name, entry, places, result, source, _bits(result) == _bits(source))
            return
        dtypes = [each.entries[name].dtype for each in self.checkpoints[start:] if each is not None]
        accumulated = "F64" if self.wide or "F64" in dtypes else "F32"
        coefficients = self.coefficients.for_tensor(name)
        weights = weights_of(coefficients, index)[start : index + 1]
        magnitudes = weights_of(coefficients, index, magnitudes=True)[start : index + 1]
        thetas = [widened(*each) for each in zip(sources[: index + 1 - start], dtypes, strict=False)]
        last, got = thetas[-1], widened(result, entry.dtype)
        same = np.logical_and.reduce([theta == thetas[0] for theta in thetas])  # infinities stay
        thetas = [theta if size else np.zeros_like(theta) for theta, size in zip(thetas, magnitudes, strict=True)]
        unit = 2.0**-64 if max(np.abs(theta).max(initial=0.0) for theta in thetas) > _LARGE else 1.0
        thetas, got, last = [theta * unit for theta in thetas], got * unit, last * unit  # so that no sum overflows
        with np.errstate(all="ignore"):
            want = np.asarray(sum((weight * theta for weight, theta in zip(weights, thetas, strict=True)), start=0.0))
            want = np.where(same, last, want)
            most = allowed(
                got,
                want,
                thetas,
                coefficients,
                magnitudes,
                index=index,
                dtype=entry.dtype,
                accumulated=accumulated,
                beta_error=self.beta_error,
            )
            most = np.where(same, rounding(got, want, entry.dtype, accumulated), most)
            apart = np.where(got == want, 0.0, np.abs(got - want))
            is_right = apart <= most
            if self.allow_nonfinite:
                is_right |= ~np.isfinite(got) & ~np.isfinite(want)
            units = apart / size_of_unit(want, thetas, weights, dtype=entry.dtype, accumulated=accumulated)
        tally.largest_deviation = float(max(tally.largest_deviation, units[np.isfinite(units)].max(initial=0.0)))
        tally.add(name, entry, places, got / unit, want / unit, is_right)


@dataclass(slots=True)
class _Tally:
    """The number of compared elements of one output, and those that are wrong."""

    prefix: str
    compared: int = 0
    largest_deviation: float = 0.0
    wrong: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        entry: TensorInfo,
        places: tuple[int, ...],
        got: Stored,
        want: Stored,
        is_right: NDArray[np.bool_],
    ) -> None:
        self.compared += len(places)
        wrong = np.flatnonzero(~is_right)
        if len(wrong):
            self.wrong[name] = self.wrong.get(name, 0) + len(wrong)
        for place in wrong[: max(0, _EXAMPLES - len(self.examples))]:
            element = f"{name!r}{where(entry, places[place])}"
            self.examples.append(f"{element} is {got[place]}, expected {want[place]}")

    def add_to(self, report: Report) -> None:
        report.elements += self.compared
        report.largest_deviation = max(report.largest_deviation, self.largest_deviation)
        count = sum(self.wrong.values())
        if count:
            elements = f"{count:,} of {self.compared:,} elements, in {len(self.wrong)} of the tensors"
            examples = "; ".join(self.examples) + ("; …" if count > len(self.examples) else "")
            report.problem("replay", f"{self.prefix}{elements}, differ from what the sources give: {examples}.")


def draw(entries: Mapping[str, TensorInfo], elements: int, seed: int) -> Places:
    """Choose elements at random without repetition: some of every tensor, the rest in proportion to size.

    Args:
        entries: the tensors.
        elements: the total number; fewer if there are not as many. If there are more tensors than that, one element
            each of that many tensors.
        seed: the same seed chooses the same elements of the same tensors.
    """
    generator = random.Random(seed)  # noqa: S311 - it guards nothing
    sizes = {name: entry.numel for name, entry in sorted(entries.items()) if entry.numel}
    if len(sizes) > elements:
        sizes = {name: sizes[name] for name in sorted(generator.sample(list(sizes), elements))}
    counts = _counts(sizes, elements)
    return {name: tuple(sorted(generator.sample(range(sizes[name]), count))) for name, count in counts.items()}


def _counts(sizes: Mapping[str, int], elements: int) -> dict[str, int]:
    """How many elements of each tensor."""
    each = min(_PER_TENSOR, elements // max(1, len(sizes)))
    counts = {name: min(size, each) for name, size in sizes.items()}
    left = {name: size - counts[name] for name, size in sizes.items()}
    while (budget := elements - sum(counts.values())) > 0 and any(left.values()):
        total = sum(left.values())
        # At least one more in each round, so that the loop ends.
        for name in sorted(left, key=lambda name: -left[name]):
            more = min(left[name], max(1, left[name] * budget // total), elements - sum(counts.values()))
            counts[name] += more
            left[name] -= more
            if sum(counts.values()) == elements:
                break
    return counts


def _batches(drawn: Places) -> Iterator[Places]:
    batch: dict[str, tuple[int, ...]] = {}
    for name, places in drawn.items():
        for start in range(0, len(places), _BATCH):
            batch[name] = places[start : start + _BATCH]
            if sum(map(len, batch.values())) >= _BATCH:
                yield batch
                batch = {}
    if batch:
        yield batch


def _gather_all(read: Sequence[Checkpoint], batch: Places) -> Iterator[tuple[Mapping[str, Stored], int]]:
    """These elements of each checkpoint by tensor, and the bytes read; several tensors are read at a time."""

    def gather(checkpoint: Checkpoint) -> tuple[Mapping[str, Stored], int]:
        with Files(threads=_THREADS) as files:
            held = [
                name for name in batch if name in checkpoint.entries
            ]  # copied tensors need not be in every checkpoint
            return {name: _gather(files, checkpoint, name, batch[name]) for name in held}, files.bytes_read

    with ThreadPoolExecutor(_THREADS) as executor:
        yield from executor.map(gather, read)


def bytes_to_gather(entry: TensorInfo, places: tuple[int, ...]) -> int:
    """The bytes to read. A small tensor is read whole, since single elements would touch most of its pages anyway."""
    whole = entry.nbytes <= min(_PAGE * len(places), _MOST_WHOLE)
    return entry.nbytes if whole else entry.item_bytes * len(places)


def _gather(files: Files, checkpoint: Checkpoint, name: str, places: tuple[int, ...]) -> Stored:
    entry = checkpoint.entries[name]
    item, dtype = entry.item_bytes, _NUMPY_DTYPES[entry.dtype]
    buffer = bytearray(bytes_to_gather(entry, places))
    if len(buffer) == entry.nbytes:
        files.read_elements(checkpoint, name, 0, memoryview(buffer), on_miss=lambda: None)
        return np.frombuffer(buffer, dtype=dtype)[list(places)]
    pending = list(places)

    def announce() -> None:
        for place in pending:  # all at once, so that they are fetched together
            for path, begin, end in checkpoint.ranges(name, place, place + 1):
                files.announce(path, begin, end - begin)
        pending.clear()

    if entry.pieces:
        for count, place in enumerate(places):
            one = memoryview(buffer)[count * item : (count + 1) * item]
            files.read_elements(checkpoint, name, place, one, on_miss=announce)
    else:
        path, offsets = checkpoint.shards[entry.shard].path, [entry.offset + place * item for place in places]
        files.read_each(path, offsets, memoryview(buffer), on_miss=announce)
    return np.frombuffer(buffer, dtype=dtype)


def read_whole(files: Files, checkpoint: Checkpoint, name: str) -> Array:
    """(n,) All elements of a tensor in float64."""
    entry = checkpoint.entries[name]
    buffer = bytearray(entry.nbytes)
    files.read_elements(checkpoint, name, 0, memoryview(buffer), on_miss=lambda: None)
    return widened(np.frombuffer(buffer, dtype=_NUMPY_DTYPES[entry.dtype]), entry.dtype)


def widened(stored: Stored, dtype: str) -> Array:
    """Floating elements converted to float64, exactly."""
    if dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(stored.astype(np.float64))


def where(entry: TensorInfo, place: int) -> str:
    """The index of an element as one types it, `[3, 0]`; empty for a scalar."""
    return str([int(each) for each in np.unravel_index(place, entry.shape)]) if entry.shape else ""


def _bits(values: Stored) -> Stored:
    return values.view(f"<u{values.dtype.itemsize}")
