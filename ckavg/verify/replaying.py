"""Stage *verify*: what must be known before elements can be computed again: β, for each tensor if need be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ckavg.checkpoints.run import Checkpoint, Run, Selection
from ckavg.checkpoints.statistics import averaged_statistics
from ckavg.errors import CkavgError, listed
from ckavg.output.record import Record
from ckavg.path.table import PathLength, to_measure
from ckavg.schemes import PEMA, Coefficients, Timeline
from ckavg.verify.arithmetic import coefficients_of
from ckavg.verify.elsewhere import is_elsewhere
from ckavg.verify.findings import Finding
from ckavg.verify.recompute import Recomputation, Recomputed, recompute

_PATH_TOLERANCE = 1e-5
"""Relative difference of ℓ between kernels and devices, which add in different orders; in practice 1e-7."""

_READ_WHOLE = 1 << 30
"""Bytes of all checkpoints up to which the whole path is measured again."""

_SAMPLED = 1 << 22
"""Elements of each checkpoint that it is told from otherwise."""

_DEVIATIONS, _OF_A_SAMPLE = 8.0, 0.02
"""Standard errors, and part of ℓ, by which a path may differ from what a sample tells."""

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
        scheme = record.to_scheme()
        if scheme.needs_path:
            run = _run(record, [each for each in checkpoints if each is not None], source)
            path, known = _measured(record, run)
            nbytes, found = path.bytes_read, _about(record, path)
            if isinstance(scheme, PEMA) and scheme.scope == "tensor":
                path = known or path
                own = {name: path.tensor_lengths(name) for name in path.counted}
                coefficients = scheme.coefficients(
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
    scheme = record.to_scheme()
    mixed = any("float64" in each.dtypes for each in checkpoints if each is not None)
    return Recomputation(
        coefficients=coefficients,
        checkpoints=checkpoints,
        outputs=outputs,
        wide=record.accumulate == "float64" and not mixed,
        allow_nonfinite=record.allow_nonfinite,
        beta_error=scheme.gamma * _KERNELS if isinstance(scheme, PEMA) and coefficients.tensor_betas else 0,
    )


def _nothing(why: str) -> Recomputed:
    return Recomputed((Finding("replay", f"No element was computed again: {why}"),), 0, 0.0, 0)


def _run(record: Record, checkpoints: Sequence[Checkpoint], source: Path | None) -> Run:
    selection = Selection(init=checkpoints[0].path if record.anchor_is_init else None)
    return Run(source or checkpoints[-1].directory.parent, selection, tuple(checkpoints), ())


def _measured(record: Record, run: Run) -> tuple[PathLength, PathLength | None]:
    """The path of the sources as they are now, by nothing that was kept of it. Keeps nothing.

    As it was had, where that takes little reading; otherwise from a sample. Then comes what the average was formed with
    in any case: where each tensor has its own β, its path from what was kept.
    """
    from ckavg.path.cache import CachedPath
    from ckavg.path.estimate import estimate
    from ckavg.path.measure import measure
    from ckavg.path.plan import plan_path

    scheme = record.to_scheme()
    exclude, zero_sigma, nonfinite = record.path_exclude, record.zero_sigma, record.allow_nonfinite
    entries = to_measure(run.tensors, exclude)
    nbytes = sum(each.entries[name].nbytes for each in run.checkpoints for name in entries)
    if record.sample < 1:
        few = is_elsewhere(record.inputs[-1])
        fraction = record.sample
    elif nbytes <= _READ_WHOLE:
        fresh = plan_path(run, exclude=exclude, cached=CachedPath.empty(run))
        return measure(run, fresh, zero_sigma=zero_sigma, allow_nonfinite=nonfinite), None
    else:
        few, fraction = True, min(0.5, _SAMPLED / sum(entry.numel for entry in entries.values()))
    path = estimate(run, fraction, exclude=exclude, zero_sigma=zero_sigma, allow_nonfinite=nonfinite, few=few)
    if record.sample < 1 or not (isinstance(scheme, PEMA) and scheme.scope == "tensor"):
        return path, None
    return path, measure(run, plan_path(run, exclude=exclude), zero_sigma=zero_sigma, allow_nonfinite=nonfinite)


def _about(record: Record, path: PathLength) -> list[Finding]:
    """Whether the sources have travelled as far as the record says."""
    errors = path.standard_errors if path.sample != record.sample else None
    for place, (got, want) in enumerate(zip(record.path_length or (), path.lengths, strict=True)):
        error = _DEVIATIONS * errors[place] if errors else 0.0
        relative = _OF_A_SAMPLE if errors else _PATH_TOLERANCE
        if not math.isclose(got, want, rel_tol=relative, abs_tol=error + 1e-300):
            about = f"about {want:.4g}, give or take {errors[place]:.1g}" if errors else f"{want}"
            told = f"path_length is {got} at step {record.steps[place]}; the path of the sources is {about}."
            return [Finding("replay", told)]
    return []
