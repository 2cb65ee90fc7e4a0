"""The pipeline, on one page: discover → plan → path → schemes → replay → write. Only this module carries it out.

Modules that need torch are imported where they are used: opening a run, or saying what would be done, must not wait
for them.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckavg.averaging.distributed import check_same_plans, check_same_run, finalize, open_writers, stage
from ckavg.averaging.plan import Plan, check_together, fetching_of, fetching_of_path, plan_average
from ckavg.averaging.record import Work, completed, record_of
from ckavg.checkpoints.fingerprints import Fingerprints, check_unchanged, fingerprint_run
from ckavg.checkpoints.run import Run
from ckavg.checkpoints.statistics import averaged_statistics
from ckavg.engine.context import OnProgress
from ckavg.engine.distributed import ALONE, Ranks
from ckavg.errors import SettingError
from ckavg.output.record import Record, Seconds
from ckavg.output.staging import remove_stale
from ckavg.path.cache import remember
from ckavg.path.plan import PathPlan, plan_path
from ckavg.path.table import PathLength, ZeroSigma
from ckavg.remote.fetching import fetch
from ckavg.schemes import Coefficients, Scheme, Timeline
from ckavg.sources import as_users_know
from ckavg.storage.atomic import resolved
from ckavg.version import __version__

if TYPE_CHECKING:
    from ckavg.averaging.replay import Replayed
    from ckavg.engine.context import Context
    from ckavg.output.staging import Staging

ACCUMULATE = ("float32", "float64")


def measure_path(
    run: Run,
    *,
    path_exclude: Sequence[str] = (),
    zero_sigma: ZeroSigma = "exclude",
    sample: float = 1.0,
    allow_nonfinite: bool = False,
    device: str = "auto",
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
) -> PathLength:
    """Measure how far the weights of a run travelled: pass 1 alone (Pathwise EMA, Eq. 2).

    What was measured before of the same files is not measured again: the table is kept in `averaged/path.json` of the
    run's directory or, where that cannot be written, in the user's cache.

    Args:
        run: the checkpoints, the anchor first.
        path_exclude: shell patterns of tensor names that do not count.
        zero_sigma: `exclude` leaves tensors without spread out of the sum and of N; `eps` divides by σ_p + 1e-8.
        sample: estimate it from this fraction of each tensor, in (0, 1]; 1 is exact.
        allow_nonfinite: tensors that hold NaN or infinity do not count, instead of being refused.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_progress: called now and then in this thread.
        ranks: the processes that share the work, each of which calls this; see `all_ranks`.

    Raises:
        NonFiniteError: a checkpoint holds NaN or infinity, and may not.
        ChangedError, TruncatedShardError, ReadError: a file changed or cannot be read.
        SettingError: there is no such device, or `sample` is no fraction.
    """
    from ckavg.engine.context import Context
    from ckavg.engine.devices import resolve_device, tuned

    with ranks.fail_together(), as_users_know(run.remote):
        plan = plan_path(run, exclude=path_exclude, sample=sample)
        nbytes = plan.nbytes // ranks.world if plan.sample == 1 else 0  # an estimate is the CPU's in any case
        own = ranks.own_device(resolve_device(device, nbytes=nbytes))
        context = tuned(Context(device=own, on_progress=on_progress, ranks=ranks, remote=run.remote))
        check_same_run(run, ranks, plan.exclude, zero_sigma, sample, allow_nonfinite)
        fetch(run.remote, fetching_of_path(run, plan), on_progress)
        path = _measure(run, plan, zero_sigma, context, allow_nonfinite=allow_nonfinite)
        if ranks.is_first:
            _check_unchanged(run)
        return path


def average(
    run: Run,
    scheme: Scheme,
    *,
    out: Path | str | None = None,
    dtype: str = "source",
    accumulate: str = "float32",
    device: str = "auto",
    path_exclude: Sequence[str] = (),
    zero_sigma: ZeroSigma = "exclude",
    sample: float = 1.0,
    snapshot_every: int | None = None,
    card: Path | str | None = None,
    allow_nonfinite: bool = False,
    force: bool = False,
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
) -> Record:
    """Average the checkpoints of a run and write the result as a checkpoint that loads as it stands.

    Args:
        run: the checkpoints, the anchor first; see `open_run`.
        scheme: how: `PEMA`, `BEMA`, `EMA`, `MomentumEMA`, `OUEMA`, `DEMA`, `Mean` or `Last`.
        out: where the result goes; None: `<source>/averaged/<label of the scheme>`.
        dtype: output dtype of floating tensors: `source`, `float32`, `bfloat16`, `float16` or `float64`.
        accumulate: `float32` or `float64`; float64 checkpoints are accumulated in float64 in any case.
        device: where the arithmetic happens: `auto`, `cpu`, `cuda` or `cuda:N`.
        path_exclude: shell patterns of tensors that do not count in the path length.
        zero_sigma: what becomes of tensors without spread; see `measure_path`.
        sample: estimate the path length from this fraction of each tensor; see `measure_path`.
        snapshot_every: also write the average as it stood after each checkpoint whose step is a multiple of this, to
            `<out>/checkpoint-<step>`.
        card: a Markdown file whose fields and text come first in the model card of the result.
        allow_nonfinite: average checkpoints that hold NaN or infinity, too; where they do, the result is not finite.
        force: replace an existing result.
        on_progress: called now and then in this thread.
        ranks: the processes that share the work, each of which calls this; see `all_ranks`.

    Returns:
        What was done: coefficients, weights, warnings, and where the result is.

    Raises:
        OutputExistsError: something is at `out` already.
        NonFiniteError: a checkpoint holds NaN or infinity, and may not.
        SettingError: the settings do not fit the run.
        CkavgError: any other reason for which there is no result; the sources and `out` are as they were.
    """
    with ranks.fail_together():
        plan = plan_average(
            run,
            scheme,
            out=out,
            dtype=dtype,
            path_exclude=path_exclude,
            sample=sample,
            snapshot_every=snapshot_every,
            card=card,
            force=force,
        )
        done = carry_out(
            [plan],
            accumulate=accumulate,
            device=device,
            zero_sigma=zero_sigma,
            allow_nonfinite=allow_nonfinite,
            on_progress=on_progress,
            ranks=ranks,
        )
        return done.records[0]


@dataclass(frozen=True, slots=True)
class Done:
    """What was carried out: a record for each plan, in their order, and the path; None where no plan needed it."""

    records: tuple[Record, ...]
    path: PathLength | None


def carry_out(
    plans: Sequence[Plan],
    *,
    accumulate: str = "float32",
    device: str = "auto",
    zero_sigma: ZeroSigma = "exclude",
    allow_nonfinite: bool = False,
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
) -> Done:
    """Do what plans say, all from one reading of the run they share; each result is what it would be by itself.

    Args:
        plans: of one run, with one way to have its path, each to a place of its own; at least one.
        accumulate, device, zero_sigma, allow_nonfinite, on_progress, ranks: as of `average`.

    Raises:
        CkavgError: as of `average`. A result that was complete by then stays.
    """
    from ckavg.averaging.replay import check_constant
    from ckavg.engine.context import Context
    from ckavg.engine.devices import resolve_device, tuned

    begun = time.perf_counter()
    run = plans[0].run
    with ranks.fail_together(), ExitStack() as stack, as_users_know(run.remote):
        if accumulate not in ACCUMULATE:
            raise SettingError(f"accumulate is {accumulate!r}; it must be one of {', '.join(ACCUMULATE)}.")
        check_together(plans)
        nbytes = max(plan.path_bytes for plan in plans) + max(plan.replay_bytes for plan in plans)
        own = ranks.own_device(resolve_device(device, nbytes=nbytes // ranks.world, averages=len(plans)))
        context = tuned(
            Context(device=own, on_progress=on_progress, ranks=ranks, remote=run.remote), averages=len(plans)
        )
        check_same_plans(plans, ranks, accumulate, zero_sigma, allow_nonfinite)
        if ranks.is_first:
            for directory in {resolved(plan.out).parent for plan in plans}:
                remove_stale(directory)
        fetch(run.remote, fetching_of(plans), on_progress)
        stagings = stage(plans, ranks, stack)
        compared = check_constant(run, context)
        measuring = time.perf_counter()
        planned = next((plan.path for plan in plans if plan.path), None)
        fingerprints = planned.recalled.fingerprints if planned else fingerprint_run(run)
        path = _measure(run, planned, zero_sigma, context, allow_nonfinite=allow_nonfinite) if planned else None
        replaying = time.perf_counter()
        timeline = _timeline(run, path)
        statistics = averaged_statistics(run.tensors)
        coefficients = [plan.scheme.coefficients(timeline).sparing(statistics) for plan in plans]
        replayed, digests = _replay(
            plans, coefficients, stagings, accumulate, fingerprints, context, allow_nonfinite=allow_nonfinite
        )
        if ranks.is_first:
            _check_unchanged(run)
        done = time.perf_counter()
        work = Work(
            accumulate=_accumulated(run, accumulate),
            zero_sigma=zero_sigma,
            bytes_read=compared + replayed.bytes_read + (path.bytes_read if path else 0),
            checksums=replayed.checksums,
            infinite=replayed.infinite,
            allow_nonfinite=allow_nonfinite,
            seconds=Seconds(replaying - measuring if path and path.bytes_read else 0.0, done - replaying, done - begun),
        )

        def finish() -> tuple[Record, ...]:
            records = []
            for place, (plan, each, staging) in enumerate(zip(plans, coefficients, stagings, strict=True)):
                record = record_of(plan, each, path, work, nonfinite=replayed.nonfinite[place])
                record, files = completed(plan, each, record, digests[place])
                for name, data in files.items():
                    staging.write(name, data)
                records.append(record)
            for staging in stagings:
                staging.commit()
            return tuple(records)

        records = ranks.first(finish)
        if run.remote is not None:
            run.remote.release()
    return Done(records, path)


def _check_unchanged(run: Run) -> None:
    check_unchanged(run.checkpoints)
    if run.remote is not None:
        run.remote.check_unchanged()


def _replay(
    plans: Sequence[Plan],
    coefficients: Sequence[Coefficients],
    stagings: Sequence[Staging],
    accumulate: str,
    fingerprints: Fingerprints,
    context: Context,
    *,
    allow_nonfinite: bool,
) -> tuple[Replayed, list[dict[Path, str]]]:
    """Pass 2, and the SHA-256 of every weight file that came of it, by plan and by path in the result."""
    from ckavg.averaging.replay import Average, replay

    run, ranks = plans[0].run, context.ranks
    layouts = [[(shard.name, shard.header) for shard in plan.weights.shards] for plan in plans]
    places = [[str(out) for out in plan.outputs.values()] for plan in plans]
    what = (
        __version__,
        fingerprints,
        coefficients,
        layouts,
        places,
        accumulate,
        allow_nonfinite,
        context.device.partition(":")[0],
    )
    key = hashlib.sha256(repr(what).encode()).hexdigest() if None not in fingerprints else secrets.token_hex(32)
    with open_writers(plans, stagings, key, ranks) as (writers, journal):
        averages = [
            Average(each, plan.weights.dtypes, of_plan)
            for each, plan, of_plan in zip(coefficients, plans, writers, strict=True)
        ]
        wide = accumulate == "float64"
        replayed = replay(run, averages, wide=wide, allow_nonfinite=allow_nonfinite, context=context, journal=journal)
        digests = finalize(plans, stagings, writers, ranks)
    ranks.wait()
    return replayed, digests


def _measure(run: Run, plan: PathPlan, zero_sigma: ZeroSigma, context: Context, *, allow_nonfinite: bool) -> PathLength:
    from ckavg.path.estimate import estimate
    from ckavg.path.journal import PathJournal
    from ckavg.path.measure import measure

    plan = context.ranks.first(lambda: plan)  # what is known depends on file times, which machines may see differently
    if plan.sample < 1:
        return estimate(
            run,
            plan.sample,
            exclude=plan.exclude,
            zero_sigma=zero_sigma,
            allow_nonfinite=allow_nonfinite,
            context=context,
        )
    with PathJournal(run, plan.recalled.fingerprints, context.ranks) as path_journal:
        path = measure(
            run,
            exclude=plan.exclude,
            zero_sigma=zero_sigma,
            known=plan.recalled.known,
            allow_nonfinite=allow_nonfinite,
            context=context,
            path_journal=path_journal,
        )
    if context.ranks.is_first:
        if path.bytes_read:
            remember(run, path, plan.recalled.fingerprints)
        path_journal.clear()
    return path


def _timeline(run: Run, path: PathLength | None) -> Timeline:
    if path is None:
        return Timeline(run.steps, anchor_is_init=run.anchor_is_init)
    own = {name: path.tensor_lengths(name) for name in path.counted}
    return Timeline(run.steps, path.lengths, own, run.anchor_is_init)


def _accumulated(run: Run, asked: str) -> str:
    """The dtype in which tensors are accumulated: never less than that of the checkpoints."""
    return "float64" if any("float64" in checkpoint.dtypes for checkpoint in run.checkpoints) else asked
