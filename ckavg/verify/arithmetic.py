"""Stage *verify*: do the numbers of a record follow from its steps, its path and its scheme? Pure arithmetic.

The effective weights are not formed as the replay forms them, forwards on one-hot vectors, but backwards: from the
output to the checkpoints, by the chain rule. For K checkpoints that takes K steps and not K².
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckavg.errors import CkavgError
from ckavg.output.record import Record
from ckavg.schemes import Coefficients, Timeline
from ckavg.verify.findings import Finding

TOLERANCE = 1e-9
"""Relative difference from the formulas that another processor's powers and sums may make, and much less than a
digit that somebody changed.
"""


def coefficients_of(record: Record) -> Coefficients:
    """β and α by the scheme's own formulas, from the recorded steps and path.

    Raises:
        SettingError: the hyper-parameters do not fit the steps.
        ArithmeticError: neither do the numbers.
    """
    return record.to_scheme().coefficients(
        Timeline(record.steps, record.path_length, anchor_is_init=record.anchor_is_init)
    )


def check_arithmetic(record: Record) -> list[Finding]:
    """Compare β, α, the weights, the anchor and the span of a record with what the formulas give."""
    try:
        coefficients = coefficients_of(record)
    except (CkavgError, ArithmeticError) as error:
        told = error.message if isinstance(error, CkavgError) else str(error)
        return [Finding("record", f"the parameters do not fit the recorded steps: {told}")]
    last = record.output_index
    if last < coefficients.start:
        return [Finding("record", f"step {record.output.step} comes before the average begins.")]
    weights = weights_of(coefficients, last)
    scale = max(1.0, max(weights_of(coefficients, last, magnitudes=True)))
    found = [
        *_compared(record, "betas", record.betas, coefficients.betas),
        *_compared(record, "alphas", record.alphas, coefficients.alphas),
        *_compared(record, "weights", record.weights, weights, scale=scale),
        *_about_path(record),
    ]
    total = math.fsum(record.weights)
    if abs(total - 1) > TOLERANCE * scale:
        found.append(Finding("record", f"the weights sum to {total!r}, not to 1."))
    anchor = record.steps[coefficients.start]
    if (record.anchor_step, record.span) != (anchor, record.steps[-1] - anchor):
        found.append(
            Finding(
                "record",
                f"anchor_step and span are {record.anchor_step} and {record.span}; "
                f"by the steps they are {anchor} and {record.steps[-1] - anchor}.",
            )
        )
    return found


def weights_of(
    coefficients: Coefficients,
    last: int,
    *,
    magnitudes: bool = False,
) -> tuple[float, ...]:
    """The weight of each checkpoint in the average as it stands after checkpoint `last`.

    Args:
        coefficients: of the scheme.
        last: index of that checkpoint.
        magnitudes: let nothing cancel: add up the sizes of all terms that a checkpoint comes into.

    >>> from ckavg.schemes import EMA
    >>> weights_of(EMA(gamma=1.0).coefficients(Timeline((0, 1, 2, 3))), 3)
    (0.25, 0.25, 0.25, 0.25)
    """
    start, rule = coefficients.start, coefficients.rule
    betas = coefficients.betas
    minus = 1.0 if magnitudes else -1.0
    weights = [0.0] * len(betas)
    first, second = (2.0, minus) if rule == "dema" else (1.0, 0.0)  # how the output hangs on e_1, or on E, and on e_2
    for place in range(last, start, -1):
        beta = betas[place] or 0.0
        first += beta * second
        second *= 1 - beta
        share = beta * first
        if rule == "ouema":  # θ̃ = θ_0 + (θ − θ_0) · stretch
            stretch = 1 / coefficients.complement(place)
            weights[start] += share * (1 + minus * stretch)
            share *= stretch
        weights[place] = share
        first *= 1 - beta
    weights[start] += first + second
    if rule == "bema" and last > start:
        weights[last] += _alpha(coefficients, last)
        weights[start] += minus * _alpha(coefficients, last)
    return tuple(weights)


def _alpha(coefficients: Coefficients, place: int) -> float:
    return (coefficients.alphas[place] or 0.0) if coefficients.alphas is not None else 0.0


def _compared(
    record: Record,
    name: str,
    recorded: Sequence[float | None] | None,
    expected: Sequence[float | None] | None,
    *,
    scale: float = 0.0,
) -> list[Finding]:
    if recorded is None or expected is None:
        if recorded is expected:
            return []
        told = "null, but the scheme has some" if recorded is None else "there, but the scheme has none"
        return [Finding("record", f"{name} are {told}.")]
    wrong = [
        place
        for place, (got, want) in enumerate(zip(recorded, expected, strict=True))
        if (got is None) != (want is None)
        or (got is not None and want is not None and not _close(got, want, scale=scale))
    ]
    if not wrong:
        return []
    place = wrong[0]
    return [
        Finding(
            "record",
            f"{name}: {len(wrong)} of {len(expected)} do not follow from the steps, the path and the parameters; at "
            f"step {record.steps[place]} the record has {recorded[place]}, the formula gives {expected[place]}.",
        )
    ]


def _close(got: float, want: float, *, scale: float) -> bool:
    return math.isclose(got, want, rel_tol=TOLERANCE, abs_tol=TOLERANCE * scale)


def _about_path(record: Record) -> list[Finding]:
    lengths = record.path_length
    if lengths is None:
        return []
    if lengths[0] != 0:
        return [Finding("record", f"path_length begins with {lengths[0]}; it must begin with 0.")]
    if record.sample == 1 and list(lengths) != sorted(lengths):
        return [Finding("record", "path_length falls from one checkpoint to the next; a path only grows.")]
    return []
