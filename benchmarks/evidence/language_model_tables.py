"""What the language-model study found, as tables: losses, differences with their standard errors, the best powers.

All averages of a run are evaluated on the same windows of text, so differences are taken window by window. Their
standard error covers the choice of the text; the seeds cover the run itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from benchmarks.evidence.language_model_run import BASE, LAST, PER_TENSOR, SCHEMES, Cell, Outcome, Setting, spread
from benchmarks.evidence.tables import Cell as TableCell
from benchmarks.evidence.tables import Difference, Table

EMA_POWERS = tuple(name for name in SCHEMES if name.startswith("EMA 0"))
PEMA_POWERS = tuple(name for name in SCHEMES if name.startswith("PEMA"))
BEST_EMA = "best EMA"
"""Stands for the best of `EMA_POWERS`, which differs between runs."""

PAIRS = (
    ("PEMA 0.15", LAST),
    ("PEMA 0.15", BEST_EMA),
    ("PEMA 0.30", BEST_EMA),
    (PER_TENSOR, "PEMA 0.15"),
    (BEST_EMA, LAST),
    ("EMA κ 0.5", BEST_EMA),
    ("BEMA 0.2, 0.5", LAST),
    ("BEMA 0.2, 0.5", BEST_EMA),
    ("BEMA 0.2, 0.5", "EMA κ 0.5"),
    ("BEMA 0.4, 0.5", "EMA κ 0.5"),
    ("DEMA", LAST),
    ("DEMA", "EMA κ 0.5"),
    ("BEMA 0.2, 0.5", "DEMA"),
    ("OUEMA", "EMA κ 0.5"),
    ("BEMA 0.2, 0.5", "OUEMA"),
    ("mean", BEST_EMA),
)
"""The comparisons: the first average minus the second."""


def best(outcome: Outcome, every: int, names: Sequence[str] = EMA_POWERS) -> str:
    """The name with the least loss at an interval."""
    return min(names, key=lambda name: outcome.loss(name, every))


def windows_of(outcome: Outcome, name: str, every: int) -> list[float]:
    """Loss of each window; the base, the last checkpoint and the best EMA have one at every interval."""
    if name == BEST_EMA:
        name = best(outcome, every)
    return outcome.losses[0 if name in (BASE, LAST) else every, name]


def difference(outcome: Outcome, one: str, other: str, every: int) -> Difference:
    """Of two averages of one run at one interval, window by window."""
    pairs = zip(windows_of(outcome, one, every), windows_of(outcome, other, every), strict=True)
    return Difference.of([first - second for first, second in pairs])


def by_setting(outcomes: Sequence[Outcome]) -> dict[Cell, list[Outcome]]:
    """The runs that differ by their seed alone, by what they have in common."""
    groups: dict[Cell, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(dataclasses.replace(outcome.cell, seed=0), []).append(outcome)
    return groups


def of_one_setting(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The runs that differ by their seed alone, of the setting that has most of them."""
    return max(by_setting(outcomes).values(), key=len)


def losses_of(outcomes: Sequence[Outcome]) -> Table:
    """All losses, window by window."""
    count = len(outcomes[0].losses[0, LAST])
    columns = ("run", "every", "average", "loss", *(f"window {place}" for place in range(1, count + 1)))
    rows = [
        (outcome.cell.name, every or "", name, outcome.loss(name, every), *windows)
        for outcome in outcomes
        for (every, name), windows in outcome.losses.items()
    ]
    return Table("language_model-windows", columns, tuple(rows))


def paths_of(outcomes: Sequence[Outcome]) -> Table:
    """ℓ, β and the spread over the tensors along every run."""
    columns = ("run", "every", *next(iter(outcomes[0].paths.values())))
    rows: list[tuple[TableCell, ...]] = [
        (outcome.cell.name, every, *values)
        for outcome in outcomes
        for every, path in outcome.paths.items()
        for values in zip(*path.values(), strict=True)
    ]
    return Table("language_model-paths", columns, tuple(rows))


def tensors_of(outcomes: Sequence[Outcome]) -> Table:
    """ℓ_p at the end of every run, by tensor, at the shortest interval."""
    names = list(outcomes[0].tensor_paths)
    rows: list[tuple[TableCell, ...]] = [
        (name, *(outcome.tensor_paths[name] for outcome in outcomes)) for name in names
    ]
    return Table("language_model-tensors", ("tensor", *(outcome.cell.name for outcome in outcomes)), tuple(rows))


