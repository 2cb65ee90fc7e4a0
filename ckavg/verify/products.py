"""`verify --replay` for low-rank adapters that were averaged by their products.

Each pair of factors is read whole, from the result and from all checkpoints. Their products are compared without
forming a product: with D = [w_k s B_k]_k beside −s B and E = [A_k]_k above A, the distance is ‖D E‖² = tr(DᵀD · E Eᵀ).
The least distance of any product of rank R is the sum of the smallest eigenvalues of the same expression without the
result (Eckart and Young, 1936). No factor is stacked, decomposed or cut as in the averaging. The distance may exceed
the least one by the rounding of the result's factors and of this computation.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckavg.checkpoints.adapters import Pair, find_pairs
from ckavg.checkpoints.configs import read_facts
from ckavg.checkpoints.run import Checkpoint
from ckavg.engine.reader import Files
from ckavg.errors import listed
from ckavg.output.record import Record
from ckavg.schemes import Coefficients
from ckavg.verify.arithmetic import Array, least_unit, relative_rounding, weights_of
from ckavg.verify.findings import Report
from ckavg.verify.replay import read_whole

_MOST_BYTES = 1 << 30
"""Bytes of all checkpoints up to which every pair is compared. Of larger ones, random pairs are."""

_COMPUTED = 2.0**-23
"""Error of the square root of a difference of float64 sums, relative to the size of all terms."""

_ENERGY_TOLERANCE = 1e-6
"""Tolerance of the discarded energy, relative to itself and to the total: enough for float32 sources."""


@dataclass(frozen=True, slots=True)
class _Factors:
    """The product s·BA of one checkpoint in float64: A (r, n), s·B (m, r), and their stored dtypes."""

    a: Array
    b: Array
    dtypes: tuple[str, str]


def check_products(
    report: Report,
    record: Record,
    coefficients: Coefficients,
    checkpoints: Sequence[Checkpoint | None],
    outputs: Mapping[int, tuple[str, Checkpoint]],
    *,
    seed: int,
) -> None:
    """Compare the products of the outputs with those of the sources.

    Args:
        report: to add to.
        record: of the result.
        coefficients: β and α, also of single tensors.
        checkpoints, outputs: see `Comparison`.
        seed: of the random choice of pairs, if they are too large to compare all.

    Raises:
        UnsupportedFormatError: the sources or the result have no such adapter.
        TruncatedShardError, ReadError: a file became shorter, or cannot be read.
    """
    sources = {index: (each, _pairs(each)) for index, each in enumerate(checkpoints) if each is not None}
    results = {index: (each, _pairs(each), prefix) for index, (prefix, each) in outputs.items()}
    *_, (last, of_last) = sources.values()
    names = sorted(of_last)
    random.Random(seed).shuffle(names)  # noqa: S311 - it guards nothing
    sizes = (last.entries[of_last[name].a].nbytes + last.entries[of_last[name].b].nbytes for name in names)
    before = itertools.accumulate(sizes, initial=0)
    drawn = [name for name, nbytes in zip(names, before, strict=False) if nbytes * len(sources) <= _MOST_BYTES]
    wrong: dict[str, list[str]] = {prefix: [] for _, _, prefix in results.values()}
    energies: dict[int, list[tuple[float, float]]] = {index: [] for index in results}
    with Files(threads=1) as files:
        for name in drawn:
            factors = {index: _read(files, each, pairs[name]) for index, (each, pairs) in sources.items()}
            own = coefficients.for_tensor(name)
            for index, (result, pairs, prefix) in results.items():
                taken = {place: weight for place, weight in enumerate(weights_of(own, index)) if weight}
                terms = [(weight, factors[place]) for place, weight in taken.items()]
                got = _read(files, result, pairs[name])
                report.elements += got.a.size + got.b.size
                total, least, distance, most_apart = _compare(terms, got)
                energies[index].append((total, least))
                if not distance <= most_apart:
                    wrong[prefix].append(
                        f"{pairs[name].module} is {distance:.3g} away, at most {most_apart:.3g} expected"
                    )
        report.bytes_read += files.bytes_read
    for prefix, each in wrong.items():
        if each:
            what = f"{len(each)} of {len(drawn)} products BA are not the averages of the sources"
            report.problem("replay", f"{prefix}{what}: {listed(each)}.")
    if len(drawn) == len(names):
        _check_energies(report, record, energies)


def _pairs(checkpoint: Checkpoint) -> dict[str, Pair]:
    return {pair.a: pair for pair in find_pairs(checkpoint, read_facts(checkpoint))}


def _read(files: Files, checkpoint: Checkpoint, pair: Pair) -> _Factors:
    a, b = (read_whole(files, checkpoint, name) for name in (pair.a, pair.b))
    scaling = pair.scaling
    if scaling is None:
        scaling = float(read_whole(files, checkpoint, pair.alpha)[0]) / pair.rank
    dtypes = checkpoint.entries[pair.a].dtype, checkpoint.entries[pair.b].dtype
    return _Factors(a.reshape(pair.rank, -1), scaling * b.reshape(-1, pair.rank), dtypes)


def _compare(terms: Sequence[tuple[float, _Factors]], got: _Factors) -> tuple[float, float, float, float]:
    """The energy of the sum, the least energy that a product of the result's rank misses, the distance of the result
    from the sum, and its bound.
    """
    b = np.concatenate([weight * each.b for weight, each in terms], axis=1)
    a = np.concatenate([each.a for _, each in terms])
    total = float(((b.T @ b) * (a @ a.T)).sum())
    least = float(_energies(b, a)[len(got.a) :].sum()) if len(a) > len(got.a) else 0.0
    both_b, both_a = np.concatenate([b, -got.b], axis=1), np.concatenate([a, got.a])
    squared = float(((both_b.T @ both_b) * (both_a @ both_a.T)).sum())
    size = float((np.linalg.norm(both_b, axis=0) * np.linalg.norm(both_a, axis=1)).sum())
    allowed = math.sqrt(least) + _rounded(got) + _COMPUTED * size
    return total, least, math.sqrt(max(squared, 0.0)), allowed


def _energies(b: Array, a: Array) -> Array:
    """The squared singular values of BA, the largest first."""
    values, vectors = np.linalg.eigh(b.T @ b)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return np.maximum(np.linalg.eigvalsh(root.T @ (a @ a.T) @ root)[::-1], 0.0)


def _rounded(got: _Factors) -> float:
    """The largest error of a product from rounding its factors: ‖δB A + B δA‖, column by column."""
    of_a, of_b = np.linalg.norm(got.a, axis=1), np.linalg.norm(got.b, axis=0)
    relative = 1.01 * sum(relative_rounding(dtype) for dtype in got.dtypes)
    tiny = [
        least_unit(dtype) * math.sqrt(size)
        for dtype, size in zip(got.dtypes, (got.a.shape[1], len(got.b)), strict=True)
    ]
    return float((relative * of_a * of_b + tiny[0] * of_b + tiny[1] * of_a).sum())


def _check_energies(report: Report, record: Record, energies: Mapping[int, Sequence[tuple[float, float]]]) -> None:
    """Compare the discarded energy with the record."""
    by_step = {output.step: output for output in record.outputs}
    for index, each in energies.items():
        output = by_step[record.steps[index]]
        total, lost = (math.fsum(pair[part] for pair in each) for part in (0, 1))
        expected = lost / total if total else 0.0
        got = output.discarded_energy
        if record.rank is None and got is None:
            continue
        if got is None or not math.isclose(got, expected, rel_tol=_ENERGY_TOLERANCE, abs_tol=_ENERGY_TOLERANCE):
            report.problem(
                "replay", f"discarded_energy of {output.name} is {got}; by the sources it is {expected:.6g}."
            )
