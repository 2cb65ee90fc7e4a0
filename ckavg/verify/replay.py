"""`verify --replay`: β and α are found again, the path measured again where they need it, then elements compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckavg.checkpoints.run import Checkpoint, Run, Selection, averaged_statistics
from ckavg.errors import CkavgError, CorruptFileError, listed
from ckavg.output.record import Record
from ckavg.path.table import PathLength, to_measure
from ckavg.schemes import PEMA, Timeline
from ckavg.verify.arithmetic import coefficients_of
from ckavg.verify.elements import Comparison
from ckavg.verify.findings import Report
from ckavg.verify.remote import is_remote

_PATH_TOLERANCE = 1e-5
"""Relative difference of ℓ between kernels and devices, which add in different orders; in practice 1e-7."""

_TENSOR_PATH_TOLERANCE = 1e-6
"""The same of a tensor's own path, from which its β follows."""

_READ_WHOLE = 1 << 30
"""Bytes of all checkpoints up to which the whole path is measured again."""

_SAMPLED = 1 << 22
"""Elements of each checkpoint from which it is estimated otherwise."""

_STANDARD_ERRORS, _PART_OF_SAMPLE = 8.0, 0.02
"""Standard errors, and part of ℓ, by which a path may differ from an estimate."""


def check_elements(
    report: Report,
    record: Record,
    outputs: Mapping[int, tuple[str, Checkpoint]],
    checkpoints: Sequence[Checkpoint | None],
    *,
    source: Path | None,
    elements: int,
    seed: int,
) -> None:
    """Find β, then compute elements again.

    Args:
        report: to add to.
        record: of the result.
        outputs: as of `Comparison`, as far as they can be read.
        checkpoints: the sources by index; None where they are not what they were, or take no part.
        source: where the run is now, if the user named it.
        elements, seed: as of `Comparison.compare`.
    """
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
            path, used = _measured(record, run, per_tensor=per_tensor)
            report.bytes_read += path.bytes_read
            _check_path(report, record, path)
            if per_tensor:
                own = {name: used.tensor_lengths(name) for name in used.counted}
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
    # A record says float64 of a run with any float64 tensor; its other tensors were accumulated as was asked.
    is_mixed = any("float64" in each.dtypes for each in taken)
    comparison = Comparison(
        coefficients=coefficients,
        checkpoints=(*[None] * coefficients.start, *taken),
        outputs=outputs,
        wide=record.accumulate == "float64" and not is_mixed,
        allow_nonfinite=record.allow_nonfinite,
        beta_error=scheme.gamma * _TENSOR_PATH_TOLERANCE if isinstance(scheme, PEMA) and per_tensor else 0.0,
    )
    comparison.compare(report, elements, seed)


def _measured(record: Record, run: Run, *, per_tensor: bool) -> tuple[PathLength, PathLength]:
    """The path of the sources as they are now, from nothing that is cached; and that which the average was formed with.

    The first is measured as it was, where that takes little reading, otherwise estimated from a sample. The second
    differs where each tensor has its own β, which needs the exact path: then cached distances are taken.
    """
    from ckavg.path.cache import CachedPath
    from ckavg.path.estimate import estimate
    from ckavg.path.measure import measure
    from ckavg.path.plan import plan_path

    exclude, zero_sigma, nonfinite = record.path_exclude, record.zero_sigma, record.allow_nonfinite
    entries = to_measure(run.tensors, exclude)
    nbytes = sum(each.entries[name].nbytes for each in run.checkpoints for name in entries)
    if record.sample < 1:
        few, fraction = is_remote(record.inputs[-1]), record.sample
    elif nbytes <= _READ_WHOLE:
        fresh = plan_path(run, exclude=exclude, cached=CachedPath.empty(run))
        path = measure(run, fresh, zero_sigma=zero_sigma, allow_nonfinite=nonfinite)
        return path, path
    else:
        few, fraction = True, min(0.5, _SAMPLED / sum(entry.numel for entry in entries.values()))
    path = estimate(run, fraction, exclude=exclude, zero_sigma=zero_sigma, allow_nonfinite=nonfinite, few=few)
    if record.sample < 1 or not per_tensor:
        return path, path
    cached = plan_path(run, exclude=exclude)
    return path, measure(run, cached, zero_sigma=zero_sigma, allow_nonfinite=nonfinite)


def _check_path(report: Report, record: Record, path: PathLength) -> None:
    """Whether the sources have travelled as far as the record says."""
    errors = path.standard_errors if path.sample != record.sample else None
    for place, (got, want) in enumerate(zip(record.path_length or (), path.lengths, strict=True)):
        error = _STANDARD_ERRORS * errors[place] if errors else 0.0
        relative = _PART_OF_SAMPLE if errors else _PATH_TOLERANCE
        if not math.isclose(got, want, rel_tol=relative, abs_tol=error + 1e-300):
            expected = f"about {want:.4g}, give or take {errors[place]:.1g}" if errors else f"{want}"
            at = f"path_length is {got} at step {record.steps[place]}"
            report.problem("replay", f"{at}; the path of the sources is {expected}.")
            return
