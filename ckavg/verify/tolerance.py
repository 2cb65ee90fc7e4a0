"""Stage *verify*: how far a right element may be from what float64 gives for it. Pure arithmetic, on numpy arrays.

    |got − expected| ≤ u/2 + ε_a Σ_k r_k g_k |θ_k| + ε_64 (4 K + 16) Σ_k g_k |θ_k|

u is the unit of the last place of the output dtype, ε the half of that of 1 in the accumulation dtype, and in float64.
g_k is the size of all terms into which checkpoint k comes, |w_k| where nothing cancels. A term that came in at
checkpoint k went through K − k updates more, each with three roundings at most, and is rounded a few times as it comes
in and goes out: r_k = 3 (K − k) + 8, twice as many for DEMA. The last sum is what this computation itself rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckavg.schemes.base import Rule
from ckavg.verify.sample import Array

_SIGNIFICAND = {"F64": (53, -1022), "F32": (24, -126), "F16": (11, -14), "BF16": (8, -126)}
"""Bits of the significand and least exponent of normal numbers, by safetensors code."""


def unit(values: Array, dtype: str) -> Array:
    """The unit of the last place of a dtype at the size of each value."""
    bits, least = _SIGNIFICAND[dtype]
    _, exponent = np.frexp(np.abs(values))
    return np.asarray(np.ldexp(1.0, np.maximum(exponent - 1, least) - bits + 1))


def allowed(
    got: Array,
    expected: Array,
    thetas: Sequence[Array],
    magnitudes: Sequence[float],
    *,
    dtype: str,
    accumulated: str,
    rule: Rule,
) -> Array:
    """The largest difference that roundings explain, for each element.

    Args:
        got: (n,) what the result holds.
        expected: (n,) what float64 gives.
        thetas: the (n,) values of each checkpoint that takes part, in order.
        magnitudes: g_k of each.
        dtype: of the output, as a safetensors code.
        accumulated: `F32` or `F64`.
        rule: the update rule.
    """
    largest = np.maximum(np.abs(got), np.abs(expected))  # a value just below a power of 2 may be rounded up to it
    last, passes = len(thetas) - 1, 2 if rule == "dema" else 1
    rounded, computed = np.zeros_like(expected), np.zeros_like(expected)
    for place, (theta, magnitude) in enumerate(zip(thetas, magnitudes, strict=True)):
        term = magnitude * np.abs(theta)
        rounded += passes * (3 * (last - place) + 8) * term
        computed += (4 * last + 16) * term
    own = 2.0 ** -_SIGNIFICAND[accumulated][0]
    tiny = 8 * len(thetas) * unit(np.zeros(1), accumulated)  # where numbers are too small to have all their bits
    return np.asarray(unit(largest, dtype) / 2 + own * rounded + 2.0**-53 * computed + tiny)


def size_of_unit(
    expected: Array, thetas: Sequence[Array], weights: Sequence[float], *, dtype: str, accumulated: str
) -> Array:
    """What deviations are told in: a unit of the output dtype or, where terms cancel, of the accumulation dtype."""
    terms = np.zeros_like(expected)
    for theta, weight in zip(thetas, weights, strict=True):
        terms += abs(weight) * np.abs(theta)
    return np.asarray(np.maximum(unit(expected, dtype), unit(terms, accumulated)))
