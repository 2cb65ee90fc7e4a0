"""Stage *path*: the normalized path length, from what pass 1 measured. Pure numbers."""

from __future__ import annotations

import fnmatch
import itertools
import math
import shlex
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from operator import mul, truediv
from typing import TYPE_CHECKING, Literal

from ckavg.checkpoints.run import TensorInfo, running_statistics
from ckavg.errors import NonFiniteError, SettingError, short_repr

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

ZeroSigma = Literal["exclude", "eps"]

EPSILON = 1e-8
"""ε of σ_p = std(θ_0,p) + ε, used only with `zero_sigma="eps"`."""


@dataclass(frozen=True, slots=True)
class TensorPath:
    """What pass 1 measured of one tensor, or estimated from a sample of it.

    Attributes:
        numel: number of elements.
        sigma: standard deviation of θ_0 over its elements, ddof = 1; 0 for a single element.
        distances: ‖θ_j − θ_{j−1}‖₁ for j = 1 … K.
        variances: variance of the tensor's own path ℓ_p at j = 1 … K if it was estimated; empty if it is exact.
    """

    numel: int
    sigma: float
    distances: tuple[float, ...]
    variances: tuple[float, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity."""
        return all(map(math.isfinite, (self.sigma, *self.distances, *self.variances)))


Row = Sequence[float]
"""A number for each tensor; in memory an array."""


@dataclass(frozen=True, eq=False)  # equal as mappings are
class TensorPaths(Mapping[str, TensorPath]):
    """What pass 1 measured, by the name of the tensor. There may be 100,000: their numbers lie in rows.

    Attributes:
        names: of the tensors, sorted.
        numels, sigmas: a number for each tensor; see `TensorPath`.
        distances, variances: likewise, a row for each j = 1 … K.
    """

    names: Sequence[str]
    numels: Sequence[int]
    sigmas: Row
    distances: Sequence[Row]
    variances: Sequence[Row] = ()

    @classmethod
    def of(cls, tensors: Mapping[str, TensorPath]) -> TensorPaths:
        """The same tensors, all of them exact or all estimated."""
        names = sorted(tensors)
        each = [tensors[name] for name in names]
        distances, variances = (
            [array("d", row) for row in zip(*rows, strict=True)]
            for rows in ([one.distances for one in each], [one.variances for one in each])
        )
        numels, sigmas = array("q", (one.numel for one in each)), array("d", (one.sigma for one in each))
        return cls(names, numels, sigmas, distances, variances)

    @cached_property
    def are_finite(self) -> list[bool]:
        """Whether all numbers of each tensor are."""
        rows = zip(self.sigmas, *self.distances, *self.variances, strict=True)
        return [all(map(math.isfinite, row)) for row in rows]

    def __getitem__(self, name: str) -> TensorPath:
        place = bisect_left(self.names, name)
        if place == len(self) or self.names[place] != name:
            raise KeyError(name)
        distances, variances = (tuple(row[place] for row in rows) for rows in (self.distances, self.variances))
        return TensorPath(self.numels[place], self.sigmas[place], distances, variances)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tensors)"


@dataclass(frozen=True)  # without slots, for what is formed once
class PathLength:
    """How far the weights travelled, in units of their own spread (Pathwise EMA, Eq. 2).

        ℓ_k = (1/N) · Σ_p Σ_{j=1..k} ‖θ_j,p − θ_{j−1},p‖₁ / σ_p

    Attributes:
        steps: optimizer step of each checkpoint, the anchor's first.
        tensors: what was measured, by tensor name.
        zero_sigma: `exclude` leaves tensors without spread out of the sum and of N; `eps` divides by σ_p + 1e-8.
        bytes_read: bytes of checkpoints read to measure it; 0 if it was cached.
        sample: the fraction of each tensor that was read; 1 if it is exact.
        kernel: what computed it: `torch` or, compiled, `llvm`; None if it was cached.
    """

    steps: tuple[int, ...]
    tensors: TensorPaths
    zero_sigma: ZeroSigma
    bytes_read: int
    sample: float = 1.0
    kernel: Literal["torch", "llvm"] | None = "torch"

    __repr__ = short_repr

    def plot(self) -> Figure:
        """ℓ by step and by tensor as a matplotlib figure.

        Raises:
            SettingError: matplotlib is not installed.
        """
        from ckavg import path_figure  # of a later room

        return path_figure(self)

    def to_pandas(self) -> DataFrame:
        """A data frame by step: ℓ as `path_length`, its `standard_error` if estimated, and ℓ of each tensor.

        Raises:
            SettingError: pandas is not installed.
        """
        columns: dict[str, tuple[float, ...]] = {"path_length": self.lengths}
        if self.standard_errors is not None:
            columns["standard_error"] = self.standard_errors
        own = {name: self.tensor_lengths(name) for name in self.counted}
        return data_frame(columns | own, index=self.steps, index_name="step")

    def sigma(self, name: str) -> float:
        """The divisor σ_p of one tensor."""
        return self.tensors[name].sigma + self._added

    @property
    def _added(self) -> float:
        return 0.0 if self.zero_sigma == "exclude" else EPSILON

    @property
    def without_spread(self) -> tuple[str, ...]:
        """Tensors left out because σ_p = 0, by name."""
        return tuple(compress(self.tensors, (sigma + self._added == 0 for sigma in self.tensors.sigmas)))

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Tensors left out because they hold NaN or infinity, if that is allowed, by name."""
        return tuple(compress(self.tensors, (not each for each in self.tensors.are_finite)))

    @cached_property
    def _count(self) -> list[bool]:
        """Whether each tensor counts."""
        own = zip(self.tensors.sigmas, self.tensors.are_finite, strict=True)
        return [is_finite and sigma + self._added > 0 for sigma, is_finite in own]

    @cached_property
    def counted(self) -> tuple[str, ...]:
        """Tensors that count, by name."""
        return tuple(compress(self.tensors, self._count))

    def counts(self, name: str) -> bool:
        """Whether a tensor was measured and counts."""
        place = bisect_left(self.counted, name)
        return self.counted[place : place + 1] == (name,)

    @cached_property
    def uncounted(self) -> tuple[str, ...]:
        """Tensors that were measured and do not count, by name."""
        return tuple(compress(self.tensors, (not each for each in self._count)))

    @cached_property
    def parameters_counted(self) -> int:
        """N, the number of scalars that count."""
        return sum(compress(self.tensors.numels, self._count))

    @cached_property
    def lengths(self) -> tuple[float, ...]:
        """ℓ_0 = 0, ℓ_1, …, ℓ_K; all zero if no tensor counts."""
        counted, total = self.counted, self.parameters_counted
        if not counted:
            return (0.0,) * len(self.steps)
        units = array("d", (sigma + self._added for sigma in compress(self.tensors.sigmas, self._count)))
        moves = [fsum(map(truediv, compress(row, self._count), units)) for row in self.tensors.distances]
        lengths = (0.0, *(moved / total for moved in itertools.accumulate(moves)))
        if not math.isfinite(lengths[-1]):
            furthest = max(counted, key=lambda name: max(self.tensors[name].distances) / self.sigma(name))
            raise _beyond_float64(
                furthest,
                f"it moved {max(self.tensors[furthest].distances):g}, in units of its spread, {self.sigma(furthest):g}",
            )
        return lengths

    @property
    def standard_errors(self) -> tuple[float, ...] | None:
        """Standard error of each of `lengths` if they were estimated from a sample; None if they are exact."""
        if self.sample == 1:
            return None
        if not self.counted:
            return (0.0,) * len(self.steps)
        total = self.parameters_counted
        shares = [(numel / total) ** 2 for numel in compress(self.tensors.numels, self._count)]
        rows = (compress(row, self._count) for row in self.tensors.variances)
        return (0.0, *(math.sqrt(math.fsum(map(mul, shares, row))) for row in rows))

    def tensor_lengths(self, name: str) -> tuple[float, ...]:
        """Path of one counted tensor, ℓ_{p,k} = (1/numel) Σ_j ‖θ_j,p − θ_{j−1},p‖₁ / σ_p, from 0."""
        tensor, unit = self.tensors[name], self.tensors[name].numel * self.sigma(name)
        if not math.isfinite(unit):
            return (0.0, *itertools.accumulate(each / self.sigma(name) / tensor.numel for each in tensor.distances))
        return (0.0, *(moved / unit for moved in itertools.accumulate(tensor.distances)))


class TensorLengths(Mapping[str, tuple[float, ...]]):
    """The paths of the tensors that count, by name, each formed when it is asked for: few schemes ask."""

    def __init__(self, path: PathLength) -> None:
        self._path = path

    def __getitem__(self, name: str) -> tuple[float, ...]:
        if not self._path.counts(name):
            raise KeyError(name)
        return self._path.tensor_lengths(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._path.counted)

    def __len__(self) -> int:
        return len(self._path.counted)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tensors)"


