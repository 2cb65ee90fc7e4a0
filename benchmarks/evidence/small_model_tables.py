"""Tables of the small-model study: means over the seeds of each cell, and in how many cells which average is ahead."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.evidence.figures import Curve, Panel, draw
from benchmarks.evidence.language_model_figures import frequency_panels, path_panels
from benchmarks.evidence.language_model_run import BASE, LAST, PER_TENSOR, Cell, Outcome, Setting
from benchmarks.evidence.language_model_tables import (
    BEST_EMA,
    EMA_POWERS,
    PAIRS,
    PEMA_POWERS,
    by_setting,
    paths_of,
)
from benchmarks.evidence.tables import RESULTS, Difference, Table
from benchmarks.evidence.tables import Cell as TableCell

_SHOWN = ("PEMA 0.15", *EMA_POWERS)
_TICKS = {place: f"{place:g}" for place in (0.1, 0.2, 0.5, 1, 2, 5)}
_PATHS = 7
"""Runs whose path is drawn: there are eight colours, and one is EMA's."""

Group = Sequence[Outcome]
"""Runs that differ by their seed alone."""


def loss_of(group: Group, name: str, every: int) -> list[float]:
    """Of each seed; the best EMA is the one power that is best in the mean over the seeds."""
    if name == BEST_EMA:
        name = best_of(group, every)
    return [outcome.loss(name, 0 if name in (BASE, LAST) else every) for outcome in group]


def best_of(group: Group, every: int, names: Sequence[str] = EMA_POWERS) -> str:
    """The name with the least mean loss over the seeds."""
    return min(names, key=lambda name: statistics.fmean(loss_of(group, name, every)))


def difference(group: Group, one: str, other: str, every: int) -> Difference:
    """Mean over the seeds of one loss less the other, with its standard error."""
    pairs = zip(loss_of(group, one, every), loss_of(group, other, every), strict=True)
    return Difference.of([first - second for first, second in pairs])


def losses_of(outcomes: Sequence[Outcome]) -> Table:
    """All losses."""
    rows = [
        (outcome.cell.name, every or "", name, statistics.fmean(losses))
        for outcome in outcomes
        for (every, name), losses in outcome.losses.items()
    ]
    return Table("small_model-losses", ("run", "every", "average", "loss"), tuple(rows))


def cells_of(setting: Setting, groups: Mapping[Cell, Group]) -> Table:
    """For each cell and interval: the path, the best powers, and the differences that the claims are about."""
    compared = (("PEMA 0.15", BEST_EMA), (BEST_EMA, LAST), ("BEMA 0.2, 0.5", LAST), ("BEMA 0.2, 0.5", BEST_EMA))
    columns = ("run", "every", "ℓ(T)", "T ℓ(T)²", "β(T) of PEMA 0.15", "best EMA", "best PEMA",
               *(f"{one} − {other}" for one, other in compared))  # fmt: skip
    rows: list[tuple[TableCell, ...]] = []
    for cell, group in groups.items():
        for every in setting.frequencies:
            length, beta = (mean_at_end(group, every, key) for key in ("path_length", "PEMA 0.15"))
            powers = (best_of(group, every, names).split()[1] for names in (EMA_POWERS, PEMA_POWERS))
            found = (difference(group, *pair, every).marked for pair in compared)
            rows.append((cell.name, every, length, setting.steps * length**2, beta, *powers, *found))
    return Table("small_model-cells", columns, tuple(rows))


def mean_at_end(group: Group, every: int, key: str) -> float:
    """Statistics of the path at the last step; see `path_of`."""
    return statistics.fmean(outcome.paths[every][key][-1] for outcome in group)


def runs_of(setting: Setting, groups: Mapping[Cell, Group]) -> Table:
    """Each cell: its loss, its path at each interval, and the spread over its tensors."""
    shortest = setting.frequencies[0]
    columns = ("run", "last", "− base", *(f"ℓ(T), every {every}" for every in setting.frequencies),
               "spread of ℓ_p(T), %", "spread of ℓ_p(t)/ℓ_p(T) at most, %")  # fmt: skip
    rows: list[tuple[TableCell, ...]] = []
    for cell, group in groups.items():
        lengths = (mean_at_end(group, every, "path_length") for every in setting.frequencies)
        uneven = statistics.fmean(max(outcome.paths[shortest]["uneven"]) for outcome in group)
        spreads = (100 * mean_at_end(group, shortest, "spread"), 100 * uneven)
        last = statistics.fmean(loss_of(group, LAST, 0))
        rows.append((cell.name, last, str(difference(group, LAST, BASE, 0)), *lengths, *spreads))
    return Table("small_model-runs", columns, tuple(rows))


