"""Stage *verify*: what must be known before elements can be computed again: β, for each tensor if need be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ckavg.errors import CkavgError, listed
from ckavg.path.table import PathLength
from ckavg.run.statistics import averaged_statistics
from ckavg.run.values import Checkpoint, Run, Selection
from ckavg.schemes import PEMA, Coefficients, Timeline
from ckavg.verify.arithmetic import coefficients_of
from ckavg.verify.findings import Finding
from ckavg.verify.recompute import Recomputation, Recomputed, recompute
from ckavg.verify.record import Record

_PATH_TOLERANCE = 1e-5
"""Relative difference of ℓ between kernels and devices, which add in different orders; in practice 1e-7."""

_KERNELS = 1e-6
"""The same of a tensor's own path, on which its β hangs."""


def check_elements(
    record: Record,
    outputs: Mapping[int, tuple[str, Checkpoint]],
    checkpoints: Sequence[Checkpoint | None],
    *,
    source: Path | None,
    elements: int,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> Recomputed:
    """Find β, then compute elements again.

    Args:
        record: of the result.
        outputs: the result and its snapshots, as far as they can be read.
        checkpoints: the sources by index; None where they are not what they were, or take no part.
        source: where the run is now, if the user named it.
        elements, seed, on_progress: as of `recompute`.
    """
    try:
        coefficients = coefficients_of(record)
        checkpoints = (*[None] * coefficients.start, *checkpoints[coefficients.start :])
        nbytes, found = 0, list[Finding]()
        if any(each is None for each in checkpoints[coefficients.start :]) or not outputs:
            told = "some of the checkpoints cannot be read. If they were moved, name their directory with --source."
            return _nothing(told if outputs else "the result cannot be read.")
        if isinstance(record.scheme, PEMA) and record.scheme.scope == "tensor":
            path = _path(record, [each for each in checkpoints if each is not None], source)
            nbytes, found = path.bytes_read, _about(record, path)
            own = {name: path.tensor_lengths(name) for name in path.counted}
            coefficients = record.scheme.coefficients(
                Timeline(record.steps, record.path_length, own, record.anchor_is_init)
            )
    except (CkavgError, ArithmeticError) as error:
        told = error.message if isinstance(error, CkavgError) else str(error)
        return _nothing(told)
    *_, (_, result) = outputs.values()
    coefficients = coefficients.sparing(averaged_statistics(result.entries))
    if coefficients.uncorrected != record.uncorrected:
        told = f"uncorrected names {listed(record.uncorrected) or 'nothing'}; the running statistics of the result are "
        found.append(Finding("replay", f"{told}{listed(coefficients.uncorrected) or 'none'}."))
    work = _work(record, coefficients, checkpoints, outputs)
    done = recompute(work, elements=elements, seed=seed, on_progress=on_progress)
    return Recomputed((*found, *done.findings), done.elements, done.largest_deviation, nbytes + done.bytes_read)


def _work(
    record: Record,
    coefficients: Coefficients,
    checkpoints: Sequence[Checkpoint | None],
    outputs: Mapping[int, tuple[str, Checkpoint]],
) -> Recomputation:
    # A record says float64 of a run with any float64 tensor; its other tensors were accumulated as was asked.
    mixed = any("float64" in each.dtypes for each in checkpoints if each is not None)
    return Recomputation(
        coefficients=coefficients,
        checkpoints=checkpoints,
        outputs=outputs,
        wide=record.accumulate == "float64" and not mixed,
        allow_nonfinite=record.allow_nonfinite,
        beta_error=record.scheme.gamma * _KERNELS
        if isinstance(record.scheme, PEMA) and coefficients.tensor_betas
        else 0,
    )


def _nothing(why: str) -> Recomputed:
    return Recomputed((Finding("replay", f"No element was computed again: {why}"),), 0, 0.0, 0)


def _path(record: Record, checkpoints: Sequence[Checkpoint], source: Path | None) -> PathLength:
    """The path of every tensor, from what was kept of it as far as it goes. Keeps nothing."""
    from ckavg.path.estimate import estimate
    from ckavg.path.measure import measure
    from ckavg.path.plan import plan_path

    where = source or checkpoints[-1].directory.parent
    selection = Selection(init=checkpoints[0].path if record.anchor_is_init else None)
    run = Run(where, selection, tuple(checkpoints), ())
    exclude, zero_sigma = record.path_exclude, record.zero_sigma
    if record.sample < 1:
        return estimate(
            run, record.sample, exclude=exclude, zero_sigma=zero_sigma, allow_nonfinite=record.allow_nonfinite
        )
    known = plan_path(run, exclude=exclude).recalled.known
    return measure(run, exclude=exclude, zero_sigma=zero_sigma, known=known, allow_nonfinite=record.allow_nonfinite)


def _about(record: Record, path: PathLength) -> list[Finding]:
    """Whether the sources have travelled as far as the record says."""
    for step, got, want in zip(record.steps, record.path_length or (), path.lengths, strict=True):
        if not math.isclose(got, want, rel_tol=_PATH_TOLERANCE, abs_tol=1e-300):
            told = f"path_length is {got} at step {step}; the path of the sources is {want}."
            return [Finding("replay", told)]
    return []