def to_measure(entries: Mapping[str, TensorInfo], exclude: Iterable[str]) -> dict[str, TensorInfo]:
    """The tensors whose path is measured, by name: non-empty floating ones, except running statistics.

    Args:
        entries: all tensors of a checkpoint.
        exclude: shell patterns of names to leave out.
    """
    globs, left_out = tuple(exclude), running_statistics(entries)
    return {
        name: entry
        for name, entry in entries.items()
        if entry.is_floating
        and entry.numel
        and name not in left_out
        and not any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    }


def refuse_infinite(tensors: TensorPaths) -> None:
    """Raise if a spread or a distance of finite weights is beyond float64.

    Raises:
        NonFiniteError: it names the tensor.
    """
    for name in compress(tensors, (not each for each in tensors.are_finite)):
        raise _beyond_float64(name, "its spread, or how far it moved, is larger than float64 can hold")


def data_frame(columns: Mapping[str, Sequence[object]], *, index: Sequence[object], index_name: str) -> DataFrame:
    """Columns as a pandas data frame.

    Raises:
        SettingError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise SettingError(
            "Data frames need pandas, which is not installed.", hint="Install it: pip install pandas"
        ) from error
    return pandas.DataFrame(dict(columns), index=pandas.Index(index, name=index_name))


def fsum(numbers: Iterable[float]) -> float:
    """Their sum, rounded once; infinite if it is beyond float64.

    >>> fsum([1e308, 1e308, -1.0]), fsum([0.1] * 10)
    (inf, 1.0)
    """
    try:
        return math.fsum(numbers)
    except OverflowError:
        return math.inf


def _beyond_float64(name: str, why: str) -> NonFiniteError:
    return NonFiniteError(
        f"tensor {name!r}: the path length is beyond float64; {why}.",
        hint=f"Leave it out of the path length, not of the average: --path-exclude {shlex.quote(name)}",
    )
