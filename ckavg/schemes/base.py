"""Stage *schemes*: the input and output of every scheme, and the checks they share."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from ckavg.errors import SettingError, listed, short_repr

Rule = Literal["ema", "bema", "ouema", "dema", "sum"]
"""The update rules that `averaging/rules.py` knows."""


_IN_NAMES = str.maketrans(",:", "-x")
"""Replacements for commas and colons in names of directories."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the checkpoints were saved, and how far the weights had travelled by then.

    Attributes:
        steps: absolute optimizer steps t_0 < t_1 < … < t_K; the first is the anchor's.
        path_length: normalized path length ℓ_0 = 0, ℓ_1, …, ℓ_K; None if it was not measured.
        tensor_path_length: the path of single tensors, by name; empty if it was not measured.
        anchor_is_init: whether θ_0 is a separate model rather than one of the run's checkpoints.
    """

    steps: tuple[int, ...]
    path_length: tuple[float, ...] | None = None
    tensor_path_length: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    anchor_is_init: bool = False

    __repr__ = short_repr

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
    """The coefficients of a scheme, one value per checkpoint of the timeline.

    Attributes:
        rule: the update rule that uses these coefficients.
        start: index of the checkpoint from which the state begins, E ← θ_start; earlier ones are not used.
        betas: β_k for k > start, in [0, 1], or the weights for the rule `sum`; None up to `start`.
        alphas: α_k ≥ 0 for k > start, for rules with a correction; None for rules without.
        tensor_betas: β of single tensors, by name; they replace `betas`.
        complements: 1 − α_k, for rules that divide by it: it would lose its digits where α_k is almost 1.
        uncorrected: names of tensors that are averaged with these β but without the correction of the rule.
    """

    rule: Rule
    start: int
    betas: tuple[float | None, ...]
    alphas: tuple[float | None, ...] | None = None
    tensor_betas: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    complements: tuple[float | None, ...] | None = None
    uncorrected: tuple[str, ...] = ()

    @classmethod
    def from_weights(cls, weights: Sequence[float]) -> Coefficients:
        """Coefficients for explicit weights of the checkpoints, which must sum to 1 and may be negative.

        >>> Coefficients.from_weights([0.25, 0.75]).anchor_weight
        0.25

        Raises:
            SettingError: they do not sum to 1.
        """
        total = math.fsum(weights)
        require(abs(total - 1) <= 1e-6, f"weights: they sum to {total:.10g}; they must sum to 1.")
        return cls("sum", 0, (None, *map(float, weights[1:])))

    __repr__ = short_repr

    def sparing(self, names: Iterable[str]) -> Coefficients:
        """The same coefficients with these running statistics uncorrected; without a correction, the same.

        Raises:
            SettingError: there are running statistics, and an explicit weight is negative.
        """
        if self.rule == "sum" and (statistics := sorted(names)):
            raise SettingError(
                "A weight is negative, and the model holds running statistics "
                f"({listed(statistics)}): a variance could become negative.",
                hint="Make all weights 0 or more.",
            )
        corrects = self.rule == "dema" or any(self.alphas or ())
        return dataclasses.replace(self, uncorrected=tuple(sorted(names))) if corrects else self

    def for_tensor(self, name: str) -> Coefficients:
        """The coefficients of a single tensor."""
        own = dataclasses.replace(self, betas=self.tensor_betas.get(name, self.betas))
        return Coefficients("ema", self.start, own.betas) if name in self.uncorrected else own

    def complement(self, index: int) -> float:
        """1 − α of checkpoint `index`; 1 without a correction."""
        if self.complements is not None and (given := self.complements[index]) is not None:
            return given
        return 1.0 - ((self.alphas[index] or 0.0) if self.alphas is not None else 0.0)

    @property
    def anchor_weight(self) -> float:
        """Weight of θ_start in the average: the update rule applied to 1 at the start and 0 in all later checkpoints.

        >>> Coefficients("bema", 0, (None, 0.5, 0.5), (None, 0.25, 0.125)).anchor_weight
        0.125
        """
        average = second = 1.0
        for index in range(self.start + 1, len(self.betas)):
            beta = 1.0 if (given := self.betas[index]) is None else given
            corrected = 1 - 1 / self.complement(index) if self.rule == "ouema" else 0.0
            average += beta * (corrected - (1.0 if self.rule == "sum" else average))
            second += beta * (average - second)
        if self.rule == "bema" and self.start + 1 < len(self.betas):
            return average - (1 - self.complement(-1))
        return 2 * average - second if self.rule == "dema" else average


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme(abc.ABC):
    """A way to average: its fields are the hyper-parameters, and a timeline determines its coefficients.

    To write your own, subclass it and define `coefficients`. Hyper-parameters, numbers or texts with defaults, are the
    fields of a frozen dataclass; with `needs_path = True` the path length is measured. The simplest coefficients are
    explicit weights:

        class Ends(ckavg.Scheme):
            def coefficients(self, timeline: ckavg.Timeline) -> ckavg.Coefficients:
                return ckavg.Coefficients.from_weights([0.5, *[0.0] * (len(timeline.steps) - 2), 0.5])

    Other processes do not know the class: verify its results where it has been imported.

    Attributes:
        name: its name on the command line, such as `pema`.
        title: its name in prose.
        reference: the paper and equation it comes from.
        needs_path: whether it needs the path length.
        label_fields: hyper-parameters that are part of every label.
        chosen_by: the hyper-parameter that selects this scheme among those of the same name.
        switches: values of hyper-parameters that a command-line switch sets, by the name of the switch.
        added_fields: hyper-parameters that are recorded only if they differ from the default: older records lack them.
        repeatable: hyper-parameters whose option may be repeated; the values are joined by commas.
        has_verb: whether it is a command of its own.
        in_sweep: whether `ckavg sweep` accepts its name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    needs_path: ClassVar[bool] = False
    label_fields: ClassVar[tuple[str, ...]] = ()
    chosen_by: ClassVar[str] = ""
    switches: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    added_fields: ClassVar[tuple[str, ...]] = ()
    repeatable: ClassVar[tuple[str, ...]] = ()
    has_verb: ClassVar[bool] = True
    in_sweep: ClassVar[bool] = True

    def __init_subclass__(cls, **settings: Any) -> None:
        # not super(): a slotted dataclass is created twice, and super() would refer to the first class
        abc.ABC.__init_subclass__(**settings)
        for name, value in (("name", cls.__name__.lower()), ("title", cls.__name__), ("reference", cls.__name__)):
            if name not in vars(cls):
                setattr(cls, name, value)

    @abc.abstractmethod
    def coefficients(self, timeline: Timeline) -> Coefficients:
        """β and α for every checkpoint of the timeline.

        Raises:
            SettingError: the hyper-parameters do not fit the timeline.
        """

    def checked_coefficients(self, timeline: Timeline) -> Coefficients:
        """The coefficients, checked for what the update rule requires: the scheme may be a user's own.

        Raises:
            SettingError: they are not valid, or the hyper-parameters do not fit the timeline.
        """
        found = self.coefficients(timeline)
        if wrong := _wrong(found, len(timeline.steps), needs_path=self.needs_path):
            raise SettingError(f"{self.name}: {wrong}.", hint="See Coefficients for what each rule takes.")
        return found

    @property
    def every_from(self) -> int | None:
        """The step from which an update frequency counts; None: the anchor's."""
        return None

    def parameters(self) -> dict[str, float | int | str]:
        """The hyper-parameters by name, as recorded; infinity, which JSON lacks, is `"inf"`."""
        added = {known.name: known.default for known in dataclasses.fields(self) if known.name in self.added_fields}
        return {
            name: "inf" if value == math.inf else value
            for name, value in dataclasses.asdict(self).items()
            if name not in added or value != added[name]
        }

    @property
    def stated(self) -> dict[str, float | int | str]:
        """The main hyper-parameter, and all others that are not the default."""
        defaults = {known.name: known.default for known in dataclasses.fields(self)}
        return {
            name: value
            for name, value in self.parameters().items()
            if name in self.label_fields or value != defaults[name]
        }

    @property
    def label(self) -> str:
        """A name for the result: the scheme and its stated hyper-parameters."""
        parts = [
            f"{name.replace('_', '-')}{f'{value:g}' if isinstance(value, float) else value}".translate(_IN_NAMES)
            for name, value in self.stated.items()
        ]
        return "-".join([self.name, *parts])


