"""Stage *path*, its value: what is known of a run's path before pass 1, and what is left to measure. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckavg.path.table import TensorPath
from ckavg.run.values import Entry, Run


@dataclass(frozen=True, slots=True)
class Measured:
    """What pass 1 measured of one tensor: σ of θ_0, where it was asked for, and ‖θ_j − θ_{j−1}‖₁ by j."""

    sigma: float
    distances: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Known:
    """What was measured of a run before; each part may lack any tensor.

    Attributes:
        sigmas: σ of θ_0 by tensor name.
        distances: ‖θ_j − θ_{j−1}‖₁ by tensor name, for j = 1 … K.
    """

    sigmas: Mapping[str, float]
    distances: tuple[Mapping[str, float], ...]

    @classmethod
    def nothing(cls, run: Run) -> Known:
        """Of a run that was never measured."""
        return cls({}, ({},) * (len(run.checkpoints) - 1))

    def left_to_measure(self, names: Iterable[str]) -> ToMeasure:
        """What must be read for the path of these tensors."""
        wanted = tuple(names)
        steps = tuple(
            step
            for step, distances in enumerate(self.distances, start=1)
            if not all(name in distances for name in wanted)
        )
        return ToMeasure(wanted, self, not all(name in self.sigmas for name in wanted), steps)


@dataclass(frozen=True, slots=True)
class ToMeasure:
    """The part of pass 1 that is left.

    Attributes:
        names: the tensors whose path is wanted.
        known: what need not be measured.
        anchor: whether σ of θ_0 is to be measured.
        steps: the j whose distance from θ_{j−1} to θ_j is to be measured, in order.
    """

    names: tuple[str, ...]
    known: Known
    anchor: bool
    steps: tuple[int, ...]

    @property
    def to_read(self) -> tuple[int, ...]:
        """Indices of the checkpoints that must be read, in order."""
        ends = {index for step in self.steps for index in (step - 1, step)}
        return tuple(sorted(ends | {0} if self.anchor else ends))

    def completed(self, entries: Mapping[str, Entry], measured: Mapping[str, Measured]) -> Mapping[str, TensorPath]:
        """What is known and what was measured, together: the path of every tensor that is wanted."""
        new = set(self.steps)
        return {
            name: TensorPath(
                entries[name].numel,
                measured[name].sigma if self.anchor else self.known.sigmas[name],
                tuple(
                    measured[name].distances[step] if step in new else distances[name]
                    for step, distances in enumerate(self.known.distances, start=1)
                ),
            )
            for name in self.names
        }
