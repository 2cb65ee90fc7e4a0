"""The pipeline in several processes: what must be the same in all of them, and which of them makes what."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.averaging.parts import begin_part, parts_at_work, parts_of
from ckavg.averaging.plan import Plan
from ckavg.averaging.recipe import recipe_of
from ckavg.checkpoints.fingerprints import Fingerprints, fingerprint_run, with_tensors
from ckavg.checkpoints.run import Run
from ckavg.engine.context import Context, OnProgress, Progress
from ckavg.engine.distributed import AGREED, JOURNAL, PassJournal, Ranks
from ckavg.engine.job import RANK_FILE
from ckavg.engine.reader import usable_handles
from ckavg.errors import MissingPartsError, OutputError
from ckavg.output.staging import Staging, is_worth_continuing
from ckavg.output.weight_files import WeightFiles, create_shared, sha256_of, write_own_hashes

if TYPE_CHECKING:
    from ckavg.averaging.replay import Journals

PASS_1, CONSTANT, SAMPLE = "path", "constant", "sample"
"""Names of the journals of what comes before pass 2."""

_STAYS = (RANK_FILE, AGREED, *(f"{JOURNAL}{name}-" for name in (PASS_1, CONSTANT, SAMPLE)))
"""How the names of files begin that others may be reading still, when the first process empties a directory."""

_SECONDS_TO_AGE = 3.0
"""After which every file system's clock tells a change from the last one."""


@contextmanager
def staged(run: Run, plans: Sequence[Plan], ranks: Ranks, device: str) -> Iterator[tuple[list[Staging], Ranks]]:
    """A staging directory for each plan, and the processes at work there. The first of a job makes the directories, and
    removes or renames them when all others have left; parts that are done by themselves share them.

    Args:
        run: all checkpoints that are read.
        plans: what is to be written.
        ranks: all processes.
        device: the kind of device on which they compute.

    Raises:
        OutputError: another job is writing the same result.
        RanksError: the others do not come, or see something else.
        WriteError: the system would not let us write.
    """
    checkpoints = hash_run(run) if ranks.is_shared else ""  # by itself, a process has nobody to compare with
    stagings = [
        Staging(plan.out, force=plan.options.force or plan.target is not None, files=plan.files) for plan in plans
    ]
    if ranks.mode == "part":
        for staging, plan in zip(stagings, plans, strict=True):
            parts = parts_of(plan, ranks.world, device, checkpoints)
            staging.begin_part = begin_part(plan, parts, holds_files=partial(staging.has_files, plan.weight_files))
    told = {
        "checkpoints": checkpoints,
        "options": [[recipe_of(plan), plan.files] for plan in plans],
        "device": device,
    }
    if ranks.mode == "join" and (working := parts_at_work(stagings[0].path, ranks.world)):
        raise MissingPartsError(working, ranks.world, "the work that is going on")
    with ExitStack() as stack:
        if ranks.is_first:
            for staging in stagings:
                stack.enter_context(staging)
            if ranks.mode in ("alone", "job"):
                stagings[0].forget_processes()
            if ranks.mode == "join":
                stagings[0].keep()
        try:
            with ranks.meet(stagings[0].path, told) as joined:
                yield stagings, joined
        except BaseException:
            if ranks.is_first and is_worth_continuing(stagings[0].path):
                for staging in stagings:
                    staging.keep()
            raise


@contextmanager
def met_to_measure(run: Run, ranks: Ranks, *options: object) -> Iterator[Ranks]:
    """The processes in a directory for measuring a path alone, beside the table of finished paths; this process as it
    is where it is alone.

    Raises:
        RanksError, OutputError, WriteError: as of `staged`.
    """
    if not ranks.is_shared:
        yield ranks
        return
    from ckavg.path.cache import cache_files

    told = {"checkpoints": hash_run(run), "options": repr(options)}
    name = f"path-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}"
    places = [place.parent for place in cache_files(run)]
    staging = Staging(next(filter(_may_write, places), places[0]) / name)
    with ExitStack() as stack:
        if ranks.is_first:
            stack.enter_context(staging)
            staging.forget_processes()
        try:
            with ranks.meet(staging.path, told) as joined:
                yield joined
                joined.leave()
        except BaseException:
            if ranks.is_first and is_worth_continuing(staging.path):
                staging.keep()
            raise


def _may_write(directory: Path) -> bool:
    """Whether the system would let us write to a directory, or make it."""
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    return os.access(existing, os.W_OK | os.X_OK)


def agreed_fingerprints(run: Run, ranks: Ranks) -> Fingerprints:
    """The fingerprints of a run, which machines may see differently, as they count in all processes; in a shared job
    each checkpoint has one.
    """
    if not ranks.is_shared:
        return fingerprint_run(run)

    def found() -> list[str]:
        fingerprints = fingerprint_run(run)
        if None in fingerprints:
            time.sleep(_SECONDS_TO_AGE)
            fingerprints = fingerprint_run(run)
        return [each or secrets.token_hex(16) for each in fingerprints]

    return tuple(ranks.agreed("fingerprints", found))


Writers = list[dict[int, WeightFiles]]
"""The weight files of each plan, by the index of the checkpoint after which they are written."""


