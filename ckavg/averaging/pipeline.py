"""The pipeline, on one page: discover → plan → path → schemes → replay → write. Only this module composes the stages.

Modules that need torch are imported where they are used: opening a run, or saying what would be done, must not wait
for them.
"""

from __future__ import annotations

import hashlib
import platform
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg import __version__
from ckavg.averaging.distributed import check_same_plans, check_same_run, finalize, open_writers, stage
from ckavg.averaging.plan import Options, Plan, anchor_problem, check_compatible, plan_averages
from ckavg.averaging.reading import Reading, fetching_of, fetching_of_path, readings
from ckavg.averaging.recipe import made_of
from ckavg.averaging.record import Work, completed, record_of
from ckavg.checkpoints.fingerprints import check_unchanged, file_fingerprints, fingerprint_run
from ckavg.checkpoints.run import Run, averaged_statistics, holds_float64
from ckavg.engine.context import Context, OnProgress
from ckavg.engine.distributed import ALONE, Ranks
from ckavg.engine.remote import fetch
from ckavg.errors import SettingError, raise_all
from ckavg.output.output_path import LOCAL
from ckavg.output.published import local_of
from ckavg.output.record import Record, Seconds
from ckavg.output.staging import remove_stale
from ckavg.path.cache import save_path
from ckavg.path.plan import PathReading, plan_path
from ckavg.path.table import PathLength, ZeroSigma
from ckavg.schemes import Coefficients, Scheme, Timeline
from ckavg.storage.address import AddressPath
from ckavg.storage.atomic import resolved

if TYPE_CHECKING:
    from ckavg.averaging.replay import Replayed
    from ckavg.output.staging import Staging


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
    from ckavg.engine.devices import tuned

    options = Options(
        path_exclude=tuple(path_exclude), zero_sigma=zero_sigma, sample=sample, allow_nonfinite=allow_nonfinite
    )
    with ranks.fail_together():
        plan = plan_path(run, exclude=options.path_exclude, sample=sample)
        context = tuned(Context(device=device, on_progress=on_progress, ranks=ranks))
        check_same_run(run, ranks, options)
        fetch(fetching_of_path(run, plan), on_progress)
        (path,) = _measure(run, [run], PathReading.single(plan), options, context)
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
    allow_anchor: bool = False,
    force: bool = False,
    lora: str | None = None,
    rank: int | None = None,
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
) -> Record:
    """Average the checkpoints of a run and write the result as a checkpoint that loads as it stands.

    A result that is there already, of the same recipe and of checkpoints that have not changed since, is returned as
    it is, and nothing is read.

    Args:
        run: the checkpoints, the anchor first; see `open_run`.
        scheme: how: `PEMA`, `BEMA`, `EMA`, `MomentumEMA`, `PowerEMA`, `PowerExponentEMA`, `OUEMA`, `DEMA`, `Mean`,
            `Weights` or `Last`.
        out: where the result goes, a directory or an address such as `s3://bucket/result`; None:
            `<source>/averaged/<scheme and selection>`, such as `ema-gamma0.15-last10`.
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
        allow_anchor: form an average that is in effect its anchor, with 99 % of the weight or more on it.
        force: replace an existing result.
        lora: how low-rank adapters are averaged: `factors`, tensor by tensor, or `product`, the products s·BA.
        rank: with `product`, the rank to which the average is cut; None: it is exact, of the sum of all ranks.
        on_progress: called now and then in this thread.
        ranks: the processes that share the work, each of which calls this; see `all_ranks`.

    Returns:
        What was done: coefficients, weights, warnings, and where the result is.

    Raises:
        OutputExistsError: something else is at `out` already.
        NonFiniteError: a checkpoint holds NaN or infinity, and may not.
        SettingError: the settings do not fit the run.
        CkavgError: any other reason for which there is no result; the sources and `out` are as they were.
    """
    options = Options(
        dtype=dtype,
        accumulate=accumulate,
        path_exclude=tuple(path_exclude),
        zero_sigma=zero_sigma,
        sample=sample,
        snapshot_every=snapshot_every,
        card=card,
        allow_nonfinite=allow_nonfinite,
        allow_anchor=allow_anchor,
        force=force,
        lora=lora,
        rank=rank,
    )
    context = Context(device=device, on_progress=on_progress, ranks=ranks)
    with ranks.fail_together():
        plans = plan_averages([(run, scheme, out)], options)
        records = send_results(plans, carry_out(plans, context).records, context)
        discard_sent(plans, ranks)
        return records[0]


@dataclass(frozen=True, slots=True)
class Done:
    """What was carried out, in the order of the plans.

    Attributes:
        records: a record for each plan.
        paths: the path of the checkpoints of each plan; None where it needed none.
    """

    records: tuple[Record, ...]
    paths: tuple[PathLength | None, ...]


