"""`--part`: what is said of a part of an average that is done by itself."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckavg.cli.text import Output, print_json, print_places
from ckavg.errors import SettingError, listed, printable

if TYPE_CHECKING:
    from ckavg.averaging.plan import Plan
    from ckavg.cli.options import Averaging
    from ckavg.engine.distributed import Ranks

_FOR_JOIN = {
    "eval_command": "--eval",
    "eval_run": "--eval-run",
    "csv": "--csv",
    "plot": "--plot",
    "report": "--report",
    "push_to_hub": "--push-to-hub",
}


def ranks_of_part(options: Averaging, ranks: Ranks) -> Ranks:
    """The processes as `--part` says; as they are without it.

    Raises:
        SettingError: it is no part, or does not go with what else is asked.
    """
    if options.part is None:
        if options.wait:
            raise SettingError("--wait is of --part.", hint="Leave it out.")
        return ranks
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", options.part, re.ASCII)
    part, count = (int(each) for each in found.groups()) if found else (0, 0)
    if part >= count:
        raise SettingError(
            f"--part is {options.part!r}; it must be I/N, with I from 0 to N − 1.", hint="For example: --part 0/4"
        )
    if ranks.world > 1:
        raise SettingError(
            "--part is for processes that do not know of each other, and RANK and WORLD_SIZE are set.",
            hint="Leave out --part, or begin with: env -u RANK ckavg …",
        )
    later = [name for field, name in _FOR_JOIN.items() if getattr(options, field)]
    if later:
        raise SettingError(f"{listed(later)}: a part has no result yet.", hint="Give it to ckavg join instead.")
    return dataclasses.replace(ranks, rank=part, world=count, mode="part", waits=options.wait)


def print_part(plan: Plan, missing: Sequence[int], options: Averaging, ranks: Ranks) -> None:
    """Say that a part is finished, and what comes next.

    Args:
        plan: of the average.
        missing: the parts that are not finished.
        options: of the verb.
        ranks: which part this was.
    """
    is_complete = plan.current is not None
    if options.as_json:
        told = {"part": ranks.rank, "parts": ranks.world, "missing": list(missing), "result": str(plan.out)}
        print_json(told | ({"up_to_date": True} if is_complete else {}))
    elif options.quiet:
        print_places([plan.out] if is_complete else [])
    else:
        out, place = Output(), printable(shlex.quote(str(plan.out)))
        if is_complete:
            out.line(f"{place} is up to date")
        elif missing:
            others = listed([f"{part}/{ranks.world}" for part in missing])
            out.line(f"part {ranks.rank}/{ranks.world} is finished, not yet: {others}")
        else:
            out.line(f"all parts are finished: ckavg join {place}")
