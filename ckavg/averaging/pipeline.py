"""The pipeline, on one page: discover → plan → path → schemes → replay → write. Only this module composes the stages.

Modules that need torch are imported where they are used: opening a run, or saying what would be done, must not wait
for them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg import __version__
from ckavg.averaging.distributed import (
    CONSTANT,
    agreed_fingerprints,
    finalize,
    met_to_measure,
    open_writers,
    staged,
)
from ckavg.averaging.plan import Options, Plan, anchor_problem, check_compatible, plan_averages
from ckavg.averaging.reading import Reading, fetching_of, fetching_of_path, readings
from ckavg.averaging.recipe import made_of
from ckavg.averaging.record import Work, completed, record_of
from ckavg.averaging.sources import opened
from ckavg.checkpoints.fingerprints import Fingerprints, check_unchanged, file_fingerprints, fingerprint_run
from ckavg.checkpoints.run import Run, averaged_statistics, holds_float64
from ckavg.engine.context import Context, OnProgress, listening
from ckavg.engine.distributed import ALONE, PassJournal, Ranks
from ckavg.engine.remote import fetch
from ckavg.errors import CkavgError, MissingPartsError, RanksError, SettingError, raise_all
from ckavg.output.output_path import LOCAL
from ckavg.output.published import local_of, placed, read_local
from ckavg.output.record import Record, Seconds, read_record
from ckavg.output.staging import remove_stale
from ckavg.path.cache import save_path
from ckavg.path.plan import PathPlan, PathReading, plan_path
from ckavg.path.table import PathLength, TensorLengths, ZeroSigma
from ckavg.schemes import Coefficients, Scheme, Timeline
from ckavg.storage.address import AddressPath
from ckavg.storage.atomic import resolved
from ckavg.storage.base import AnyPath

if TYPE_CHECKING:
    from ckavg.averaging.replay import Replayed, TensorWriter
    from ckavg.output.staging import Staging


def path_length(
    run: Run | AnyPath | str,
    *,
    path_exclude: Sequence[str] = (),
    zero_sigma: ZeroSigma = "exclude",
    sample: float = 1.0,
    allow_nonfinite: bool = False,
    device: str = "auto",
    progress: bool | OnProgress = False,
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
) -> PathLength:
    """Measure how far the weights of a run travelled: pass 1 alone (Pathwise EMA, Eq. 2).

    What was measured before of the same files is not measured again: the table is kept in `averaged/path.json` of the
    run's directory or, where that cannot be written, in the user's cache.

    Args:
        run: the checkpoints, the anchor first, or the directory or address of all of them.
        path_exclude: shell patterns of tensor names that do not count.
        zero_sigma: `exclude` leaves tensors without spread out of the sum and of N; `eps` divides by σ_p + 1e-8.
        sample: estimate it from this fraction of each tensor, in (0, 1]; 1 is exact.
        allow_nonfinite: tensors that hold NaN or infinity do not count, instead of being refused.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: True draws a bar on stderr; a function is called now and then in this thread.
        on_progress: the same under its earlier name.
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
    run = opened(run)
    plan = plan_path(run, exclude=options.path_exclude, sample=sample)
    with listening(progress or on_progress or False) as listener:
        return _path_length(run, plan, options, tuned(Context(device=device, on_progress=listener, ranks=ranks)))


def _path_length(run: Run, plan: PathPlan, options: Options, context: Context) -> PathLength:
    ranks = context.ranks
    fetch(fetching_of_path(run, plan), context.on_progress)
    with met_to_measure(run, ranks, options, _kind(context)) as met:
        context = replace(context, ranks=met)
        fingerprints = agreed_fingerprints(run, met)
        (path,) = _measure(run, [run], PathReading.single(plan), fingerprints, options, context)
        if ranks.is_first:
            _check_unchanged(run)
        return path