def carry_out(plans: Sequence[Plan], context: Context) -> Done:
    """Do what plans say, all from one reading of the checkpoints; each result is what it would be by itself.

    What is there already and up to date is not formed again. What goes to an address is formed at `Plan.out`, whence
    `send_results` sends it.

    Args:
        plans: of one source and with the same options, each to a place of its own; at least one.
        context: where it runs; the device as the user named it.

    Raises:
        CkavgError: as of `average`. A result that was complete by then stays.
    """
    with context.ranks.fail_together(), _begin_sending(plans, context.ranks):
        check_compatible(plans)
        done: dict[int, Sequence[Any]] = {id(plan): (plan.current, None) for plan in plans if plan.current is not None}
        new = [plan for plan in plans if plan.current is None]
        if new:
            from ckavg.engine.devices import tuned

            context = tuned(context, averages=len(new))
        for reading in readings(new):
            for plan, *outcome in zip(reading.plans, *_carry_out(reading, context), strict=True):
                done[id(plan)] = outcome
    records, paths = zip(*(done[id(plan)] for plan in plans), strict=True)
    return Done(records, paths)


@contextmanager
def _begin_sending(plans: Sequence[Plan], ranks: Ranks) -> Iterator[None]:
    """Refuse an address that cannot be written, before anything is read for it; no other command is at it then."""
    targets = [plan.target for plan in plans if plan.target is not None and not plan.is_there]
    if targets and ranks.world > 1 and len({*ranks.gather(platform.node())}) > 1:
        raise SettingError(
            f"{targets[0].address}: the processes run on several machines, and a result that goes elsewhere is put "
            "together on the disk of one.",
            hint="Write to a directory that all machines share, and copy the result from there.",
        )
    try:
        for target in targets if ranks.is_first else ():
            target.begin()
        yield
    except BaseException:
        for target in targets:
            target.release()
        raise


def send_results(plans: Sequence[Plan], records: Sequence[Record], context: Context) -> tuple[Record, ...]:
    """Send the results that go to an address and were formed here, or changed.

    Of several processes the first one sends; the others do not wait for it.

    Args:
        plans: as they were carried out.
        records: what came of them.
        context: as of `carry_out`.

    Returns:
        The records, with addresses.

    Raises:
        CkavgError: as of `Target.send`.
    """
    sent = []
    for plan, record in zip(plans, records, strict=True):
        if plan.target is not None and not isinstance(record.directory, AddressPath):
            if context.ranks.is_first:
                plan.target.send(record, context.on_progress)
            record = plan.target.at_address(record)
        sent.append(record)
    return tuple(sent)


def discard_sent(plans: Sequence[Plan], ranks: Ranks = ALONE) -> None:
    """Remove from this machine what was sent from it."""
    for plan in plans:
        if plan.target is not None and ranks.is_first:
            plan.target.discard()


def _carry_out(reading: Reading, context: Context) -> tuple[tuple[Record, ...], tuple[PathLength | None, ...]]:
    """The records and paths of averages that are formed together."""
    from ckavg.averaging.replay import check_constant

    begun = time.perf_counter()
    plans, run, ranks = reading.plans, reading.run, context.ranks
    with ranks.fail_together(), ExitStack() as stack:
        check_same_plans(run, plans, ranks)
        if ranks.is_first:
            for directory in {resolved(plan.out).parent for plan in plans}:
                remove_stale(directory)
        runs = {id(plan.run): plan.run for plan in plans}
        fingerprints = {key: file_fingerprints(each) for key, each in runs.items()}
        fetch(fetching_of(plans), context.on_progress)
        stagings = stage(plans, ranks, stack)
        compared = check_constant(run, {*reading.places}, context)
        measuring = time.perf_counter()
        paths = _measure_all(reading, context)
        replaying = time.perf_counter()
        statistics = averaged_statistics(run.tensors)
        coefficients = [
            plan.scheme.coefficients(_timeline(plan.run, path)).sparing(statistics)
            for plan, path in zip(plans, paths, strict=True)
        ]
        raise_all([problem for each in zip(plans, coefficients, strict=True) if (problem := anchor_problem(*each))])
        plans = tuple(_with_terms(plan, each) for plan, each in zip(plans, coefficients, strict=True))
        replayed, hashes = _replay(replace(reading, plans=plans), coefficients, stagings, context)
        if ranks.is_first:
            _check_unchanged(run)
        done = time.perf_counter()
        path_bytes = max(path.bytes_read if path else 0 for path in paths)
        seconds = Seconds(replaying - measuring if path_bytes else 0.0, done - replaying, done - begun)

        def publish() -> tuple[Record, ...]:
            records = []
            for number, (plan, each, staging) in enumerate(zip(plans, coefficients, stagings, strict=True)):
                own = [replayed.checksums[place] for place in reading.places[number]]
                work = Work(
                    accumulate=_accumulated(run, plan.options.accumulate),
                    bytes_read=compared + replayed.bytes_read + path_bytes,
                    checksums=(*(None,) * each.start, *own[each.start :]),
                    infinite=replayed.infinite[number],
                    nonfinite=replayed.nonfinite[number],
                    discarded=replayed.discarded[number],
                    seconds=seconds,
                )
                record = record_of(plan, each, paths[number], work)
                record, files = completed(plan, each, record, hashes[number])
                for name, data in files.items():
                    staging.write(name, data)
                made = made_of(reading.plans[number], fingerprints[id(plan.run)], staging.path)
                staging.write(LOCAL, local_of(record, made).to_bytes())
                records.append(record)
            for staging in stagings:
                staging.commit()
            return tuple(records)

        records = ranks.first(publish)
        for storage in run.storages:
            storage.remove_downloads()
    return records, paths