def pairs_of(setting: Setting, groups: Mapping[Cell, Group]) -> Table:
    """In how many cells one average is below another, by its seeds; the least and the greatest mean difference."""
    columns = ("first − second", "every", "lower in", "higher in", "undecided in", "least", "greatest")
    rows: list[tuple[TableCell, ...]] = []
    for one, other in PAIRS:
        for every in setting.frequencies:
            if PER_TENSOR in (one, other) and every != setting.frequencies[0]:
                continue
            found = [difference(group, one, other, every) for group in groups.values()]
            counts = [sum(each.verdict == verdict for each in found) for verdict in ("lower", "higher", "undecided")]
            means = [each.mean for each in found]
            rows.append((f"{one} − {other}", every, *counts, f"{min(means):+.2g}", f"{max(means):+.2g}"))
    return Table("small_model-pairs", columns, tuple(rows))


def shortfalls_of(setting: Setting, groups: Mapping[Cell, Group]) -> Table:
    """How far each average is behind the best EMA of its cell: the mean over the cells, and the worst."""
    names = (LAST, *(name for every, name in groups[next(iter(groups))][0].losses if every == setting.frequencies[-1]))
    columns = ("average", *(f"{what}, every {every}" for every in setting.frequencies for what in ("mean", "most")))
    rows: list[tuple[TableCell, ...]] = []
    for name in names:
        behind = [
            [difference(group, name, BEST_EMA, every).mean for group in groups.values()]
            for every in setting.frequencies
        ]
        rows.append((name, *(each for of_cells in behind for each in (statistics.fmean(of_cells), max(of_cells)))))
    return Table("small_model-shortfalls", columns, tuple(rows))


def averages_of(setting: Setting, groups: Mapping[Cell, Group], every: int) -> Table:
    """Loss of each average less that of the last checkpoint, a column for each cell."""
    some = next(iter(groups.values()))[0]
    names = [name for interval, name in some.losses if interval == every]
    rows = tuple((name, *(difference(group, name, LAST, every).marked for group in groups.values())) for name in names)
    return Table(f"small_model-every-{every}", ("average", *(cell.name for cell in groups)), rows)


def tables_of(setting: Setting, outcomes: Sequence[Outcome]) -> list[Table]:
    """All tables; the first two hold what was measured, of the path for the first seed."""
    groups = by_setting(outcomes)
    first = [group[0] for group in groups.values()]
    return [
        losses_of(outcomes),
        dataclasses.replace(paths_of(first), name="small_model-paths"),
        runs_of(setting, groups),
        cells_of(setting, groups),
        shortfalls_of(setting, groups),
        pairs_of(setting, groups),
        *(averages_of(setting, groups, every) for every in setting.frequencies),
    ]


def power_panels(setting: Setting, groups: Mapping[Cell, Group]) -> list[Panel]:
    """Each power of EMA and PEMA less the best EMA, against ℓ(T): a panel for each interval."""
    panels = []
    for every in setting.frequencies:
        ordered = sorted(groups.values(), key=lambda group: mean_at_end(group, every, "path_length"))
        lengths = [mean_at_end(group, every, "path_length") for group in ordered]
        curves = []
        for name in (*EMA_POWERS, "PEMA 0.15"):
            found = [difference(group, name, BEST_EMA, every) for group in ordered]
            curves.append(Curve(name=name, x=lengths, y=[each.mean for each in found], dots=True))
        panels.append(
            Panel(
                title=f"every {every}",
                x_label="ℓ(T)",
                y_label="loss − best EMA, nats per byte",
                x_scale="log",
                y_scale="linear",
                ticks={place: tick for place, tick in _TICKS.items() if lengths[0] < place < lengths[-1]},
                curves=curves,
            )
        )
    return panels


def draw_all(setting: Setting, outcomes: Sequence[Outcome], directory: Path = RESULTS) -> None:
    """Draw the three figures."""
    groups = by_setting(outcomes)
    first = [group[0] for group in groups.values()]
    runs = {cell.name: partial(difference, group) for cell, group in groups.items()}
    frequency = frequency_panels(setting, runs, _SHOWN, unit="byte")
    draw("small_model-frequency", frequency, columns=min(5, len(groups)), directory=directory)
    draw("small_model-powers", power_panels(setting, groups), columns=3, directory=directory)
    drawn = sorted(first, key=lambda outcome: outcome.cell.minimum, reverse=True)[:_PATHS]
    draw("small_model-paths", path_panels(setting, drawn), columns=4, directory=directory)
