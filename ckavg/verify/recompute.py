"""Stage *verify*, fifth: elements drawn at random are computed again from the sources, and compared with the result.

Shares nothing with the replay but the numbers β and α: Σ_k w_k θ_k is formed in float64, with weights that were not
found as the replay finds them. Reads single elements, so that it is done in seconds whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.reader import Files
from ckavg.schemes import Coefficients
from ckavg.verify.arithmetic import weights_of
from ckavg.verify.findings import Finding
from ckavg.verify.sample import Drawn, bytes_to_gather, draw, gather, where, widened
from ckavg.verify.tolerance import allowed, rounding, size_of_unit

_AT_ONCE = 100_000
_THREADS = 8
_SHOWN = 8
_LARGE = 2.0**900

Stored = Mapping[str, NDArray[np.generic]]
"""Elements as they are stored, by tensor."""


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What came of it.

    Attributes:
        findings: the elements that disagree, the first of each output.
        elements: how many were compared, in all outputs.
        largest_deviation: the largest difference, in units of the last place; 0 where nothing was compared.
        bytes_read: of elements.
    """

    findings: tuple[Finding, ...]
    elements: int
    largest_deviation: float
    bytes_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputation:
    """What is computed again.

    Attributes:
        coefficients: β and α, of single tensors, too.
        checkpoints: the sources by index; None before the average begins.
        outputs: the results to compare, by the index of the checkpoint after which each was written, with what stands
            before the names of its tensors in messages.
        wide: whether everything was accumulated in float64; tensors that are float64 in a checkpoint were in any case.
        allow_nonfinite: whether NaN and infinity were let through.
        beta_error: relative error of β, where it hangs on what was measured again.
    """

    coefficients: Coefficients
    checkpoints: Sequence[Checkpoint | None]
    outputs: Mapping[int, tuple[str, Checkpoint]]
    wide: bool
    allow_nonfinite: bool
    beta_error: float = 0.0


_NOTHING: NDArray[np.generic] = np.empty(0)


def recompute(work: Recomputation, *, elements: int, seed: int, on_progress: Callable[[int, int], None]) -> Recomputed:
    """Draw elements, compute them again, and compare.

    Args:
        work: what is computed.
        elements: how many, in each output.
        seed: which.
        on_progress: called with the bytes done and the bytes to do.

    Raises:
        TruncatedShardError, ReadError: a file became shorter meanwhile, or cannot be read.
    """
    read = [each for each in work.checkpoints if each is not None] + [each for _, each in work.outputs.values()]
    drawn = draw(read[-1].entries, elements, seed)
    total = sum(
        bytes_to_gather(each.entries[one.name], one) for each in read for one in drawn if one.name in each.entries
    )
    counts = _Counts(work.outputs)
    done = 0
    for some in _batches(drawn):
        stored: list[Stored] = []
        for values, nbytes in _gathered(read, some):
            stored.append(values)
            done += nbytes
            on_progress(done, total)
        sources, results = stored[: -len(work.outputs)], stored[-len(work.outputs) :]
        for one in some:
            of_sources = [each.get(one.name, _NOTHING) for each in sources]
            for index, of_result in zip(work.outputs, results, strict=True):
                _compare(work, index, one, of_sources, of_result[one.name], counts)
    return Recomputed(tuple(counts.findings()), counts.elements, counts.largest, done)


def _gathered(read: Sequence[Checkpoint], some: Sequence[Drawn]) -> Iterator[tuple[Stored, int]]:
    """The drawn elements of each checkpoint, and how many bytes they are; several are read at the same time."""

    def gather_all(checkpoint: Checkpoint) -> tuple[Stored, int]:
        with Files(threads=_THREADS) as files:
            held = [one for one in some if one.name in checkpoint.entries]  # what is copied need not be everywhere
            return {one.name: gather(files, checkpoint, one) for one in held}, files.bytes_read

    with ThreadPoolExecutor(_THREADS) as executor:
        yield from executor.map(gather_all, read)


def _batches(drawn: Sequence[Drawn]) -> Iterator[list[Drawn]]:
    """Some of the drawn elements at a time, so that memory does not grow with their number."""
    batch: list[Drawn] = []
    for one in drawn:
        for start in range(0, len(one.places), _AT_ONCE):
            batch.append(Drawn(one.name, one.places[start : start + _AT_ONCE]))
            if sum(len(each.places) for each in batch) >= _AT_ONCE or len(one.places) > start + _AT_ONCE:
                yield batch
                batch = []
    if batch:
        yield batch