def average(
    run: Run | AnyPath | str,
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
    progress: bool | OnProgress = False,
    on_progress: OnProgress | None = None,
    ranks: Ranks = ALONE,
) -> Record:
    """Average the checkpoints of a run and write the result as a checkpoint that loads as it stands.

    A result that is there already, of the same recipe and of checkpoints that have not changed since, is returned as
    it is, and nothing is read.

    Args:
        run: the checkpoints, the anchor first, as of `open_run`; or the directory or address of all of them.
        scheme: how: `PEMA`, `BEMA`, `EMA`, `MomentumEMA`, `PowerEMA`, `PowerExponentEMA`, `OUEMA`, `DEMA`, `Mean`,
            `Weights`, `Last`, or a `Scheme` of your own.
        out: where the result goes, a directory or an address such as `s3://bucket/result`; None:
            `<source>/averaged/<scheme and selection>`, such as `ema-gamma0.15-last10`.
        dtype: output dtype of floating tensors: `source`, `float32`, `bfloat16`, `float16` or `float64`.
        accumulate: `float32` or `float64`; float64 checkpoints are accumulated in float64 in any case.
        device: where the arithmetic happens: `auto`, `cpu`, `cuda` or `cuda:N`.
        path_exclude: shell patterns of tensors that do not count in the path length.
        zero_sigma: what becomes of tensors without spread; see `path_length`.
        sample: estimate the path length from this fraction of each tensor; see `path_length`.
        snapshot_every: also write the average as it stood after each checkpoint whose step is a multiple of this, to
            `<out>/checkpoint-<step>`.
        card: a Markdown file whose fields and text come first in the model card of the result.
        allow_nonfinite: average checkpoints that hold NaN or infinity, too; where they do, the result is not finite.
        allow_anchor: form an average that is in effect its anchor, with 99 % of the weight or more on it.
        force: replace an existing result.
        lora: how low-rank adapters are averaged: `factors`, tensor by tensor, or `product`, the products s·BA.
        rank: with `product`, the rank to which the average is cut; None: it is exact, of the sum of all ranks.
        progress: True draws a bar on stderr; a function is called now and then in this thread.
        on_progress: the same under its earlier name.
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
    plans = plan_averages([(opened(run), scheme, out)], options)
    with listening(progress or on_progress or False, 1 + bool(plans[0].path_bytes)) as listener:
        context = Context(device=device, on_progress=listener, ranks=ranks)
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
    with _begin_sending(plans, context.ranks):
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
    if targets and ranks.local_world < ranks.world:
        raise SettingError(
            f"{targets[0].address}: the processes may run on several machines, and a result that goes elsewhere is put "
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
    begun = time.perf_counter()
    plans, run, ranks = reading.plans, reading.run, context.ranks
    if ranks.mode in ("alone", "job") and ranks.is_first:
        for directory in {resolved(plan.out).parent for plan in plans}:
            remove_stale(directory)
    runs = {id(plan.run): plan.run for plan in plans}
    sources = {key: file_fingerprints(each) for key, each in runs.items()}
    if ranks.mode != "join":  # who joins reads no weights
        fetch(fetching_of(plans), context.on_progress)
    with staged(run, plans, ranks, _kind(context)) as (stagings, met):
        context = replace(context, ranks=met)
        prepared = _prepare(reading, context)
        replayed, hashes = _replay(prepared, stagings, context)
        met.leave()
        if ranks.is_first:
            _check_unchanged(run)
            seconds = prepared.seconds(begun)
            records = _publish(prepared, replayed, hashes, stagings, seconds, sources, met)
    if not ranks.is_first:
        records = tuple(_published(plan) for plan in prepared.plans)
    for storage in run.storages:
        storage.remove_downloads()
    return records, prepared.paths


def do_part(plan: Plan, context: Context) -> tuple[int, ...]:
    """Do one part of an average, as `context.ranks` says, beside the place of its result.

    Returns:
        The parts that are not finished yet, from 0. Where there are none, they are to be joined.

    Raises:
        MissingPartsError: this part needs what others have not finished.
        CkavgError: as of `average`.
    """
    from ckavg.engine.devices import tuned

    (reading,) = readings([plan])
    context = tuned(context)
    fetch(fetching_of([plan]), context.on_progress)
    with staged(reading.run, [plan], context.ranks, _kind(context)) as (stagings, met):
        prepared = _prepare(reading, replace(context, ranks=met))
        try:
            _replay(prepared, stagings, replace(context, ranks=replace(met, waits=False)))
        except MissingPartsError as error:
            return error.parts
        _check_unchanged(plan.run)
    return ()


def in_memory(plan: Plan, writer: TensorWriter, context: Context) -> None:
    """Form an average tensor by tensor, as `average` does, and hand its bytes to a writer.

    Raises:
        CkavgError: as of `average`.
    """
    from ckavg.averaging.replay import Average, replay
    from ckavg.engine.devices import tuned

    (reading,), context = readings([plan]), tuned(context)
    fetch(fetching_of([plan]), context.on_progress)
    prepared = _prepare(reading, context)
    last = len(plan.run.checkpoints) - 1
    replay(
        plan.run,
        [Average(prepared.coefficients[0], plan.weights.dtypes, {last: writer}, reading.places[0])],
        wide=plan.options.accumulate == "float64",
        allow_nonfinite=plan.options.allow_nonfinite,
        context=context,
    )
    _check_unchanged(plan.run)
    for storage in plan.run.storages:
        storage.remove_downloads()


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Averages before pass 2.

    Attributes:
        asked: the averages as they were planned.
        reading: the same with the ranks of averaged products.
        fingerprints: of all checkpoints, the same in all processes.
        compared: bytes that were read to compare what must not differ.
        paths, coefficients: of each average.
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
        """How long it took until now, of all that began then."""
        (measuring, replaying), done = self.times, time.perf_counter()
        return Seconds(replaying - measuring if self.path_bytes else 0.0, done - replaying, done - begun)


def _prepare(reading: Reading, context: Context) -> _Prepared:
    """What comes before pass 2: what must not differ is compared, and the path measured."""
    from ckavg.averaging.replay import check_constant

    plans, run, ranks = reading.plans, reading.run, context.ranks
    fingerprints = agreed_fingerprints(run, ranks)
    journal: PassJournal[None] | None = None
    if ranks.is_shared:
        journal = ranks.journal(CONSTANT, hashlib.sha256(repr((fingerprints, reading.places)).encode()).hexdigest())
    compared = 0
    with (
        nullcontext() if ranks.mode == "join" else suppress(MissingPartsError)
    ):  # who joins knows that all was compared
        compared = check_constant(run, {*reading.places}, context, journal)
    measuring = time.perf_counter()
    paths = _measure_all(reading, fingerprints, context)
    replaying = time.perf_counter()
    coefficients = tuple(coefficients_with(*each) for each in zip(plans, paths, strict=True))
    raise_all([problem for each in zip(plans, coefficients, strict=True) if (problem := anchor_problem(*each))])
    plans = tuple(_with_terms(plan, each) for plan, each in zip(plans, coefficients, strict=True))
    times = measuring, replaying
    with_terms = replace(reading, plans=plans)
    return _Prepared(reading.plans, with_terms, fingerprints, compared, paths, coefficients, times)


def _publish(
    prepared: _Prepared,
    replayed: Replayed,
    hashes: Sequence[Mapping[Path, str]],
    stagings: Sequence[Staging],
    seconds: Seconds,
    sources: Mapping[int, Fingerprints],
    ranks: Ranks,
) -> tuple[Record, ...]:
    """Write what goes beside the weights, and give the results their names; the first one last, since the others of a
    job wait for that.
    """
    records = []
    reading = prepared.reading
    accumulate = _accumulated(reading.run, prepared.plans[0].options.accumulate)
    for number, (plan, each, staging) in enumerate(zip(prepared.plans, prepared.coefficients, stagings, strict=True)):
        own = [replayed.checksums[place] for place in reading.places[number]]
        work = Work(
            accumulate=accumulate,
            bytes_read=prepared.compared + replayed.bytes_read + prepared.path_bytes,
            checksums=(*(None,) * each.start, *own[each.start :]),
            infinite=replayed.infinite[number],
            nonfinite=replayed.nonfinite[number],
            discarded=replayed.discarded[number],
            seconds=seconds,
        )
        record = record_of(plan, each, prepared.paths[number], work)
        with ranks.working_on("what goes beside the weights"):
            ranks.check()
        record, files = completed(plan, each, record, hashes[number])
        for name, data in files.items():
            staging.write(name, data)
        made = made_of(prepared.asked[number], sources[id(plan.run)], staging.path)
        staging.write(LOCAL, local_of(record, made).to_bytes())
        records.append(record)
    for staging in reversed(stagings):
        staging.commit()
    return tuple(records)


def _published(plan: Plan) -> Record:
    """The record of a result that the first process of a job has published."""
    try:
        return placed(read_record(plan.out), read_local(plan.out), plan.run, list(plan.outputs.values()))
    except CkavgError as error:
        raise RanksError("Rank 0 has ended without a result.", hint="What it says tells why.") from error


def _kind(context: Context) -> str:
    """The kind of device on which it runs."""
    return context.device.partition(":")[0]


def _check_unchanged(run: Run) -> None:
    check_unchanged(run.checkpoints)
    for storage in run.storages:
        storage.check_unchanged()


def _measure_all(reading: Reading, fingerprints: Fingerprints, context: Context) -> tuple[PathLength | None, ...]:
    """Pass 1: the path of each plan that needs one."""
    paths = reading.paths
    if paths is None:
        return (None,) * len(reading.plans)
    own = {places: plan.run for plan, places in zip(reading.plans, reading.places, strict=True)}
    runs = [own[places] for places in paths.places]
    measured = _measure(reading.run, runs, paths, fingerprints, reading.plans[0].options, context)
    by_places = dict(zip(paths.places, measured, strict=True))
    return tuple(
        by_places[places] if plan.path else None for plan, places in zip(reading.plans, reading.places, strict=True)
    )


def _measure(
    run: Run,
    runs: Sequence[Run],
    reading: PathReading,
    fingerprints: Fingerprints,
    options: Options,
    context: Context,
) -> tuple[PathLength, ...]:
    """Pass 1: from the cache, measured, or estimated, as planned.

    Args:
        run: all checkpoints.
        runs: of each path, those that it visits.
        reading: what is measured.
        fingerprints: of all checkpoints.
        options, context: as of the command.
    """
    from ckavg.path.estimate import estimate_paths
    from ckavg.path.journal import PathJournal
    from ckavg.path.measure import measure_paths

    ranks, zero_sigma, allow_nonfinite = context.ranks, options.zero_sigma, options.allow_nonfinite
    plans = reading.plans
    if ranks.is_shared:  # what is cached depends on file times, which machines may see differently
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
            run,
            of(sampled),
            zero_sigma=zero_sigma,
            allow_nonfinite=allow_nonfinite,
            context=context,
            key=fingerprints,
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
    prepared: _Prepared, stagings: Sequence[Staging], context: Context
) -> tuple[Replayed, list[dict[Path, str]]]:
    """Pass 2, and the SHA-256 of every weight file that came of it, by plan and by path in the result; a part leaves
    that to whoever joins.
    """
    from ckavg.averaging.replay import Average, replay

    reading, coefficients, ranks = prepared.reading, prepared.coefficients, context.ranks
    plans, run, options = reading.plans, reading.run, reading.plans[0].options
    fingerprints = prepared.fingerprints if ranks.is_shared else fingerprint_run(run)
    request = (
        __version__,
        fingerprints,
        reading.places,
        [dataclasses.astuple(each) for each in coefficients],
        [
            [(shard.name, shard.header) for index in plan.outputs for shard in plan.layout(index).weights.shards]
            for plan in plans
        ],
        (options.lora, options.rank),
        [[str(out.relative_to(plan.out)) for out in plan.outputs.values()] for plan in plans],
        options.accumulate,
        options.allow_nonfinite,
        _kind(context),
    )
    key = hashlib.sha256(repr(request).encode()).hexdigest() if None not in fingerprints else secrets.token_hex(32)
    with open_writers(plans, stagings, key, ranks) as (writers, journals):
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
            journals=journals,
        )
        hashes = [] if ranks.mode == "part" else finalize(plans, stagings, writers, key, ranks)
    return replayed, hashes


def _with_terms(plan: Plan, coefficients: Coefficients) -> Plan:
    """The plan with the ranks of averaged products, which depend on how many weights are not 0."""
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


def _accumulated(run: Run, asked: str) -> str:
    """The dtype in which tensors are accumulated: never less than that of the checkpoints."""
    return "float64" if holds_float64(run.checkpoints) else asked
