"""The pipeline in several processes: what they must agree on before it begins, and which of them makes what."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.averaging.plan import Plan
from ckavg.checkpoints.run import Checkpoint, Run
from ckavg.engine.distributed import Ranks
from ckavg.engine.reader import usable_handles
from ckavg.output.output_path import JOURNAL
from ckavg.output.staging import Staging
from ckavg.output.weight_files import WeightFiles, sha256_of, write_own_hashes
from ckavg.storage.journal import Journal

if TYPE_CHECKING:
    from ckavg.averaging.replay import BlockResult
    from ckavg.engine.stream import PassJournal


def check_same_run(run: Run, ranks: Ranks, *options: object) -> None:
    """Refuse to begin where one process has found other checkpoints than the first, or was given other options.

    Args:
        run: as this process found it; files count by name and size, tensors by what headers say of them.
        ranks: all processes.
        options: whatever else changes the result.

    Raises:
        RanksError: they differ.
    """
    if ranks.world > 1:
        ranks.check_same({"checkpoints": _hash_run(run), "options": repr(options)})


def check_same_plans(run: Run, plans: Sequence[Plan], ranks: Ranks) -> None:
    """The same for plans that are carried out together, of checkpoints of one run; where a result goes may have another
    name on another machine.
    """
    asked = [
        (plan.scheme, plan.run.steps, plan.snapshots, plan.path and plan.path.exclude, plan.files) for plan in plans
    ]
    check_same_run(run, ranks, asked, replace(plans[0].options, card=None, force=False))


def stage(plans: Sequence[Plan], ranks: Ranks, stack: ExitStack) -> list[Staging]:
    """A staging directory for each plan, that all processes see. The first makes it, and removes or renames it.

    Args:
        plans: what is to be written.
        ranks: all processes.
        stack: left when all is done. The first process leaves it after all others, even after an error, so that nobody
            writes any more when it removes a directory.

    Raises:
        OutputError: another job is writing the same result, or one process does not see what the first has made.
        WriteError: the system would not let us write.
    """
    stagings = [
        Staging(plan.out, force=plan.options.force or plan.target is not None, files=plan.files) for plan in plans
    ]
    if ranks.is_first:
        for staging in stagings:
            stack.enter_context(staging)
    if ranks.world > 1:
        stack.enter_context(ranks.fail_together())
        marks = ranks.first(lambda: [staging.mark() for staging in stagings])
        if not ranks.is_first:
            for staging, mark in zip(stagings, marks, strict=True):
                staging.wait_for(mark)
    return stagings


Writers = list[dict[int, WeightFiles]]
"""The weight files of each plan, by the index of the checkpoint after which they are written."""


@contextmanager
def open_writers(
    plans: Sequence[Plan], stagings: Sequence[Staging], key: str, ranks: Ranks
) -> Iterator[tuple[Writers, PassJournal[BlockResult]]]:
    """The weight files of all plans, open, and what an interrupted attempt at the same work has finished of them.

    The first process makes the files, and the others open what it has made.

    Args:
        plans: what is to be written.
        stagings: where, in their order.
        key: of this very work, whose parts come out the same whenever they are done.
        ranks: all processes.

    Raises:
        WriteError: the system would not let us write.
    """
    from ckavg.averaging.replay import BlockResult
    from ckavg.engine.stream import PassJournal

    key, done = ranks.first(lambda: (key, _continued(plans, stagings, key)))  # file times may look different elsewhere
    create = ranks.is_first and not done
    keep_open = sum(len(plan.weight_files) for plan in plans) <= usable_handles() // 2
    with ExitStack() as stack:
        if not ranks.is_first:
            ranks.wait()
        writers = [
            {
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
            for staging, plan in zip(stagings, plans, strict=True)
        ]
        if ranks.is_first:
            ranks.wait()
        journal = _journal(stagings[0], key, ranks)
        if journal is not None:
            stack.callback(journal.close)

        def note(finished: Mapping[int, BlockResult]) -> None:
            """What a journal says is finished is on the disk, whatever becomes of the machine."""
            for of_plan in writers:
                for writer in of_plan.values():
                    writer.sync()
            with suppress(OSError):  # no room for a journal, perhaps: the result has its own already
                if journal is not None:
                    journal.add({place: block_result.to_json() for place, block_result in finished.items()})
                    for staging in stagings:
                        staging.keep()

        yield writers, PassJournal({place: BlockResult.from_json(values) for place, values in done.items()}, note)


def finalize(
    plans: Sequence[Plan], stagings: Sequence[Staging], writers: Writers, ranks: Ranks
) -> list[dict[Path, str]]:
    """Have all weight files on the disk, and give the SHA-256 of each by its path in the result.

    Raises:
        WriteError: the system would not let us write.
        ReadError: what was written cannot be read again.
    """
    paths = [
        {name: staging.path / name for name in plan.weight_files} for staging, plan in zip(stagings, plans, strict=True)
    ]
    of_all = [path for of_plan in paths for path in of_plan.values()]
    syncs = [writer.sync for of_plan in writers for writer in of_plan.values()]
    if ranks.world > 1:
        sha256_of((), beside=syncs)
        ranks.wait()  # the others have written into these files, too
    if ranks.is_first:
        for plan, of_plan in zip(plans, paths, strict=True):
            for index, out in plan.outputs.items():
                for shard in plan.layout(index).weights.shards:
                    write_own_hashes(of_plan[out.relative_to(plan.out) / shard.name], shard)
    ranks.wait()
    own = of_all[ranks.rank :: ranks.world]
    hashes: dict[Path, str] = {}
    for part in ranks.gather(dict(zip(own, sha256_of(own, beside=syncs), strict=True))):
        hashes |= part
    return [{name: hashes[path] for name, path in of_plan.items()} for of_plan in paths]


def _continued(plans: Sequence[Plan], stagings: Sequence[Staging], key: str) -> dict[int, Any]:
    """What is finished already; where nothing is, the places are empty afterwards."""
    if all(staging.holds(key, plan.weight_files) for staging, plan in zip(stagings, plans, strict=True)):
        done, *_ = [staging.finished(key) for staging in stagings]
        if done:
            for staging in stagings:
                staging.keep()
            return done
    for staging in stagings:
        staging.begin(key)
    return {}


def _journal(staging: Staging, key: str, ranks: Ranks) -> Journal | None:
    """The journal of this process; None where there is no room for one."""
    with suppress(OSError):
        return Journal(staging.path / f"{JOURNAL}{ranks.rank}", key)
    return None


def _hash_run(run: Run) -> str:
    digest = hashlib.sha256()
    before, tensors = run.checkpoints[0], _tensors(run.checkpoints[0])
    for checkpoint in run.checkpoints:
        digest.update(
            repr((checkpoint.step, [(shard.path.name, shard.nbytes) for shard in checkpoint.shards])).encode()
        )
        if checkpoint.entries is not before.entries:
            before, tensors = checkpoint, _tensors(checkpoint)
        digest.update(tensors)
    return digest.hexdigest()


def _tensors(checkpoint: Checkpoint) -> bytes:
    return repr(sorted(checkpoint.entries.items())).encode()