def _wrong(found: object, count: int, *, needs_path: bool) -> str:
    """Why these coefficients are not valid for `count` checkpoints; empty if they are."""
    if not isinstance(found, Coefficients):
        return f"coefficients() returns {type(found).__name__}; it must return Coefficients"
    if found.rule not in get_args(Rule):
        return f"rule is {found.rule!r}; it must be one of {', '.join(get_args(Rule))}"
    if not 0 <= found.start < count or (needs_path and found.start):
        return f"start is {found.start}; it must be {'0 with needs_path' if needs_path else f'from 0 to {count - 1}'}"
    lists = [found.betas, *found.tensor_betas.values(), *filter(None, (found.alphas, found.complements))]
    if any(len(each) != count for each in lists):
        return f"betas and alphas have {[*map(len, lists)][:4]} values; they must have {count}, one for each checkpoint"
    most = math.inf if found.rule == "sum" else 1.0
    for name, values in (("beta", found.betas), *(("beta", each) for each in found.tensor_betas.values())):
        for value in values[found.start + 1 :]:
            if value is None or not math.isfinite(value) or value > most or (value < 0 and found.rule != "sum"):
                return f"a {name} is {value}; it must be {'finite' if found.rule == 'sum' else 'from 0 to 1'}"
    if found.rule in ("bema", "ouema"):
        for value in (found.alphas or (None,) * count)[found.start + 1 :]:
            if value is None or not 0 <= value < math.inf:
                return f"an alpha is {value}; it must be finite, 0 or more"
    return ""


