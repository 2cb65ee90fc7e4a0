"""What comes before pass 2: constant tensors are compared, the path is measured, and the schemes give coefficients.

Modules that need torch are imported where they are used.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

from ckavg.averaging.distributed import CONSTANT, agreed_fingerprints
from ckavg.averaging.plan import Options, Plan, anchor_problem
from ckavg.averaging.reading import Reading
from ckavg.checkpoints.fingerprints import Fingerprints
from ckavg.checkpoints.run import Run, averaged_statistics
from ckavg.engine.context import Context
from ckavg.engine.distributed import PassJournal
from ckavg.errors import MissingPartsError, raise_all
from ckavg.output.record import Seconds
from ckavg.path.cache import save_path
from ckavg.path.plan import PathPlan, PathReading
from ckavg.path.table import PathLength, TensorLengths
from ckavg.schemes import Coefficients, Timeline


@dataclass(frozen=True, slots=True)
class Prepared:
    """Averages before pass 2.

    Attributes:
        asked: the averages as planned.
        reading: the same, with the ranks of averaged products filled in.
        fingerprints: of all checkpoints, the same in all processes.
        compared: bytes read to compare constant tensors.
        paths, coefficients: one for each average.
        times: when pass 1 and pass 2 began.
    """

    asked: tuple[Plan, ...]
    reading: Reading
    fingerprints: Fingerprints
    compared: int
    paths: tuple[PathLength | None, ...]
    coefficients: tuple[Coefficients, ...]
    times: tuple[float, float]

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of the averages."""
        return self.reading.plans

    @property
    def path_bytes(self) -> int:
        """Bytes that pass 1 read."""
        return max(path.bytes_read if path else 0 for path in self.paths)

    def seconds(self, begun: float) -> Seconds:
        """The seconds of pass 1, of pass 2 until now, and in all since `begun`."""
        (measuring, replaying), done = self.times, time.perf_counter()
        return Seconds(replaying - measuring if self.path_bytes else 0.0, done - replaying, done - begun)


def prepare(reading: Reading, context: Context) -> Prepared:
    """Do what comes before pass 2: compare constant tensors, measure the path, compute the coefficients.

    Raises:
        CkavgError: see `average`.
    """
    from ckavg.averaging.copying import check_constant

    plans, run, ranks = reading.plans, reading.run, context.ranks
    fingerprints = agreed_fingerprints(run, ranks)
    journal: PassJournal[None] | None = None
    if ranks.is_shared:
        journal = ranks.journal(CONSTANT, hashlib.sha256(repr((fingerprints, reading.places)).encode()).hexdigest())
    compared = 0
    # A part may go on before the others have compared theirs; joining may not.
    with nullcontext() if ranks.mode == "join" else suppress(MissingPartsError):
        compared = check_constant(run, {*reading.places}, context, journal)
    measuring = time.perf_counter()
    paths = _measure_all(reading, fingerprints, context)
    replaying = time.perf_counter()
    coefficients = tuple(coefficients_with(*each) for each in zip(plans, paths, strict=True))
    raise_all([problem for each in zip(plans, coefficients, strict=True) if (problem := anchor_problem(*each))])
    plans = tuple(_with_terms(plan, each) for plan, each in zip(plans, coefficients, strict=True))
    times = measuring, replaying
    with_terms = replace(reading, plans=plans)
    return Prepared(reading.plans, with_terms, fingerprints, compared, paths, coefficients, times)


def _with_terms(plan: Plan, coefficients: Coefficients) -> Plan:
    """The plan with the ranks of averaged products: they depend on how many weights are not 0."""
    if plan.products is None:
        return plan
    from ckavg.averaging.products import count_terms, weights_of

    terms = {index: count_terms(weights_of(plan.products, coefficients, index)) for index in plan.outputs}
    return plan.with_terms(terms)


def coefficients_with(plan: Plan, path: PathLength | None) -> Coefficients:
    """β and α of a planned average, from the path of its checkpoints."""
    timeline = _timeline(plan.run, path)
    return plan.scheme.checked_coefficients(timeline).sparing(averaged_statistics(plan.run.tensors))


def _timeline(run: Run, path: PathLength | None) -> Timeline:
    if path is None:
        return Timeline(run.steps, anchor_is_init=run.anchor_is_init)
    return Timeline(run.steps, path.lengths, TensorLengths(path), run.anchor_is_init)


def _measure_all(reading: Reading, fingerprints: Fingerprints, context: Context) -> tuple[PathLength | None, ...]:
    """Pass 1: the path of each plan that needs one."""
    paths = reading.paths
    if paths is None:
        return (None,) * len(reading.plans)
    own = {places: plan.run for plan, places in zip(reading.plans, reading.places, strict=True)}
    runs = [own[places] for places in paths.places]
    measured = measure_path(reading.run, runs, paths, fingerprints, reading.plans[0].options, context)
    by_places = dict(zip(paths.places, measured, strict=True))
    return tuple(
        by_places[places] if plan.path else None for plan, places in zip(reading.plans, reading.places, strict=True)
    )


def measure_path(
    run: Run, runs: Sequence[Run], reading: PathReading, fingerprints: Fingerprints, options: Options, context: Context
) -> tuple[PathLength, ...]:
    """Pass 1: take each path from the cache, measure it or estimate it, as planned.

    Args:
        run: all checkpoints.
        runs: for each path, the checkpoints that it visits.
        reading: what to measure.
        fingerprints: of all checkpoints.
        options, context: those of the command.
    """
    from ckavg.path.estimate import estimate_paths
    from ckavg.path.journal import PathJournal
    from ckavg.path.measure import measure_paths

    ranks, zero_sigma, allow_nonfinite = context.ranks, options.zero_sigma, options.allow_nonfinite
    plans = reading.plans
    if ranks.is_shared:  # machines may see different file times, and so find different paths in the cache
        agreed = ranks.agreed("paths", lambda: [plan.to_json() for plan in reading.plans])
        plans = tuple(map(PathPlan.from_json, agreed))
    exact = [number for number, plan in enumerate(plans) if plan.sample == 1]
    sampled = [number for number, plan in enumerate(plans) if plan.sample < 1]
    paths: dict[int, PathLength] = {}

    def of(numbers: Sequence[int]) -> PathReading:
        return PathReading(
            tuple(plans[number] for number in numbers), tuple(reading.places[number] for number in numbers)
        )

    if sampled:
        estimated = estimate_paths(
            run, of(sampled), zero_sigma=zero_sigma, allow_nonfinite=allow_nonfinite, context=context, key=fingerprints
        )
        paths |= zip(sampled, estimated, strict=True)
    if exact:
        with PathJournal(run, fingerprints, ranks) as journal:
            measured = measure_paths(
                run,
                of(exact),
                zero_sigma=zero_sigma,
                allow_nonfinite=allow_nonfinite,
                context=context,
                path_journal=journal,
            )
        paths |= zip(exact, measured, strict=True)
        if ranks.is_first:
            for number in exact:
                if paths[number].bytes_read:
                    save_path(runs[number], paths[number], plans[number].cached.fingerprints)
            journal.clear()
    return tuple(paths[number] for number in range(len(plans)))
