"""The numbers that a record must have, and the error bound of a correct element against float64. Pure arithmetic.

The effective weights are computed backwards, from the output to the checkpoints by the chain rule. Pass 2 computes them
forwards on one-hot vectors. For K checkpoints this takes K steps instead of K². An element may differ by

    |got − expected| ≤ u/2 + e + ε_64 (4 K + 16) Σ_k g_k |θ_k|

u is the unit in the last place of the output dtype, if that is narrower than the accumulation dtype. e bounds the
rounding errors of the updates, with ε half the unit of 1 in the accumulation dtype:

    E ← E + β (θ − E)        e ← (1 − β) e + β e_θ + 3 ε β |θ − E| + ε |E|

This covers the rounding of β, of the difference, of the product and of the sum; e_θ is the error of OUEMA's corrected
θ, or of DEMA's e_1. β = 1 copies. A sum of differences, E ← E + w (θ − θ_0), adds 3 ε |w (θ − θ_0)| + ε |E|. The last
term of the bound is the rounding error of this computation; g_k adds up the sizes of all terms with checkpoint k.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ckavg.errors import CkavgError
from ckavg.output.record import Record
from ckavg.schemes import Coefficients, Timeline

Array = NDArray[np.float64]
Numbers = Sequence[float | None]

TOLERANCE = 1e-9
"""Relative difference from the formulas that is allowed: above what powers and sums of another processor differ by, far
below an edited digit.
"""

_SIGNIFICAND = {"F64": (53, -1022), "F32": (24, -126), "F16": (11, -14), "BF16": (8, -126)}
"""Bits of the significand and least exponent of normal numbers, by safetensors code."""

_SPARE = 1.01
"""Factor for second-order rounding errors, which the bound neglects."""

_POWERS = 2.0**-50
"""Relative error of β from the powers of another processor."""


def coefficients_of(record: Record) -> Coefficients:
    """β and α by the scheme's own formulas, from the recorded steps and path.

    Raises:
        SettingError: the hyper-parameters do not fit the steps.
        ArithmeticError: the numbers do not fit the formulas.
    """
    return record.to_scheme().coefficients(
        Timeline(record.steps, record.path_length, anchor_is_init=record.anchor_is_init)
    )


def check_arithmetic(record: Record) -> list[str]:
    """Problems of β, α, the weights, the anchor, the span and the path of a record, by the formulas."""
    try:
        coefficients = coefficients_of(record)
    except (CkavgError, ArithmeticError) as error:
        return [f"the parameters do not fit the recorded steps: {getattr(error, 'message', error)}"]
    last = record.output_index
    if last < coefficients.start:
        return [f"step {record.output.step} comes before the average begins."]
    scale = max(1.0, max(weights_of(coefficients, last, magnitudes=True)))
    wrong = [
        _compare(record, "betas", record.betas, coefficients.betas),
        _compare(record, "alphas", record.alphas, coefficients.alphas),
        _compare(record, "weights", record.weights, weights_of(coefficients, last), scale=scale),
    ]
    weights = weights_of(coefficients, last)
    ages = [record.steps[last] - step for step in record.steps]
    readouts = {
        "effective_count": (1 / math.fsum(weight * weight for weight in weights), 0.0),
        "mean_age": (math.fsum(map(operator.mul, weights, ages)), scale * max(map(abs, ages))),
        "anchor_weight": (weights[coefficients.start], scale),
    }
    for name, (value, size) in readouts.items():
        got = getattr(record, name)
        if got is not None and not math.isclose(got, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE * size):
            wrong.append(f"{name} is {got}; by the weights it is {value}.")
    lengths = record.path_length or (0.0,)
    if lengths[0] != 0:
        wrong.append(f"path_length begins with {lengths[0]}; it must begin with 0.")
    elif record.sample == 1 and list(lengths) != sorted(lengths):
        wrong.append("path_length decreases from one checkpoint to the next; a path length only grows.")
    total = math.fsum(record.weights)
    if abs(total - 1) > TOLERANCE * scale:
        wrong.append(f"the weights sum to {total!r}, not to 1.")
    anchor = record.steps[coefficients.start]
    span = record.steps[-1] - anchor
    if (record.anchor_step, record.span) != (anchor, span):
        recorded = f"{record.anchor_step} and {record.span}"
        wrong.append(f"anchor_step and span are {recorded}; by the steps they are {anchor} and {span}.")
    return list(filter(None, wrong))


def _compare(record: Record, name: str, recorded: Numbers | None, expected: Numbers | None, scale: float = 0.0) -> str:
    if recorded is None or expected is None:
        if recorded is expected:
            return ""
        return f"{name} are {'missing; the scheme has them' if recorded is None else 'present; the scheme has none'}."
    wrong = [
        place
        for place, (got, want) in enumerate(zip(recorded, expected, strict=True))
        if (got is None) != (want is None)
        or not math.isclose(got or 0.0, want or 0.0, rel_tol=TOLERANCE, abs_tol=TOLERANCE * scale)
    ]
    if not wrong:
        return ""
    place = wrong[0]
    return (
        f"{name}: {len(wrong)} of {len(expected)} do not follow from the steps, the path and the parameters; at "
        f"step {record.steps[place]} the record has {recorded[place]}, the formula gives {expected[place]}."
    )


def weights_of(coefficients: Coefficients, last: int, *, magnitudes: bool = False) -> tuple[float, ...]:
    """The weight of each checkpoint in the average after checkpoint `last`.

    Args:
        coefficients: of the scheme.
        last: index of that checkpoint.
        magnitudes: add up the absolute values of all terms of a checkpoint, so that nothing cancels.

    >>> from ckavg.schemes import EMA
    >>> weights_of(EMA(gamma=1.0).coefficients(Timeline((0, 1, 2, 3))), 3)
    (0.25, 0.25, 0.25, 0.25)
    """
    start, rule = coefficients.start, coefficients.rule
    betas = coefficients.betas
    minus = 1.0 if magnitudes else -1.0
    weights = [0.0] * len(betas)
    if rule == "sum":
        own = [beta or 0.0 for beta in betas[start + 1 : last + 1]]
        weights[start + 1 : last + 1] = map(abs, own) if magnitudes else own
        weights[start] = 1.0 + minus * math.fsum(weights)
        return tuple(weights)
    first, second = (
        (2.0, minus) if rule == "dema" else (1.0, 0.0)
    )  # the derivatives of the output by e_1 (or E) and by e_2
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
    if rule == "bema" and last > start and coefficients.alphas is not None:
        alpha = coefficients.alphas[last] or 0.0
        weights[last] += alpha
        weights[start] += minus * alpha
    return tuple(weights)


def unit(values: Array, dtype: str) -> Array:
    """The unit in the last place (ulp) of a dtype for each value; for 0 that of the smallest numbers.

    >>> float(unit(np.zeros(1), "F32")[0]) == 2.0**-149
    True
    """
    bits, least = _SIGNIFICAND[dtype]
    _, exponent = np.frexp(np.abs(values))
    return np.asarray(np.ldexp(1.0, np.maximum(np.where(values == 0, least, exponent - 1), least) - bits + 1))


def relative_rounding(dtype: str) -> float:
    """The largest relative error of rounding to a dtype: half an ulp of 1."""
    return float(2.0 ** -_SIGNIFICAND[dtype][0])


def least_unit(dtype: str) -> float:
    """The unit of the smallest numbers of a dtype."""
    return float(unit(np.zeros(1), dtype)[0])


def rounding(got: Array, expected: Array, dtype: str, accumulated: str) -> Array:
    """Half an ulp of the output dtype if it is narrower than the accumulation dtype; 0 otherwise."""
    if _SIGNIFICAND[dtype][0] >= _SIGNIFICAND[accumulated][0]:
        return np.zeros_like(expected)
    largest = np.maximum(np.abs(got), np.abs(expected))  # a value just below a power of 2 may be rounded up to it
    return np.asarray(unit(largest, dtype) / 2)


def allowed(
    got: Array,
    expected: Array,
    thetas: Sequence[Array],
    coefficients: Coefficients,
    magnitudes: Sequence[float],
    *,
    index: int,
    dtype: str,
    accumulated: str,
    beta_error: float = 0.0,
) -> Array:
    """The largest difference that rounding explains, for each element.

    Args:
        got: (n,) values in the result.
        expected: (n,) values computed in float64.
        thetas: the (n,) values of each checkpoint that takes part, in order.
        coefficients: of this tensor.
        magnitudes: g_k of each checkpoint.
        index: of the last checkpoint.
        dtype: of the output, as a safetensors code.
        accumulated: `F32` or `F64`.
        beta_error: relative error of β.
    """
    own = 2.0 ** -_SIGNIFICAND[accumulated][0]
    terms = sum((size * np.abs(theta) for size, theta in zip(magnitudes, thetas, strict=True)), start=0.0)
    computed = 2.0**-53 * (4 * (len(thetas) - 1) + 16) * terms
    tiny = 8 * len(thetas) * unit(np.zeros(1), accumulated)  # subnormal numbers have fewer bits
    updates = _update_error(thetas, coefficients, index, own, max(beta_error, _POWERS))
    return np.asarray(rounding(got, expected, dtype, accumulated) + _SPARE * updates + computed + tiny)


def _update_error(
    thetas: Sequence[Array], coefficients: Coefficients, index: int, own: float, beta_error: float
) -> Array:
    """(n,) the bound e of the module's docstring."""

    def step(at: Array, error: Array, to: Array, its_error: Array, beta: float) -> tuple[Array, Array]:
        if beta == 1:
            return to, its_error
        after = at + beta * (to - at)
        rounded = (3 * own + beta_error) * beta * np.abs(to - at) + own * np.abs(after)
        return after, (1 - beta) * error + beta * its_error + rounded

    rule, anchor, none = coefficients.rule, thetas[0], np.zeros_like(thetas[0])
    first, error, second, its_error = anchor, none, anchor, none
    for place, theta in enumerate(thetas[1:], start=coefficients.start + 1):
        if rule == "sum":
            added = (coefficients.betas[place] or 0.0) * (theta - anchor)
            first = first + added
            error = error + (3 * own + beta_error) * np.abs(added) + own * np.abs(first)
            continue
        beta, taken, of_taken = coefficients.betas[place] or 0.0, theta, none
        if rule == "ouema":
            away = (theta - anchor) / coefficients.complement(place)
            taken, of_taken = anchor + away, own * (4 * np.abs(away) + np.abs(anchor + away))
        first, error = step(first, error, taken, of_taken, beta)
        if rule == "dema":
            second, its_error = step(second, its_error, first, error, beta)
    if rule == "dema":
        return 2 * error + its_error + own * (np.abs(first - second) + np.abs(2 * first - second))
    if rule == "bema" and len(thetas) > 1:
        away = (1 - coefficients.complement(index)) * (thetas[-1] - anchor)
        return error + own * (3 * np.abs(away) + np.abs(first + away))
    return error


def size_of_unit(
    expected: Array, thetas: Sequence[Array], weights: Sequence[float], *, dtype: str, accumulated: str
) -> Array:
    """The unit of deviations: an ulp of the output dtype or, where terms cancel, of the accumulation dtype."""
    terms = np.zeros_like(expected)
    for theta, weight in zip(thetas, weights, strict=True):
        terms += abs(weight) * np.abs(theta)
    return np.asarray(np.maximum(unit(expected, dtype), unit(terms, accumulated)))