class _Counts:
    """How many elements agree, and which do not."""

    def __init__(self, outputs: Mapping[int, tuple[str, Checkpoint]]) -> None:
        self._outputs = outputs
        self._wrong: dict[int, dict[str, int]] = {index: {} for index in outputs}
        self._examples: dict[int, list[str]] = {index: [] for index in outputs}
        self._compared = dict.fromkeys(outputs, 0)
        self.largest = 0.0

    @property
    def elements(self) -> int:
        return sum(self._compared.values())

    def add(
        self,
        index: int,
        one: Drawn,
        got: NDArray[np.generic],
        want: NDArray[np.generic],
        check_same_run: NDArray[np.bool_],
    ) -> None:
        entry = self._outputs[index][1].entries[one.name]
        self._compared[index] += len(one.places)
        places = np.flatnonzero(~check_same_run)
        if len(places):
            self._wrong[index][one.name] = self._wrong[index].get(one.name, 0) + len(places)
        for place in places[: max(0, _SHOWN - len(self._examples[index]))]:
            element = f"{one.name!r}{where(entry, one.places[place])}"
            self._examples[index].append(f"{element} is {got[place]}, expected {want[place]}")

    def findings(self) -> Iterator[Finding]:
        for index, wrong in self._wrong.items():
            if wrong:
                count, shown = sum(wrong.values()), self._outputs[index][0]
                of = f"{count:,} of {self._compared[index]:,} elements, in {len(wrong)} of the tensors"
                told = "; ".join(self._examples[index]) + ("; …" if count > len(self._examples[index]) else "")
                yield Finding("replay", f"{shown}{of}, are not what the sources give: {told}.")


def _compare(
    work: Recomputation,
    index: int,
    one: Drawn,
    sources: Sequence[NDArray[np.generic]],
    result: NDArray[np.generic],
    counts: _Counts,
) -> None:
    """Compare the elements of one tensor of one output. `sources` begins with the checkpoint where the average does."""
    entry, start = work.outputs[index][1].entries[one.name], work.coefficients.start
    if not entry.is_floating:
        source = sources[index - start]
        counts.add(index, one, result, source, _bits(result) == _bits(source))
        return
    taken = [checkpoint for checkpoint in work.checkpoints[start : index + 1] if checkpoint is not None]
    wide = work.wide or any(each is not None and each.entries[one.name].dtype == "F64" for each in work.checkpoints)
    coefficients = work.coefficients.of_tensor(one.name)
    weights = weights_of(coefficients, index)[start : index + 1]
    sizes = weights_of(coefficients, index, magnitudes=True)[start : index + 1]
    thetas = [
        widened(stored, checkpoint.entries[one.name].dtype) for stored, checkpoint in zip(sources, taken, strict=False)
    ]
    same = np.logical_and.reduce([theta == thetas[0] for theta in thetas])  # those stay what they are
    thetas = [theta if size else np.zeros_like(theta) for theta, size in zip(thetas, sizes, strict=True)]
    kept = widened(sources[index - start], taken[-1].entries[one.name].dtype)
    got, accumulated = widened(result, entry.dtype), "F64" if wide else "F32"
    part = 2.0**-64 if wide and max(np.abs(theta).max(initial=0.0) for theta in thetas) > _LARGE else 1.0
    thetas, got, kept = [theta * part for theta in thetas], got * part, kept * part  # so that no sum overflows
    with np.errstate(all="ignore"):
        want = np.asarray(sum((weight * theta for weight, theta in zip(weights, thetas, strict=True)), start=0.0))
        want = np.where(same, kept, want)
        most = allowed(
            got,
            want,
            thetas,
            coefficients,
            sizes,
            index=index,
            dtype=entry.dtype,
            accumulated=accumulated,
            beta_error=work.beta_error,
        )
        most = np.where(same, rounding(got, want, entry.dtype, accumulated), most)
        apart = np.where(got == want, 0.0, np.abs(got - want))
        check_same_run = apart <= most
        if work.allow_nonfinite:
            check_same_run |= ~np.isfinite(got) & ~np.isfinite(want)
        units = apart / size_of_unit(want, thetas, weights, dtype=entry.dtype, accumulated=accumulated)
    if np.isfinite(units).any():
        counts.largest = max(counts.largest, float(units[np.isfinite(units)].max()))
    counts.add(index, one, got / part, want / part, check_same_run)


def _bits(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return values.view(f"<u{values.dtype.itemsize}")
