"""Study: the EMA scaling rule on the noisy parabola; `python -m benchmarks.evidence.parabola`.

How to Scale Your EMA, Section 3.1: the loss a θ²/2, gradient noise without a mean, and for a batch κ times as large a
learning rate κ η and κ times fewer steps. Err, Eq. 10 with g(ζ) = ζ, is the largest distance on the way between the
expected EMA of the run at κ = 1 and that of the scaled one. The expectations follow the recursions without noise, since
these are linear: E θ_{k+1} = (1 − κ η a) E θ_k.

ckavg averages these expected runs, saved step by step. One average gives the EMA at all steps: element j of the saved
tensor is the same run begun d_j steps later. Until it begins it stands at θ_0 = ζ_0, where the EMA stands still, too;
so element j of the final average is the EMA after n − d_j steps.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.evidence.figures import Curve, Panel, draw
from benchmarks.evidence.saved import Array, average_all, open_saved, save_run, weights_of
from benchmarks.evidence.tables import Table, publish, write_record
from ckavg import MomentumEMA

SCALES = tuple(2**power for power in range(1, 11))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parabola:
    """The problem at κ = 1.

    Attributes:
        curvature: a.
        learning_rate: η.
        momentum: ρ = 1 − β.
        steps: I.
        start: θ_0 = ζ_0.
    """

    curvature: float = 1.0
    learning_rate: float = 1e-4
    momentum: float = 1 - 1e-4
    steps: int = 10_000
    start: float = 1.0

    def model(self, scale: int) -> Array:
        """E θ_0, …, E θ_n of the run at κ = `scale`, n = ⌊I / κ⌋."""
        shrink = 1 - scale * self.learning_rate * self.curvature
        weights: Array = self.start * shrink ** np.arange(self.steps // scale + 1, dtype=np.float64)
        return weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Err of one scale, each with the step of the scaled run at which it occurs.

    Attributes:
        scale: κ.
        with_rule: momentum ρ^κ, the EMA taking in the weights before each step, as Definition 1.1 has it.
        without_rule: momentum ρ, likewise.
        with_rule_after: momentum ρ^κ, the EMA taking in the weights after each step.
        model: of the target model θ in place of ζ, which no momentum can change.
    """

    scale: int
    with_rule: tuple[float, int]
    without_rule: tuple[float, int]
    with_rule_after: tuple[float, int]
    model: tuple[float, int]


def averages_at(weights: Array, steps: Sequence[int], schemes: Sequence[MomentumEMA]) -> list[Array]:
    """The EMA of a scalar run at the given steps, by each of `schemes`, from one saved run of all of its steps.

    Args:
        weights: θ_0, …, θ_n.
        steps: at which the EMA is wanted, from 0 to n.
        schemes: of ckavg.
    """
    delays = len(weights) - 1 - np.array(steps)
    with tempfile.TemporaryDirectory(prefix="ckavg-evidence-") as scratch:
        save_run(Path(scratch), (weights[np.maximum(step - delays, 0)] for step in range(len(weights))))
        named = {str(place): scheme for place, scheme in enumerate(schemes)}
        records = average_all(open_saved(Path(scratch)), named, Path(scratch) / "averages")
        return [weights_of(record.outputs[-1].directory) for record in records.values()]


def study(parabola: Parabola, scales: Sequence[int] = SCALES) -> list[Outcome]:
    """Err for every scale. The run at κ = 1 is saved and averaged once, for the steps at which any scale needs it."""
    after = {scale: np.arange(parabola.steps // scale + 1) for scale in scales}
    needed = sorted({0, *(int(step) for of in scales for end in after[of] * of for step in (end - 1, end) if step > 0)})
    plain = MomentumEMA(momentum=parabola.momentum)
    base = dict(zip(needed, averages_at(parabola.model(1), needed, [plain])[0], strict=True))
    outcomes = []
    for scale in scales:
        scaled = MomentumEMA(momentum=parabola.momentum, batch_scale=scale)
        steps = after[scale]
        with_rule, without_rule = averages_at(parabola.model(scale), [int(step) for step in steps], [scaled, plain])
        # Taking in the weights before the step, the EMA is one step behind; its first update takes in θ_0 = ζ_0.
        before = np.maximum(steps - 1, 0)
        base_before = np.array([base[max(int(step) * scale - 1, 0)] for step in steps])
        base_after = np.array([base[int(step) * scale] for step in steps])
        outcomes.append(
            Outcome(
                scale=scale,
                with_rule=_largest(with_rule[before] - base_before),
                without_rule=_largest(without_rule[before] - base_before),
                with_rule_after=_largest(with_rule - base_after),
                model=_largest(parabola.model(scale) - parabola.model(1)[::scale][: len(steps)]),
            )
        )
    return outcomes


def _largest(differences: Array) -> tuple[float, int]:
    place = int(np.argmax(np.abs(differences)))
    return float(abs(differences[place])), place


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """Err by κ, and by how much more it is without the rule."""
    columns = ("κ", "with ρ^κ", "with ρ", "times as much", "with ρ^κ, after the step", "target model")
    rows = tuple(
        (
            each.scale,
            each.with_rule[0],
            each.without_rule[0],
            f"{each.without_rule[0] / each.with_rule[0]:.3g}",
            each.with_rule_after[0],
            each.model[0],
        )
        for each in outcomes
    )
    return Table("parabola", columns, rows)


def panel_of(outcomes: Sequence[Outcome]) -> Panel:
    """Err against κ."""
    curves = (
        ("with ρ^κ", [each.with_rule[0] for each in outcomes], False),
        ("with ρ", [each.without_rule[0] for each in outcomes], False),
        ("with ρ^κ, after the step", [each.with_rule_after[0] for each in outcomes], False),
        ("target model", [each.model[0] for each in outcomes], True),
    )
    x = [each.scale for each in outcomes]
    return Panel(
        title="Largest error of the expected EMA",
        x_label="batch scale κ",
        y_label="Err",
        x_scale="log",
        ticks={scale: str(scale) for scale in x},
        curves=[Curve(name=name, x=x, y=y, dashed=dashed) for name, y, dashed in curves],
    )


def main() -> None:
    """Run it, print Err, and write the table, the figure and the settings."""
    parabola = Parabola()
    outcomes = study(parabola)
    for each in outcomes:
        print(f"κ {each.scale}: {each.with_rule[0]:.4g} with ρ^κ, {each.without_rule[0]:.4g} with ρ", flush=True)
    publish([table_of(outcomes)])
    draw("parabola", [panel_of(outcomes)], columns=1)
    outcome_names = ("with_rule", "without_rule", "with_rule_after", "model")
    at_step = {str(each.scale): {name: getattr(each, name)[1] for name in outcome_names} for each in outcomes}
    write_record("parabola", {**dataclasses.asdict(parabola), "largest_at_step": at_step})


if __name__ == "__main__":
    main()