def _check_unchanged(run: Run) -> None:
    check_unchanged(run.checkpoints)
    for storage in run.storages:
        storage.check_unchanged()


def _measure_all(reading: Reading, context: Context) -> tuple[PathLength | None, ...]:
    """Pass 1: the path of each plan that needs one."""
    paths = reading.paths
    if paths is None:
        return (None,) * len(reading.plans)
    own = {places: plan.run for plan, places in zip(reading.plans, reading.places, strict=True)}
    runs = [own[places] for places in paths.places]
    measured = _measure(reading.run, runs, paths, reading.plans[0].options, context)
    by_places = dict(zip(paths.places, measured, strict=True))
    return tuple(
        by_places[places] if plan.path else None for plan, places in zip(reading.plans, reading.places, strict=True)
    )


def _measure(
    run: Run, runs: Sequence[Run], reading: PathReading, options: Options, context: Context
) -> tuple[PathLength, ...]:
    """Pass 1: from the cache, measured, or estimated, as planned.

    Args:
        run: all checkpoints.
        runs: of each path, those that it visits.
        reading: what is measured.
        options, context: as of the command.
    """
    from ckavg.path.estimate import estimate_paths
    from ckavg.path.journal import PathJournal
    from ckavg.path.measure import measure_paths

    ranks, zero_sigma, allow_nonfinite = context.ranks, options.zero_sigma, options.allow_nonfinite
    # What is cached depends on file times, which machines may see differently.
    plans, fingerprints = ranks.first(lambda: (reading.plans, fingerprint_run(run)))
    exact = [number for number, plan in enumerate(plans) if plan.sample == 1]
    sampled = [number for number, plan in enumerate(plans) if plan.sample < 1]
    paths: dict[int, PathLength] = {}

    def of(numbers: Sequence[int]) -> PathReading:
        return PathReading(
            tuple(plans[number] for number in numbers), tuple(reading.places[number] for number in numbers)
        )

    if sampled:
        estimated = estimate_paths(
            run, of(sampled), zero_sigma=zero_sigma, allow_nonfinite=allow_nonfinite, context=context
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


def _replay(
    reading: Reading, coefficients: Sequence[Coefficients], stagings: Sequence[Staging], context: Context
) -> tuple[Replayed, list[dict[Path, str]]]:
    """Pass 2, and the SHA-256 of every weight file that came of it, by plan and by path in the result."""
    from ckavg.averaging.replay import Average, replay

    plans, run, options, ranks = reading.plans, reading.run, reading.plans[0].options, context.ranks
    fingerprints = fingerprint_run(run)
    request = (
        __version__,
        fingerprints,
        reading.places,
        coefficients,
        [
            [(shard.name, shard.header) for index in plan.outputs for shard in plan.layout(index).weights.shards]
            for plan in plans
        ],
        (options.lora, options.rank),
        [[str(out) for out in plan.outputs.values()] for plan in plans],
        options.accumulate,
        options.allow_nonfinite,
        context.device.partition(":")[0],
    )
    key = hashlib.sha256(repr(request).encode()).hexdigest() if None not in fingerprints else secrets.token_hex(32)
    with open_writers(plans, stagings, key, ranks) as (writers, journal):
        averages = [
            Average(each, plan.weights.dtypes, own, places)
            for each, plan, own, places in zip(coefficients, plans, writers, reading.places, strict=True)
        ]
        replayed = replay(
            run,
            averages,
            products=plans[0].products,
            wide=options.accumulate == "float64",
            allow_nonfinite=options.allow_nonfinite,
            context=context,
            journal=journal,
        )
        hashes = finalize(plans, stagings, writers, ranks)
    ranks.wait()
    return replayed, hashes


def _with_terms(plan: Plan, coefficients: Coefficients) -> Plan:
    """The plan with the ranks of averaged products, which depend on how many weights are not 0."""
    if plan.products is None:
        return plan
    from ckavg.averaging.products import count_terms, weights_of

    terms = {index: count_terms(weights_of(plan.products, coefficients, index)) for index in plan.outputs}
    return plan.with_terms(terms)


def _timeline(run: Run, path: PathLength | None) -> Timeline:
    if path is None:
        return Timeline(run.steps, anchor_is_init=run.anchor_is_init)
    own = {name: path.tensor_lengths(name) for name in path.counted}
    return Timeline(run.steps, path.lengths, own, run.anchor_is_init)


def _accumulated(run: Run, asked: str) -> str:
    """The dtype in which tensors are accumulated: never less than that of the checkpoints."""
    return "float64" if holds_float64(run.checkpoints) else asked
