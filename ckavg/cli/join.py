"""`ckavg join`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ckavg.averaging.parts import find_parts, plan_of_parts
from ckavg.cli.average import carry_out_shown, check_files, finish
from ckavg.cli.errors import distributed
from ckavg.cli.evaluation import criterion_from
from ckavg.cli.options import Averaging, folder, with_options
from ckavg.cli.push import destination_of
from ckavg.cli.text import warn_of
from ckavg.engine.distributed import Ranks
from ckavg.hub import check_access

_TAKEN = {
    *("eval_command", "eval_metric", "eval_goal", "eval_stderr", "eval_again", "eval_run", "csv", "report", "plot"),
    *("push_to_hub", "private", "revision", "commit_message", "create_pr", "as_json", "quiet", "verbose"),
}
"""Options that are about a result that is there; all others are those of its parts."""


@dataclass(frozen=True, slots=True)
class Joining(Averaging):
    """The options of `join`."""

    result: Annotated[Path, folder("RESULT", "Where the result goes.", readable=False)] = dataclasses.field(
        kw_only=True
    )


@with_options(Joining, without=tuple(each.name for each in dataclasses.fields(Averaging) if each.name not in _TAKEN))
def join(options: Joining) -> None:
    """Put the parts of an average together that were done with --part.

    All of them must be finished. Reads no checkpoint: hashes the weight files, writes record and card, and gives the
    result its name.
    """
    with distributed(verbose=options.verbose):
        criterion, destination = criterion_from(options), destination_of(options)
        directory, parts = find_parts(options.result)
        plan = plan_of_parts(directory, parts, plot=options.plots_weights)
        check_files(options, plan.run)
        if destination is not None:
            check_access(destination, plan.files)
        warn_of(plan.warnings)
        as_parts = dataclasses.replace(options, source=Path(parts.source), out=plan.out, device=parts.device)
        done = carry_out_shown([plan], as_parts, Ranks(world=parts.count, mode="join"))
        finish(done, [plan], as_parts, criterion, destination)
