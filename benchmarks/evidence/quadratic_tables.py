"""Tables and panels of the noisy quadratic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from benchmarks.evidence.figures import Curve, Panel
from benchmarks.evidence.ornstein_uhlenbeck import (
    expected_of_flat_in_continuous_time,
    expected_of_last,
    expected_of_likeliest_in_continuous_time,
    expected_of_weights,
)
from benchmarks.evidence.quadratic_cases import ESTIMATORS, LIKELIEST, SCHEMES, Case, weights_at
from benchmarks.evidence.tables import Cell, Table, with_error
from ckavg import BEMA

DECIDED = 3.0
"""Standard errors from which on a difference counts."""

PAIRS = (
    *(("BEMA", other) for other in ("EMA", "last", "flat", "OUEMA", "DEMA")),
    *((other, "EMA") for other in ("OUEMA", "DEMA")),
    *((other, "last") for other in ("EMA", "OUEMA", "DEMA")),
)
KAPPAS, ETAS = (0.2, 0.5, 1.0), (0.2, 0.4, 0.6, 1.0, math.inf)
CONTINUOUS = {
    "last": expected_of_last,
    "flat": expected_of_flat_in_continuous_time,
    LIKELIEST: expected_of_likeliest_in_continuous_time,
}


def tables_of(cases: Sequence[Case]) -> Iterator[Table]:
    """All tables: the measurements, and what the document says about them."""
    yield curves_of(cases)
    yield _agreement(cases)
    yield _theory([case for case in cases if case.every == 1])
    yield _anchor(cases)
    for every, group in _by_interval(cases):
        yield _final(every, group)
        yield _along(every, group)
        yield _ratios(every, group)
        yield _powers(every, [case for case in group if case.start == "far"])


def _by_interval(cases: Sequence[Case]) -> Iterator[tuple[int, list[Case]]]:
    for every in dict.fromkeys(case.every for case in cases):
        yield every, [case for case in cases if case.every == every]


def curves_of(cases: Sequence[Case]) -> Table:
    """Every point of every curve; the band of a figure is one standard error on either side of the mean."""
    rows: list[tuple[Cell, ...]] = [
        (case.condition, case.start, case.every, name, step, case.mean(name, step), case.error(name, step),
         case.expected[name][step], case.z(name, step))
        for case in cases for name in ESTIMATORS for step in case.measured
    ]  # fmt: skip
    columns = ("condition", "start", "every", "estimator", "step", "mean", "standard error", "expected", "z")
    return Table("quadratic-curves", columns, tuple(rows))


def _agreement(cases: Sequence[Case]) -> Table:
    """How many means are how far from their expectation."""
    rows = []
    for name in ESTIMATORS:
        z = [abs(case.z(name, step)) for case in cases for step in case.measured]
        at_end = [abs(case.z(name, case.measured[-1])) for case in cases]
        rows.append((name, max(at_end), len(z), max(z), sum(each > DECIDED for each in z)))
    columns = ("estimator", "furthest z at the end", "points in all", "furthest z of all", "points beyond 3")
    return Table("quadratic-agreement", columns, tuple(rows))


def _theory(cases: Sequence[Case]) -> Table:
    """At the end, the three estimators with closed forms: sampled, exact for the saved run, and in continuous time."""
    rows = []
    for case, name in itertools.product(cases, CONTINUOUS):
        end = case.measured[-1]
        sampled = with_error(case.mean(name, end), case.error(name, end))
        z, continuous = f"{case.z(name, end):+.2f}", CONTINUOUS[name](case.process, end)
        rows.append((f"{case.start}, {case.condition}", name, sampled, case.expected[name][end], z, continuous))
    columns = ("start, condition", "estimator", "sampled", "closed form", "z", "in continuous time")
    return Table("quadratic-theory", columns, tuple(rows))


def _final(every: int, cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        end = case.measured[-1]
        cells = (with_error(case.mean(name, end), case.error(name, end)) for name in ESTIMATORS)
        rows.append((f"{case.start}, {case.condition}", *cells))
    return Table(f"quadratic-final-{every}", ("start, condition", *ESTIMATORS), tuple(rows))


def _along(every: int, cases: Sequence[Case]) -> Table:
    """At how many points of the curve one is ahead of another, and at how many behind, by three standard errors."""
    rows = []
    for one, other in PAIRS:
        leads = [[case.lead(one, other, step) for step in case.measured] for case in cases]
        counts = [(sum(each > DECIDED for each in of), sum(each < -DECIDED for each in of)) for of in leads]
        rows.append((f"{one} against {other}", *(f"{ahead} / {behind}" for ahead, behind in counts)))
    heading = f"ahead / behind at {len(cases[0].measured)} points"
    return Table(f"quadratic-along-{every}", (heading, *_names(cases)), tuple(rows))


def _ratios(every: int, cases: Sequence[Case]) -> Table:
    """The mean squared distance at the end of one over that of another, where their difference is decided."""
    rows = []
    for one, other in PAIRS:
        cells: list[Cell] = []
        for case in cases:
            end = case.measured[-1]
            decided = abs(case.lead(one, other, end)) > DECIDED
            cells.append(f"{case.mean(one, end) / case.mean(other, end):.3g}" if decided else "undecided")
        rows.append((f"{one} / {other}", *cells))
    return Table(f"quadratic-ratios-{every}", ("at the end", *_names(cases)), tuple(rows))


def _powers(every: int, cases: Sequence[Case]) -> Table:
    """BEMA with other powers, exact, so without standard errors."""
    end = cases[0].measured[-1]
    rows: list[tuple[Cell, ...]] = []
    for kappa, eta in itertools.product(KAPPAS, ETAS):
        weights = weights_at(BEMA(kappa=kappa, eta=eta), end, every)
        told = f"κ {kappa:g}, " + ("no correction" if math.isinf(eta) else f"η {eta:g}")
        rows.append((told, *(expected_of_weights(case.process, weights) for case in cases)))
    for name in ("last", LIKELIEST):
        rows.append((name, *(case.expected[name][end] for case in cases)))
    columns = ("BEMA with", *(f"condition {case.condition}" for case in cases))
    return Table(f"quadratic-powers-{every}", columns, tuple(rows))


def _anchor(cases: Sequence[Case]) -> Table:
    """The distance caused by the weight of θ_0 alone, beside the measured one, for runs that have converged."""
    rows: list[tuple[Cell, ...]] = []
    for case in cases:
        if (case.condition, case.start) == (1, "far"):
            end, squared = case.measured[-1], len(case.process.curvatures) * case.process.distance**2
            kept, left = (float(weights_at(SCHEMES[name], end, case.every)[0]) for name in ("EMA", "BEMA"))
            measured = with_error(case.mean("BEMA", end), case.error("BEMA", end))
            rows.append((str(case.every), kept, kept - left, left, left**2 * squared, measured))
    columns = ("interval", "θ_0 in EMA", "α", "θ_0 in BEMA", "its square × ‖θ_0 − μ*‖²", "measured")
    return Table("quadratic-anchor", columns, tuple(rows))


def _names(cases: Sequence[Case]) -> tuple[str, ...]:
    return tuple(f"{case.start}, {case.condition}" for case in cases)


def panels_of(curves: Table, every: int) -> list[Panel]:
    """Squared distance against steps, drawn from the table of the curves: a panel for each case of one interval."""
    lines: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for condition, start, of, estimator, *numbers in curves.rows:
        if str(of) == str(every):
            step, mean, error, *_ = map(float, map(str, numbers))
            panel = lines.setdefault(f"{start}, condition {condition}", {})
            panel.setdefault(str(estimator), []).append((step, mean, error))
    return [
        Panel(
            title=title,
            x_label="optimizer step",
            y_label="squared distance",
            x_scale="log",
            ticks={step: str(step) for step in (100, 200, 500, 1000, 2000)},
            curves=[
                Curve(
                    name=name,
                    x=[step for step, _, _ in points],
                    y=[mean for _, mean, _ in points],
                    error=[error for _, _, error in points],
                    dashed=name not in SCHEMES,
                )
                for name, points in by_name.items()
            ],
        )
        for title, by_name in lines.items()
    ]
