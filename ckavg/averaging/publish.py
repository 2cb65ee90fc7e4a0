"""What follows pass 2: write side files, card and record, give results their names, send them to their addresses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ckavg.averaging.plan import Plan
from ckavg.averaging.prepare import Prepared
from ckavg.averaging.recipe import made_of
from ckavg.averaging.record import Work, completed, record_of
from ckavg.checkpoints.fingerprints import Fingerprints
from ckavg.checkpoints.run import Run, holds_float64
from ckavg.engine.context import Context
from ckavg.engine.distributed import ALONE, Ranks
from ckavg.errors import CkavgError, RanksError, SettingError
from ckavg.output.output_path import LOCAL
from ckavg.output.published import local_of, placed, read_local
from ckavg.output.record import Record, Seconds, read_record
from ckavg.storage.address import AddressPath

if TYPE_CHECKING:
    from ckavg.averaging.replay import Replayed
    from ckavg.output.staging import Staging


@contextmanager
def begin_sending(plans: Sequence[Plan], ranks: Ranks) -> Iterator[None]:
    """Reserve the addresses of results before a weight is read; refuse those that cannot be written."""
    targets = [plan.target for plan in plans if plan.target is not None and not plan.is_there]
    if targets and ranks.local_world < ranks.world:
        raise SettingError(
            f"{targets[0].address}: the processes may run on several machines, but a result for an address is first "
            "written to the disk of one machine.",
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


def publish(
    prepared: Prepared,
    replayed: Replayed,
    hashes: Sequence[Mapping[Path, str]],
    stagings: Sequence[Staging],
    seconds: Seconds,
    sources: Mapping[int, Fingerprints],
    ranks: Ranks,
) -> tuple[Record, ...]:
    """Write the files beside the weights and give the results their names.

    The first result gets its name last: the other processes of a job wait for it.
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
        with ranks.working_on("the files beside the weights"):
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


def read_published(plan: Plan) -> Record:
    """The record of a result that the first process has published."""
    try:
        return placed(read_record(plan.out), read_local(plan.out), plan.run, list(plan.outputs.values()))
    except CkavgError as error:
        raise RanksError("Rank 0 ended without a result.", hint="Its own message says why.") from error


def _accumulated(run: Run, asked: str) -> str:
    """The dtype in which tensors are accumulated: float64 if the checkpoints are."""
    return "float64" if holds_float64(run.checkpoints) else asked


def send_results(plans: Sequence[Plan], records: Sequence[Record], context: Context) -> tuple[Record, ...]:
    """Upload results that go to an address and were formed or changed here.

    Only the first of several processes uploads; the others do not wait for it.

    Args:
        plans: those that were carried out.
        records: their records.
        context: see `carry_out`.

    Returns:
        The records, with addresses.

    Raises:
        CkavgError: see `Target.send`.
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
    """Remove results from this machine that were uploaded from it."""
    for plan in plans:
        if plan.target is not None and ranks.is_first:
            plan.target.discard()
