"""Stage *schemes*: what every scheme takes and gives, and the checks they share."""

from __future__ import annotations

import abc
import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ckavg.errors import SettingError

Rule = Literal["ema", "bema"]
"""The update rules that `ckavg.replay` knows."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the checkpoints were saved, and how far the weights had travelled by then.

    Attributes:
        steps: absolute optimizer steps t_0 < t_1 < … < t_K; the first is the anchor's.
        path_length: normalized path length ℓ_0 = 0, ℓ_1, …, ℓ_K; None where it was not measured.
    """

    steps: tuple[int, ...]
    path_length: tuple[float, ...] | None = None

    @property
    def ages(self) -> tuple[int, ...]:
        """a_k = t_k − t_0 in optimizer steps."""
        return tuple(step - self.steps[0] for step in self.steps)

    @property
    def span(self) -> int:
        """T = t_K − t_0 in optimizer steps."""
        return self.steps[-1] - self.steps[0]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What a scheme decides, one value per checkpoint of the timeline.

    Attributes:
        rule: the update rule that takes these coefficients.
        start: index of the checkpoint from which the state begins, E ← θ_start; earlier ones have no part.
        betas: β_k in (0, 1] for k > start, None up to there.
        alphas: α_k ≥ 0 likewise, for rules with a correction; None for those without.
    """

    rule: Rule
    start: int
    betas: tuple[float | None, ...]
    alphas: tuple[float | None, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme(abc.ABC):
    """A way to average: its hyper-parameters are its fields, its coefficients follow from a timeline.

    Attributes:
        name: what is typed on the command line, such as `pema`.
        title: what it is called in prose.
        reference: the paper and equation it comes from.
        needs_path: whether it cannot do without the path length.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    needs_path: ClassVar[bool] = False
    label_fields: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β and α for every checkpoint of the timeline.

        Raises:
            SettingError: the hyper-parameters do not fit the timeline.
        """

    @property
    def every_from(self) -> int | None:
        """The step from which an update frequency counts; None: from the anchor's."""
        return None

    def parameters(self) -> dict[str, float | int | str]:
        """The hyper-parameters by name, as they go into the record of a result."""
        return dataclasses.asdict(self)

    @property
    def label(self) -> str:
        """A name for the result: the scheme, its main hyper-parameter, and every other one that is not the default."""
        parts = [self.name]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in self.label_fields or value != field.default:
                parts.append(f"{field.name.replace('_', '-')}{value:g}" if isinstance(value, float) else
                             f"{field.name.replace('_', '-')}{value}")  # fmt: skip
        return "-".join(parts)


def require(condition: bool, message: str, *, hint: str = "") -> None:
    """Raise `SettingError` unless the condition holds."""
    if not condition:
        raise SettingError(message, hint=hint)


def require_finite(scheme: Scheme) -> None:
    """Refuse hyper-parameters that are NaN or infinite."""
    for name, value in scheme.parameters().items():
        if isinstance(value, float):
            require(math.isfinite(value), f"{scheme.name}: {name} is {value}; it must be a finite number.")