def burned_in(scheme: Scheme, burn_in: int, timeline: Timeline) -> int:
    """Index of the first checkpoint at or after a burn-in, in optimizer steps.

    Raises:
        SettingError: there is none.
    """
    start = next((index for index, step in enumerate(timeline.steps) if step >= burn_in), None)
    if start is None:
        last = timeline.steps[-1]
        raise SettingError(f"{scheme.name}: burn-in is {burn_in}, but the last checkpoint is at step {last}.")
    return start


def effective_count(weights: Sequence[float]) -> float:
    """1 / Σ w²: the number of equal weights with the same spread.

    >>> effective_count([0.5, 0.5, 0.0])
    2.0
    """
    return 1 / math.fsum(weight**2 for weight in weights)


def mean_age(steps: Sequence[int], weights: Sequence[float], last: int = -1) -> float:
    """Σ w_k (t_K − t_k) in optimizer steps, of an average that ends with checkpoint `last`; negative where it leads.

    >>> mean_age([0, 10, 20], [0.25, 0.25, 0.5])
    7.5
    """
    return math.fsum(weight * (steps[last] - step) for weight, step in zip(weights, steps, strict=True))


def require(condition: bool, message: str, *, hint: str = "") -> None:
    """Raise `SettingError` unless the condition holds."""
    if not condition:
        raise SettingError(message, hint=hint)


def require_finite(scheme: Scheme, *, but: tuple[str, ...] = ()) -> None:
    """Refuse hyper-parameters that are NaN or infinite; those named in `but` may be infinite."""
    for name, value in dataclasses.asdict(scheme).items():
        if isinstance(value, float):
            allowed = name in but and value == math.inf
            require(allowed or math.isfinite(value), f"{scheme.name}: {name} is {value}; it must be a finite number.")


def step_ages(timeline: Timeline, start: int, *, lag: float, multiplier: float) -> list[float]:
    """ρ + γ t_k of every checkpoint after `start`; t_k is the absolute optimizer step.

    Raises:
        SettingError: it falls below 1, so a negative power of it could exceed 1.
    """
    ages = [lag + multiplier * step for step in timeline.steps[start + 1 :]]
    require(
        all(age >= 1 for age in ages),
        f"lag + multiplier × step falls to {min(ages, default=1):g}; it must be at least 1.",
        hint="Raise --lag, or make --multiplier positive.",
    )
    return ages


def falling(ages: Sequence[float], power: float) -> list[float]:
    """age^(−power) of every age; 0 for an infinite power.

    >>> falling([1.0, 4.0], 0.5), falling([1.0, 4.0], math.inf)
    ([1.0, 0.5], [0.0, 0.0])
    """
    return [0.0 if power == math.inf else age**-power for age in ages]


def less_than_1(base: float, power: float) -> float:
    """1 − base^power, accurate also if base^power is almost 1.

    Args:
        base: in [0, 1], or at least 1 with a negative power.
        power: positive for a base below 1.

    >>> less_than_1(0.5, 2.0), less_than_1(0.5, 2e-20), less_than_1(0.0, 1.0)
    (0.75, 1.3862943611198905e-20, 1.0)
    """
    result = base**power
    return 1 - result if result <= 0.5 else -math.expm1(power * math.log(base))