def runs_of(setting: Setting, outcomes: Sequence[Outcome]) -> Table:
    """Each run: its loss before and after, its path, and the spread over its tensors."""
    shortest = setting.frequencies[0]
    columns = ("run", "last", "− base", *(f"ℓ(T), every {every}" for every in setting.frequencies),
               "spread of ℓ_p(T), %", "of the layers' matrices, %", "of the MLPs', %",
               "spread of ℓ_p(t)/ℓ_p(T) at most, %")  # fmt: skip
    rows: list[tuple[TableCell, ...]] = []
    for outcome in outcomes:
        path = outcome.paths[shortest]
        lengths = (outcome.paths[every]["path_length"][-1] for every in setting.frequencies)
        parts = (spread_at_end(outcome, part) for part in ("", "_proj.", ".mlp."))
        spreads = (*(100 * part for part in parts), 100 * max(path["uneven"]))
        gained = str(difference(outcome, LAST, BASE, 0))
        rows.append((outcome.cell.name, outcome.loss(LAST), gained, *lengths, *spreads))
    return Table("language_model-runs", columns, tuple(rows))


def spread_at_end(outcome: Outcome, part: str) -> float:
    """Standard deviation over mean of ℓ_p(T), over the tensors with `part` in their names."""
    return spread([length for name, length in outcome.tensor_paths.items() if part in name])


def averages_of(outcomes: Sequence[Outcome], every: int) -> Table:
    """Loss of each average less that of the last checkpoint, a column for each run."""
    names = [name for interval, name in outcomes[0].losses if interval == every]
    rows = tuple((name, *(difference(each, name, LAST, every).marked for each in outcomes)) for name in names)
    return Table(f"language_model-every-{every}", ("average", *(each.cell.name for each in outcomes)), rows)


def powers_of(outcomes: Sequence[Outcome]) -> Table:
    """For each run and interval: the path, the best powers, and PEMA's default against the best EMA."""
    columns = ("run", "every", "ℓ(T)", "T ℓ(T)²", "β(T) of PEMA 0.15", "best EMA", "best PEMA",
               "PEMA 0.15 − best EMA", "is", "best EMA − last", "is")  # fmt: skip
    rows: list[tuple[TableCell, ...]] = []
    for outcome in outcomes:
        for every, path in outcome.paths.items():
            length = path["path_length"][-1]
            powers = (best(outcome, every, names).split()[1] for names in (EMA_POWERS, PEMA_POWERS))
            found = (difference(outcome, *pair, every) for pair in (("PEMA 0.15", BEST_EMA), (BEST_EMA, LAST)))
            verdicts = (cell for each in found for cell in (str(each), each.verdict))
            moved = (length, path["step"][-1] * length**2, path["PEMA 0.15"][-1])
            rows.append((outcome.cell.name, every, *moved, *powers, *verdicts))
    return Table("language_model-powers", columns, tuple(rows))


def pairs_of(setting: Setting, outcomes: Sequence[Outcome]) -> Table:
    """In how many runs one average is below another, and the mean difference over the seeds of one setting."""
    seeds = of_one_setting(outcomes)
    columns = ("first − second", "every", "lower in", "higher in", "undecided in", "least", "greatest",
               f"mean of {len(seeds)} seeds", "is")  # fmt: skip
    rows: list[tuple[TableCell, ...]] = []
    for one, other in PAIRS:
        for every in setting.frequencies:
            if PER_TENSOR in (one, other) and every != setting.frequencies[0]:
                continue
            found = [difference(outcome, one, other, every) for outcome in outcomes]
            count = {verdict: sum(each.verdict == verdict for each in found) for verdict in ("lower", "higher")}
            undecided = len(found) - sum(count.values())
            means = [each.mean for each in found]
            reach = (f"{min(means):+.3g}", f"{max(means):+.3g}")
            told = _over_seeds([difference(outcome, one, other, every).mean for outcome in seeds])
            rows.append((f"{one} − {other}", every, *count.values(), undecided, *reach, *told))
    return Table("language_model-pairs", columns, tuple(rows))


def _over_seeds(means: Sequence[float]) -> tuple[str, str]:
    if len(means) < 2:
        return "", ""
    found = Difference.of(means)
    return str(found), found.verdict


def tables_of(setting: Setting, outcomes: Sequence[Outcome]) -> list[Table]:
    """All tables; the first three hold what was measured, the others what follows from it."""
    measured = [losses_of(outcomes), paths_of(outcomes), tensors_of(outcomes)]
    told = [runs_of(setting, outcomes), powers_of(outcomes), pairs_of(setting, outcomes)]
    return [*measured, *told, *(averages_of(outcomes, every) for every in setting.frequencies)]


def seconds_of(outcomes: Sequence[Outcome]) -> Mapping[str, Mapping[str, float]]:
    """How long each run took, in seconds, by its label."""
    return {each.cell.name: {name: round(value) for name, value in each.seconds.items()} for each in outcomes}
