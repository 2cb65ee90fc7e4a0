"""Simulates the noisy quadratic: saves runs, averages them with ckavg, and compares them with theory.

The rows of one tensor are independent replicas of the run, its columns the eigenvectors of the Hessian. So ckavg
averages all replicas at once, and the spread over the rows gives the standard errors.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.evidence.ornstein_uhlenbeck import (
    Process,
    expected_of_flat,
    expected_of_last,
    expected_of_likeliest,
    expected_of_weights,
    likeliest,
)
from benchmarks.evidence.saved import Array, average_all, curve_of, open_saved, save_run
from ckavg import BEMA, DEMA, EMA, OUEMA, Mean
from ckavg.averaging.rules import effective_weights
from ckavg.schemes import Scheme, Timeline

SCHEMES: Mapping[str, Scheme] = {
    "last": EMA(gamma=0.0),
    "flat": Mean(),
    "EMA": EMA(gamma=0.5, tau=10.0),  # β = (10 + t)^(−1/2): BEMA's own average, without its correction
    "OUEMA": OUEMA(),
    "DEMA": DEMA(),
    "BEMA": BEMA(),
}
LIKELIEST = "likeliest"
ESTIMATORS = (*SCHEMES, LIKELIEST)

STARTS = {"far": 10.0, "at the optimum": 0.0}
"""θ_0 − μ* in every direction."""

Weights = Mapping[str, Mapping[int, Array]]
"""The weights of θ_0, …, θ_step by scheme and step; 0 for skipped steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The size of the simulation.

    Attributes:
        conditions: condition numbers of the Hessian.
        directions: number of eigenvalues, evenly spaced on a logarithmic scale from 1 down to 1 / condition number.
        steps: optimizer steps, each of which is saved.
        intervals: steps between the checkpoints that are averaged, and between two points of the curve that results.
        replicas: independent runs.
        seed: of the first case; the others have the next ones.
    """

    conditions: tuple[int, ...] = (1, 10, 100, 1000)
    directions: int = 10
    steps: int = 2000
    intervals: tuple[tuple[int, int], ...] = ((1, 50), (100, 100))
    replicas: int = 400
    seed: int = 2026


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The measurements of one process, averaged from checkpoints at one interval.

    Attributes:
        condition: condition number of the Hessian.
        start: name of where it starts.
        every: optimizer steps between checkpoints.
        process: the process.
        distances: ‖θ̂ − μ*‖² of each replica, by estimator and step.
        expected: its expectation by estimator and step, exact for the saved run.
    """

    condition: int
    start: str
    every: int
    process: Process
    distances: Mapping[str, Mapping[int, Array]]
    expected: Mapping[str, Mapping[int, float]]

    @property
    def measured(self) -> tuple[int, ...]:
        """The steps at which the estimates were measured."""
        return tuple(self.distances[LIKELIEST])

    def mean(self, name: str, step: int) -> float:
        return float(np.mean(self.distances[name][step]))

    def error(self, name: str, step: int) -> float:
        return standard_error(self.distances[name][step])

    def z(self, name: str, step: int) -> float:
        """Measured minus expected, in standard errors."""
        return (self.mean(name, step) - self.expected[name][step]) / self.error(name, step)

    def lead(self, one: str, other: str, step: int) -> float:
        """By how many standard errors `one` is nearer to the optimum than `other`, replica by replica."""
        nearer = self.distances[other][step] - self.distances[one][step]
        return float(np.mean(nearer)) / standard_error(nearer)


def standard_error(values: Array) -> float:
    """Of the mean of independent values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def process_of(condition: int, distance: float, directions: int) -> Process:
    """The process whose eigenvalues reach from 1 down to 1 / `condition`."""
    curvatures = tuple(np.geomspace(1.0, 1.0 / condition, directions).tolist())
    return Process(curvatures=curvatures, distance=distance)


def weights_at(scheme: Scheme, step: int, every: int) -> Array:
    """The weights that ckavg gives to θ_0, …, θ_step where every so many of them is visited."""
    visited = range(0, step + 1, every)
    weights = np.zeros(step + 1)
    weights[:: visited.step] = effective_weights(scheme.coefficients(Timeline(tuple(visited), anchor_is_init=True)))
    return weights


def weights_of_all(setting: Setting) -> dict[int, Weights]:
    """The weights of every scheme at every point of its curve, by interval: the same for all cases."""
    return {
        every: {
            name: {step: weights_at(scheme, step, every) for step in range(points, setting.steps + 1, points)}
            for name, scheme in SCHEMES.items()
        }
        for every, points in setting.intervals
    }


def study(condition: int, start: str, setting: Setting, seed: int, weights: Mapping[int, Weights]) -> list[Case]:
    """Save a run of all replicas, average it by every scheme at every interval, and measure.

    Args:
        condition: condition number of the Hessian.
        start: a name in `STARTS`.
        setting: the size of the simulation.
        seed: of this run.
        weights: from `weights_of_all`.

    Returns:
        A case for each interval, all of the same saved run.
    """
    process = process_of(condition, STARTS[start], setting.directions)
    cases = []
    with tempfile.TemporaryDirectory(prefix="ckavg-evidence-") as scratch:
        states = process.states(setting.steps, replicas=setting.replicas, seed=seed)
        first = next(states)
        save_run(Path(scratch), itertools.chain([first], states))
        for every, points in setting.intervals:
            run, out = open_saved(Path(scratch), every=every), Path(scratch) / f"every-{every}"
            records = average_all(run, SCHEMES, out, snapshot_every=points)
            estimates = {name: curve_of(record) for name, record in records.items()}
            estimates[LIKELIEST] = {
                step: likeliest(process, first, mean, estimates["last"][step], step, every)
                for step, mean in estimates["flat"].items()
            }
            distances = {
                name: {step: process.squared_distances(estimate) for step, estimate in by_step.items()}
                for name, by_step in estimates.items()
            }
            expected = expected_of_all(process, weights[every], every)
            cases.append(
                Case(
                    condition=condition,
                    start=start,
                    every=every,
                    process=process,
                    distances=distances,
                    expected=expected,
                )
            )
    return cases


def expected_of_all(process: Process, weights: Weights, every: int) -> dict[str, dict[int, float]]:
    """The expectation of each estimator: closed forms independent of ckavg, where they exist."""
    expected = {
        name: {step: expected_of_weights(process, of_step) for step, of_step in by_step.items()}
        for name, by_step in weights.items()
    }
    steps = tuple(weights["last"])
    expected["last"] = {step: expected_of_last(process, step) for step in steps}
    expected["flat"] = {step: expected_of_flat(process, step, every) for step in steps}
    expected[LIKELIEST] = {step: expected_of_likeliest(process, step, every) for step in steps}
    return expected