@contextmanager
def open_writers(
    plans: Sequence[Plan], stagings: Sequence[Staging], key: str, ranks: Ranks
) -> Iterator[tuple[Writers, Journals]]:
    """The weight files of all plans, open, and the journals of what is finished of them.

    The first process of a job makes the files, and the others open what it has made. Parts make what is not there.

    Args:
        plans: what is to be written.
        stagings: where, in their order.
        key: of this very work, whose parts come out the same whenever they are done.
        ranks: all processes.

    Raises:
        WriteError: the system would not let us write.
    """
    with ExitStack() as stack:
        writers: Writers = []

        def sync() -> None:
            """What a journal says is finished is on the disk, whatever becomes of the machine."""
            for of_plan in writers:
                for writer in of_plan.values():
                    writer.sync()

        def journals(name: str, as_json: Callable[[Any], Any], from_json: Callable[[Any], Any]) -> PassJournal[Any]:
            return ranks.journal(name, key, as_json, from_json, before_note=sync)

        def begun() -> bool:
            """Whether there is something to continue; the places are empty where there is not."""
            is_there = all(staging.holds(key, plan.weight_files) for staging, plan in zip(stagings, plans, strict=True))
            if is_there and is_worth_continuing(stagings[0].path):
                return True
            for staging in stagings:
                staging.begin(key, but=_STAYS if ranks.is_shared else ())
            return False

        if ranks.mode == "part":
            for staging, plan in zip(stagings, plans, strict=True):
                staging.say(key)
                for index, out in plan.outputs.items():
                    create_shared(staging.path / out.relative_to(plan.out), plan.layout(index).weights.shards)
                if not staging.has_files(plan.weight_files):
                    raise OutputError(
                        f"{staging.path} holds weight files of other sizes than this average has.",
                        hint="Delete that directory to start afresh.",
                    )
        is_made = ranks.mode in ("part", "join")
        create = not is_made and not ranks.agreed("begun", begun) and ranks.is_first
        keep_open = sum(len(plan.weight_files) for plan in plans) <= usable_handles() // 2

        def opened(plan: Plan, staging: Staging) -> dict[int, WeightFiles]:
            return {
                index: stack.enter_context(
                    WeightFiles(
                        staging.path / out.relative_to(plan.out),
                        plan.layout(index).weights.shards,
                        create=create,
                        keep_open=keep_open,
                    )
                )
                for index, out in plan.outputs.items()
            }

        if ranks.is_first:
            writers += map(opened, plans, stagings)
        if ranks.mode == "job":
            ranks.agreed("made", bool)
        if not ranks.is_first:
            writers += map(opened, plans, stagings)
        yield writers, journals


def finalize(
    plans: Sequence[Plan], stagings: Sequence[Staging], writers: Writers, key: str, context: Context
) -> list[dict[Path, str]]:
    """Have all weight files on the disk, and give the SHA-256 of each by its path in the result; tell how far that is.

    Raises:
        WriteError: the system would not let us write.
        ReadError: what was written cannot be read again.
    """
    outputs = [
        (staging.path / out.relative_to(plan.out) / shard.name, shard)
        for staging, plan in zip(stagings, plans, strict=True)
        for index, out in plan.outputs.items()
        for shard in plan.layout(index).weights.shards
    ]
    ranks, syncs = context.ranks, [writer.sync for of_plan in writers for writer in of_plan.values()]
    written = [plan.layout(index).weights.nbytes for plan in plans for index in plan.outputs]
    report = _report_files(context.on_progress, [shard.nbytes for _, shard in outputs], written)
    if ranks.mode != "job":
        for path, shard in outputs:
            write_own_hashes(path, shard)
        hashes = dict(enumerate(sha256_of([path for path, _ in outputs], beside=syncs, on_done=report)))
    else:
        journal: PassJournal[str] = ranks.journal("files", key)
        own = [place for place in range(ranks.rank, len(outputs), ranks.world) if place not in journal.done]
        for place in own:
            write_own_hashes(*outputs[place])
        hashes = dict(journal.found)
        hashes |= zip(own, sha256_of([outputs[place][0] for place in own], beside=syncs), strict=True)
        journal.note({place: hashes[place] for place in own})

        def late() -> set[int]:
            hashes.update(journal.read())
            return {place % ranks.world for place in range(len(outputs)) if place not in hashes}

        ranks.wait(late, "hashing")
        for place in range(len(outputs) + len(syncs)):
            report(place)
    by_path = {path: hashes[place] for place, (path, _) in enumerate(outputs)}
    return [
        {name: by_path[staging.path / name] for name in plan.weight_files}
        for staging, plan in zip(stagings, plans, strict=True)
    ]


def _report_files(
    on_progress: OnProgress | None, hashed: Sequence[int], synced: Sequence[int]
) -> Callable[[int], None]:
    """What tells how far files are hashed and on the disk, by the place of what is done: each is half of the work."""
    total, done, sizes = sum(hashed), 0, [*hashed, *synced]
    if on_progress is not None:
        on_progress(Progress("files", 0, total))

    def report(place: int) -> None:
        nonlocal done
        done += sizes[place]
        if on_progress is not None:
            on_progress(Progress("files", done // 2, total))

    return report


def hash_run(run: Run) -> str:
    """What is the same of a run wherever it is seen: files count by name and size, tensors by what headers say."""
    digest = hashlib.sha256()
    for checkpoint, tensors in with_tensors(run):
        digest.update(
            repr((checkpoint.step, [(shard.path.name, shard.nbytes) for shard in checkpoint.shards])).encode()
        )
        digest.update(tensors)
    return digest.hexdigest()
