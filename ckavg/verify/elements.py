"""`verify --replay`: elements drawn at random are computed again from the checkpoints, and compared with the result.

Shares nothing with the replay but β and α: Σ_k w_k θ_k is formed in float64, with weights that `arithmetic.py` finds in
its own way. Reads single elements, so that it takes seconds whatever the size of the model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckavg.checkpoints.run import Checkpoint, TensorInfo
from ckavg.engine.reader import Files
from ckavg.schemes import Coefficients
from ckavg.verify.arithmetic import weights_of
from ckavg.verify.findings import Report
from ckavg.verify.tolerance import Array, allowed, rounding, size_of_unit

_PER_TENSOR = 8
"""Elements drawn of each tensor, where it has as many and the budget allows."""

_BATCH = 100_000
"""Elements that are read and compared together, so that memory does not grow with their number."""

_PAGE = 4096
_MOST_WHOLE = 16 << 20
"""Bytes of the largest tensor that is read whole instead of element by element."""

_THREADS = 8
_EXAMPLES = 8
_LARGE = 2.0**900

_NUMPY_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "<u1",
    "C64": "<u8", "F8_E4M3": "<u1", "F8_E5M2": "<u1", "F8_E8M0": "<u1", "F8_E4M3FNUZ": "<u1", "F8_E5M2FNUZ": "<u1",
}  # fmt: skip
"""As bits where numpy has no such numbers."""

Stored = NDArray[np.generic]
"""(n,) elements as they are stored."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Elements of one tensor: their places in row-major order, ascending."""

    name: str
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is computed again, and compared with what.

    Attributes:
        coefficients: β and α, of single tensors, too.
        checkpoints: the sources by index; None before the average begins.
        outputs: the results, by the index of the checkpoint after which each was written, with what stands before the
            names of its tensors in messages.
        wide: whether everything was accumulated in float64; tensors that are float64 in a checkpoint were in any case.
        allow_nonfinite: whether NaN and infinity were let through.
        beta_error: relative error of β, where it follows from a path that was measured again.
    """

    coefficients: Coefficients
    checkpoints: Sequence[Checkpoint | None]
    outputs: Mapping[int, tuple[str, Checkpoint]]
    wide: bool
    allow_nonfinite: bool
    beta_error: float = 0.0

    def compare(self, report: Report, elements: int, seed: int) -> None:
        """Draw elements, compute them again, and compare.

        Args:
            report: to add to.
            elements: how many, in each output.
            seed: which.

        Raises:
            TruncatedShardError, ReadError: a file became shorter meanwhile, or cannot be read.
        """
        read = [each for each in self.checkpoints if each is not None] + [each for _, each in self.outputs.values()]
        sampled = draw(read[-1].entries, elements, seed)
        total = sum(bytes_to_gather(each, one) for each in read for one in sampled if one.name in each.entries)
        tallies = {index: _Tally() for index in self.outputs}
        listen, done = report.listener("elements"), 0
        for batch in _batches(sampled):
            stored: list[Mapping[str, Stored]] = []
            for values, nbytes in _gathered(read, batch):
                stored.append(values)
                done += nbytes
                listen(done, total)
            results = dict(zip(self.outputs, stored[-len(self.outputs) :], strict=True))
            for one in batch:
                sources = [each.get(one.name, np.empty(0)) for each in stored[: -len(self.outputs)]]
                for index, result in results.items():
                    self._compare_tensor(index, one, sources, result[one.name], tallies[index])
        report.bytes_read += done
        for index, tally in tallies.items():
            tally.add_to(report, self.outputs[index][0])

    def _compare_tensor(
        self, index: int, one: Sampled, sources: Sequence[Stored], result: Stored, tally: _Tally
    ) -> None:
        """Compare elements of one tensor of one output. `sources` begins with the checkpoint where the average does."""
        entry, start = self.outputs[index][1].entries[one.name], self.coefficients.start
        if not entry.is_floating:
            source = sources[index - start]
            tally.add(one, entry, result, source, _bits(result) == _bits(source))
            return
        taken = [each for each in self.checkpoints[start : index + 1] if each is not None]
        wide = self.wide or any(each is not None and each.entries[one.name].dtype == "F64" for each in self.checkpoints)
        accumulated = "F64" if wide else "F32"
        coefficients = self.coefficients.for_tensor(one.name)
        weights = weights_of(coefficients, index)[start : index + 1]
        magnitudes = weights_of(coefficients, index, magnitudes=True)[start : index + 1]
        thetas = [widened(stored, each.entries[one.name].dtype) for stored, each in zip(sources, taken, strict=False)]
        last, got = thetas[-1], widened(result, entry.dtype)
        same = np.logical_and.reduce([theta == thetas[0] for theta in thetas])  # those stay what they are
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
            check_same_run = apart <= most
            if self.allow_nonfinite:
                check_same_run |= ~np.isfinite(got) & ~np.isfinite(want)
            units = apart / size_of_unit(want, thetas, weights, dtype=entry.dtype, accumulated=accumulated)
        tally.largest_deviation = float(max(tally.largest_deviation, units[np.isfinite(units)].max(initial=0.0)))
        tally.add(one, entry, got / unit, want / unit, check_same_run)


class _Tally:
    """How many elements of one output agree, and which do not."""

    def __init__(self) -> None:
        self.compared = 0
        self.largest_deviation = 0.0
        self._wrong: dict[str, int] = {}
        self._examples: list[str] = []

    def add(
        self, one: Sampled, entry: TensorInfo, got: Stored, want: Stored, check_same_run: NDArray[np.bool_]
    ) -> None:
        self.compared += len(one.places)
        wrong = np.flatnonzero(~check_same_run)
        if len(wrong):
            self._wrong[one.name] = self._wrong.get(one.name, 0) + len(wrong)
        for place in wrong[: max(0, _EXAMPLES - len(self._examples))]:
            element = f"{one.name!r}{where(entry, one.places[place])}"
            self._examples.append(f"{element} is {got[place]}, expected {want[place]}")

    def add_to(self, report: Report, prefix: str) -> None:
        report.elements += self.compared
        report.largest_deviation = max(report.largest_deviation, self.largest_deviation)
        count = sum(self._wrong.values())
        if count:
            elements = f"{count:,} of {self.compared:,} elements, in {len(self._wrong)} of the tensors"
            examples = "; ".join(self._examples) + ("; …" if count > len(self._examples) else "")
            report.problem("replay", f"{prefix}{elements}, are not what the sources give: {examples}.")


def draw(entries: Mapping[str, TensorInfo], elements: int, seed: int) -> list[Sampled]:
    """Draw elements at random, without repetition: some of every tensor, the others by its size.

    Args:
        entries: the tensors.
        elements: how many in all; fewer where there are not as many. Where there are more tensors than that, one of
            each of as many tensors.
        seed: the same seed draws the same elements of the same tensors.
    """
    generator = random.Random(seed)  # noqa: S311 - it guards nothing
    sizes = {name: entry.numel for name, entry in sorted(entries.items()) if entry.numel}
    if len(sizes) > elements:
        sizes = {name: sizes[name] for name in sorted(generator.sample(list(sizes), elements))}
    counts = _counts(sizes, elements)
    return [Sampled(name, tuple(sorted(generator.sample(range(sizes[name]), count)))) for name, count in counts.items()]


def _counts(sizes: Mapping[str, int], elements: int) -> dict[str, int]:
    """How many elements of each tensor."""
    each = min(_PER_TENSOR, elements // max(1, len(sizes)))
    counts = {name: min(size, each) for name, size in sizes.items()}
    left = {name: size - counts[name] for name, size in sizes.items()}
    while (budget := elements - sum(counts.values())) > 0 and any(left.values()):
        total = sum(left.values())
        # At least one more in each round, so that it comes to an end.
        for name in sorted(left, key=lambda name: -left[name]):
            more = min(left[name], max(1, left[name] * budget // total), elements - sum(counts.values()))
            counts[name] += more
            left[name] -= more
            if sum(counts.values()) == elements:
                break
    return counts


def _batches(sampled: Sequence[Sampled]) -> Iterator[list[Sampled]]:
    batch: list[Sampled] = []
    for one in sampled:
        for start in range(0, len(one.places), _BATCH):
            batch.append(Sampled(one.name, one.places[start : start + _BATCH]))
            if sum(len(each.places) for each in batch) >= _BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def _gathered(read: Sequence[Checkpoint], batch: Sequence[Sampled]) -> Iterator[tuple[Mapping[str, Stored], int]]:
    """The drawn elements of each checkpoint by tensor, and how many bytes were read; several at the same time."""

    def gather_all(checkpoint: Checkpoint) -> tuple[Mapping[str, Stored], int]:
        with Files(threads=_THREADS) as files:
            held = [one for one in batch if one.name in checkpoint.entries]  # what is copied need not be everywhere
            return {one.name: _gather(files, checkpoint, one) for one in held}, files.bytes_read

    with ThreadPoolExecutor(_THREADS) as executor:
        yield from executor.map(gather_all, read)


def bytes_to_gather(checkpoint: Checkpoint, sampled: Sampled) -> int:
    """How much is read: a small tensor whole, since storage would read most of its pages for single elements anyway."""
    entry = checkpoint.entries[sampled.name]
    whole = entry.nbytes <= min(_PAGE * len(sampled.places), _MOST_WHOLE)
    return entry.nbytes if whole else entry.item_bytes * len(sampled.places)


def _gather(files: Files, checkpoint: Checkpoint, sampled: Sampled) -> Stored:
    """Read elements of a tensor of a checkpoint.

    Raises:
        TruncatedShardError, ReadError: the bytes are not there.
    """
    entry = checkpoint.entries[sampled.name]
    path, dtype = checkpoint.shards[entry.shard].path, _NUMPY_DTYPES[entry.dtype]
    buffer = bytearray(bytes_to_gather(checkpoint, sampled))
    if len(buffer) == entry.nbytes:
        files.read_into(path, entry.offset, memoryview(buffer), on_miss=lambda: None)
        return np.frombuffer(buffer, dtype=dtype)[list(sampled.places)]
    offsets = [entry.offset + place * entry.item_bytes for place in sampled.places]
    announced = False

    def announce() -> None:
        nonlocal announced
        if not announced:  # all of them at the first that is not in memory, so that they are fetched together
            announced = True
            for offset in offsets:
                files.announce(path, offset, entry.item_bytes)

    files.read_each(path, offsets, memoryview(buffer), on_miss=announce)
    return np.frombuffer(buffer, dtype=dtype)


def widened(stored: Stored, dtype: str) -> Array:
    """Floating elements in float64, exactly."""
    if dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(stored.astype(np.float64))


def where(entry: TensorInfo, place: int) -> str:
    """The index of an element, as one types it: `[3, 0]`; nothing for a scalar."""
    return str([int(each) for each in np.unravel_index(place, entry.shape)]) if entry.shape else ""


def _bits(values: Stored) -> Stored:
    return values.view(f"<u{values.dtype.itemsize}")
