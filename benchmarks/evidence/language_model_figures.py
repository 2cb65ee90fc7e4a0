"""Figures of the language-model study, in the manner of those of *Pathwise EMA*."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.evidence.figures import Curve, Panel, draw
from benchmarks.evidence.language_model_run import LAST, PER_TENSOR, Outcome, Setting
from benchmarks.evidence.language_model_tables import BEST_EMA, EMA_POWERS, best, difference
from benchmarks.evidence.tables import RESULTS, Difference

Against = Callable[[str, str, int], Difference]
"""The difference between the averages of two names, at an interval."""

_COMPARED = ("PEMA 0.15", *EMA_POWERS, "BEMA 0.2, 0.5", "DEMA")


def _first_seeds(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The runs of the first seed, from the lowest rate up."""
    chosen = [outcome for outcome in outcomes if outcome.cell.seed == 0]
    return sorted(chosen, key=lambda each: (each.cell.learning_rate, each.cell.batch, each.cell.minimum))


def frequency_panels(
    setting: Setting, runs: Mapping[str, Against], names: Sequence[str] = _COMPARED, *, unit: str = "token"
) -> list[Panel]:
    """Loss less that of the last checkpoint against the interval, a panel for each run, with one standard error.

    Args:
        setting: of the study, for its intervals.
        runs: by title: how much an average is above another at an interval.
        names: of the averages.
        unit: what a loss is counted by.
    """
    intervals = setting.frequencies
    panels = []
    for title, against in runs.items():
        curves = [Curve(name=LAST, x=intervals, y=[0.0 for _ in intervals], dashed=True)]
        for name in names:
            found = [against(name, LAST, every) for every in intervals]
            errors = [each.error for each in found]
            curves.append(Curve(name=name, x=intervals, y=[each.mean for each in found], error=errors))
        panels.append(
            Panel(
                title=title,
                x_label="steps between updates",
                y_label=f"loss − last, nats per {unit}",
                y_scale="linear",
                x_scale="log",
                ticks={every: str(every) for every in intervals},
                curves=curves,
            )
        )
    return panels


def power_panels(setting: Setting, outcomes: Sequence[Outcome]) -> list[Panel]:
    """All runs at all intervals against ℓ(T): the best power of EMA, its gain, and PEMA against it."""

    def points(value: Callable[[Outcome, int], float], intervals: Sequence[int]) -> list[Curve]:
        return [
            Curve(
                name=f"every {every}",
                x=[outcome.paths[every]["path_length"][-1] for outcome in outcomes],
                y=[value(outcome, every) for outcome in outcomes],
                dots=True,
            )
            for every in intervals
        ]

    def less(one: str, other: str) -> Callable[[Outcome, int], float]:
        return lambda outcome, every: difference(outcome, one, other, every).mean

    every, shortest = setting.frequencies, setting.frequencies[:1]
    panels = (
        ("best power of EMA", "γ", points(lambda outcome, every: float(best(outcome, every).split()[1]), every)),
        ("best EMA − last", "nats per token", points(less(BEST_EMA, LAST), every)),
        ("PEMA 0.15 − best EMA", "nats per token", points(less("PEMA 0.15", BEST_EMA), every)),
        ("PEMA 0.15, by tensor − global", "nats per token", points(less(PER_TENSOR, "PEMA 0.15"), shortest)),
    )
    return [
        Panel(title=title, x_label="ℓ(T)", y_label=y_label, x_scale="log", y_scale="linear", curves=curves)
        for title, y_label, curves in panels
    ]


def path_panels(setting: Setting, outcomes: Sequence[Outcome]) -> list[Panel]:
    """ℓ(t), β(t), and the spread of ℓ over tensors, for the runs of the first seed at the shortest interval."""
    chosen = [(outcome.cell.name, outcome.paths[setting.frequencies[0]]) for outcome in _first_seeds(outcomes)]
    panels = []
    for title, key, y_label in (
        ("path", "path_length", "ℓ(t)"),
        ("weight of an update", "PEMA 0.15", "β(t)"),
        ("spread of ℓ_p(t) over the tensors", "spread", "standard deviation over mean"),
        ("spread of ℓ_p(t) / ℓ_p(T)", "uneven", "standard deviation over mean"),
    ):
        curves = [Curve(name=name, x=path["step"], y=path[key]) for name, path in chosen]
        if key == "PEMA 0.15":
            path = chosen[0][1]
            curves.append(Curve(name="EMA 0.15, any run", x=path["step"], y=path["EMA 0.15"], dashed=True))
        y_scale = "log" if key == "path_length" else "linear"
        panels.append(Panel(title=title, x_label="step", y_label=y_label, y_scale=y_scale, curves=curves))
    return panels


def draw_all(setting: Setting, outcomes: Sequence[Outcome], directory: Path = RESULTS) -> None:
    """Draw the three figures."""
    runs = {outcome.cell.name: partial(difference, outcome) for outcome in _first_seeds(outcomes)}
    panels = frequency_panels(setting, runs)
    draw("language_model-frequency", panels, columns=min(3, len(panels)), directory=directory)
    draw("language_model-powers", power_panels(setting, outcomes), columns=2, directory=directory)
    draw("language_model-paths", path_panels(setting, outcomes), columns=2, directory=directory)
