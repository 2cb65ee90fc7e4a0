"""Stage *health*, its values: what was measured of each tensor, what it reveals. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["nonfinite", "stale", "frozen", "spike", "dip", "foreign"]

PROBLEMS: frozenset[Kind] = frozenset({"nonfinite"})
"""The kinds that stand in the way of averaging; all others are warnings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStatistics:
    """What one reading measured of a floating tensor. Every tuple has one number for each checkpoint that holds it.

    A number that compares two checkpoints stands at the later one, and is 0 at the first. Elements that are NaN or
    infinite in either of the two count as unchanged.

    Attributes:
        name: the tensor's name.
        numel: its number of elements n.
        precision: the distance from 1 to the next number of the coarsest dtype in which it is stored.
        held: index of each checkpoint that holds it.
        mean: mean of the first of them.
        sigma: standard deviation of the first of them, ddof = 1; 0 for a single element; NaN where it is not finite.
        nan: how many elements are NaN.
        infinite: how many are infinite.
        largest: max |x_k| over the finite elements.
        distance: ‖x_k − x_{k−1}‖₁.
        rest: the same without the largest term of every piece, which one damaged value would be.
        change: max |x_k − x_{k−1}|.
        spike: how far an element lies outside of its two neighbours at most: max over the elements of
            min(|x_k − x_{k−1}|, |x_k − x_{k+1}|) where the two changes are of opposite sign; at both ends, of the one
            change there is.
        dip: the lesser of |x_{k−1}| and |x_{k+1}| in units of |x_k|, for the least |x_k| > 0 of a piece, if that is
            below 2⁻⁴⁰ of the piece's largest; the largest of all pieces, 0 where there is none.
        across: ‖x_{k+1} − x_{k−1}‖₁; 0 at both ends.
    """

    name: str
    numel: int
    precision: float
    held: tuple[int, ...]
    mean: float
    sigma: float
    nan: tuple[int, ...]
    infinite: tuple[int, ...]
    largest: tuple[float, ...]
    distance: tuple[float, ...]
    rest: tuple[float, ...]
    change: tuple[float, ...]
    spike: tuple[float, ...]
    dip: tuple[float, ...]
    across: tuple[float, ...]

    @property
    def is_finite(self) -> bool:
        """Whether all of its elements are finite in all checkpoints."""
        return not any(self.nan) and not any(self.infinite)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the weights reveal.

    Attributes:
        kind: `nonfinite`, `stale`, `frozen`, `spike`, `dip` or `foreign`.
        step: of the checkpoint it is about; None: of all of them.
        tensor: the tensor it is about; None: all of them.
        message: a sentence for people.
    """

    kind: Kind
    step: int | None
    tensor: str | None
    message: str

    @property
    def is_problem(self) -> bool:
        """Whether it stands in the way of averaging."""
        return self.kind in PROBLEMS


@dataclass(frozen=True, slots=True)
class Health:
    """What one reading of all weights revealed.

    Attributes:
        steps: optimizer step of every checkpoint that was read.
        findings: problems first, then by kind and in the order of the steps.
        path: ℓ_k − ℓ_{k−1} of each checkpoint but the first; None where weights are not finite or none count.
        sha256: SHA-256 of every weight file, in hexadecimal, by its path below the source.
        bytes_read: bytes of checkpoints read.
    """

    steps: tuple[int, ...]
    findings: tuple[Finding, ...]
    path: tuple[float | None, ...]
    sha256: Mapping[str, str]
    bytes_read: int
