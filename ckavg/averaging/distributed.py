"""The pipeline in several processes: what must be the same in all of them, and which process makes what."""

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
"""Names of the journals written before pass 2."""

_STAYS = (RANK_FILE, AGREED, *(f"{JOURNAL}{name}-" for name in (PASS_1, CONSTANT, SAMPLE)))
"""Prefixes of files that other processes may still read when the first process empties the directory."""

_SECONDS_TO_AGE = 3.0
"""After so long, the modification time of a file tells a later change on every file system."""


@contextmanager
def staged(run: Run, plans: Sequence[Plan], ranks: Ranks, device: str) -> Iterator[tuple[list[Staging], Ranks]]:
    """Open a staging directory for each plan; yield them, and the processes that have met there.

    The first process of a job makes the directories, and removes or renames them once all others have left. Parts
    share them.

    Args:
        run: all checkpoints that are read.
        plans: what is written.
        ranks: all processes.
        device: the kind of device that computes.

    Raises:
        OutputError: another job is writing the same result.
        RanksError: a process does not come, or sees other checkpoints or options.
        WriteError: a file cannot be written.
    """
    checkpoints = hash_run(run) if ranks.is_shared else ""
    stagings = [
        Staging(plan.out, force=plan.options.force or plan.target is not None, files=plan.files) for plan in plans
    ]
    if ranks.mode == "part":
        for staging, plan in zip(stagings, plans, strict=True):
            parts = parts_of(plan, ranks.world, device, checkpoints)
            staging.begin_part = begin_part(plan, parts, holds_files=partial(staging.has_files, plan.weight_files))
    settings = {
        "checkpoints": checkpoints,
        "options": [[recipe_of(plan), plan.files] for plan in plans],
        "device": device,
    }
    if ranks.mode == "join" and (working := parts_at_work(stagings[0].path, ranks.world)):
        raise MissingPartsError(working, ranks.world, "the work in progress")
    with ExitStack() as stack:
        if ranks.is_first:
            for staging in stagings:
                stack.enter_context(staging)
            if ranks.mode in ("alone", "job"):
                stagings[0].forget_processes()
            if ranks.mode == "join":
                stagings[0].keep()
        try:
            with ranks.meet(stagings[0].path, settings) as joined:
                yield stagings, joined
        except BaseException:
            if ranks.is_first and is_worth_continuing(stagings[0].path):
                for staging in stagings:
                    staging.keep()
            raise


@contextmanager
def met_to_measure(run: Run, ranks: Ranks, *options: object) -> Iterator[Ranks]:
    """The processes that measure a path together, in a directory beside the path cache; a process alone as it is.

    Raises:
        RanksError, OutputError, WriteError: see `staged`.
    """
    if not ranks.is_shared:
        yield ranks
        return
    from ckavg.path.cache import cache_files

    settings = {"checkpoints": hash_run(run), "options": repr(options)}
    name = f"path-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}"
    directories = [file.parent for file in cache_files(run)]
    staging = Staging(next(filter(_may_write, directories), directories[0]) / name)
    with ExitStack() as stack:
        if ranks.is_first:
            stack.enter_context(staging)
            staging.forget_processes()
        try:
            with ranks.meet(staging.path, settings) as joined:
                yield joined
                joined.leave()
        except BaseException:
            if ranks.is_first and is_worth_continuing(staging.path):
                staging.keep()
            raise


def _may_write(directory: Path) -> bool:
    """Whether this process may write to a directory, or make it."""
    existing = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    return os.access(existing, os.W_OK | os.X_OK)


def agreed_fingerprints(run: Run, ranks: Ranks) -> Fingerprints:
    """The fingerprints of a run as the first process sees them: file times may differ from machine to machine.

    With several processes, every checkpoint has a fingerprint.
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
    """Open the weight files of all plans, and the journals of their finished blocks.

    The first process of a job makes the files; the others open them. A part makes those that are missing.

    Args:
        plans: what is written.
        stagings: the staging directory of each plan.
        key: hash of everything that can change a byte; finished blocks count only under the same key.
        ranks: all processes.

    Raises:
        WriteError: a file cannot be written.
    """
    with ExitStack() as stack:
        writers: Writers = []

        def sync() -> None:
            """Flush to disk first, so that the journal never claims more than a crash would leave."""
            for files in writers:
                for writer in files.values():
                    writer.sync()

        def journals(name: str, as_json: Callable[[Any], Any], from_json: Callable[[Any], Any]) -> PassJournal[Any]:
            return ranks.journal(name, key, as_json, from_json, before_note=sync)

        def begun() -> bool:
            """Whether there is work to continue; if not, empty the directories."""
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
                        f"{staging.path} holds weight files whose sizes are not those of this average.",
                        hint="Delete that directory to start again.",
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
    """Flush all weight files to disk; return the SHA-256 of each by its path in the result. Reports progress.

    Raises:
        WriteError: a file cannot be written.
        ReadError: a written file cannot be read back.
    """
    outputs = [
        (staging.path / out.relative_to(plan.out) / shard.name, shard)
        for staging, plan in zip(stagings, plans, strict=True)
        for index, out in plan.outputs.items()
        for shard in plan.layout(index).weights.shards
    ]
    ranks, syncs = context.ranks, [writer.sync for files in writers for writer in files.values()]
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
        paths = [outputs[place][0] for place in own]
        hashed = sha256_of(paths, beside=syncs, working_on=ranks.working_on, on_wait=ranks.check)
        hashes |= zip(own, hashed, strict=True)
        journal.note({place: hashes[place] for place in own})

        def awaited() -> set[int]:
            hashes.update(journal.read())
            return {place % ranks.world for place in range(len(outputs)) if place not in hashes}

        ranks.wait(awaited, "hashing")
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
    """A hash of a run that is the same on every machine: names and sizes of files, and what headers say of tensors."""
    digest = hashlib.sha256()
    for checkpoint, tensors in with_tensors(run):
        digest.update(
            repr((checkpoint.step, [(shard.path.name, shard.nbytes) for shard in checkpoint.shards])).encode()
        )
        for piece in tensors:
            digest.update(piece)
    return digest.hexdigest()
