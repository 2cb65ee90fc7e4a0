"""The pipeline in several processes: what they must agree on before it begins, and which of them makes what."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack

from ckavg.engine.ranks import Ranks
from ckavg.plan import Plan
from ckavg.result.staging import ShardFiles, Staging
from ckavg.run.values import Run


def agree(run: Run, ranks: Ranks, *options: object) -> None:
    """Refuse to begin where one process has found other checkpoints than the first, or was given other options.

    Args:
        run: as this process found it; files count by name and size, tensors by what headers say of them.
        ranks: all processes.
        options: whatever else changes the result.

    Raises:
        RanksError: they differ.
    """
    if ranks.world > 1:
        ranks.check_same({"checkpoints": _digest_of(run), "options": repr(options)})


def agree_on(plans: Sequence[Plan], ranks: Ranks, *options: object) -> None:
    """The same for plans of one run; where a result goes may have another name on another machine."""
    of_plans = [
        (plan.scheme, plan.dtype, plan.snapshots, plan.path and plan.path.exclude, plan.files) for plan in plans
    ]
    agree(plans[0].run, ranks, of_plans, *options)


def staged(plans: Sequence[Plan], ranks: Ranks, stack: ExitStack) -> list[Staging]:
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
    stagings = [Staging(plan.out, force=plan.force) for plan in plans]
    if ranks.is_first:
        for staging in stagings:
            stack.enter_context(staging)
    if ranks.world > 1:
        stack.enter_context(ranks.as_one())
        marks = ranks.first(lambda: [staging.mark() for staging in stagings])
        if not ranks.is_first:
            for staging, mark in zip(stagings, marks, strict=True):
                staging.wait_for(mark)
    return stagings


def opened(
    plans: Sequence[Plan], stagings: Sequence[Staging], ranks: Ranks, stack: ExitStack
) -> list[dict[int, ShardFiles]]:
    """The weight files of each plan, by the index of the checkpoint after which they are written; open until the stack
    is left. The first process makes them, and the others open what it has made.
    """
    if not ranks.is_first:
        ranks.wait()
    files = [
        {
            index: stack.enter_context(
                ShardFiles(staging.path / out.relative_to(plan.out), plan.weights.shards, create=ranks.is_first)
            )
            for index, out in plan.outputs.items()
        }
        for staging, plan in zip(stagings, plans, strict=True)
    ]
    if ranks.is_first:
        ranks.wait()
    return files


def _digest_of(run: Run) -> str:
    digest = hashlib.sha256()
    for checkpoint in run.checkpoints:
        digest.update(
            repr((checkpoint.step, [(shard.path.name, shard.nbytes) for shard in checkpoint.shards])).encode()
        )
        digest.update(repr(sorted(checkpoint.entries.items())).encode())
    return digest.hexdigest()
