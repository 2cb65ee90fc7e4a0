"""Stage *report*: what `verify` shows."""

from __future__ import annotations

from ckavg.report.console import print_json, quoted, stdout_console
from ckavg.report.text import as_bytes
from ckavg.verify.findings import Verified

_TITLES = {
    "record": "its numbers follow from each other",
    "files": "nothing is missing or changed",
    "weights": "they load, and none is NaN",
    "sources": "the checkpoints are those that were averaged",
    "replay": "computed again from the checkpoints",
}


def print_verified(verified: Verified, *, as_json: bool, quiet: bool) -> None:
    """Print what was checked, then warnings and problems, then the verdict.

    Args:
        verified: what came of it.
        as_json: one JSON object instead.
        quiet: problems alone.
    """
    if as_json:
        print_json(verified.to_dict())
        return
    console = stdout_console()
    if not quiet:
        console.print(quoted(str(verified.result)), style="bold", soft_wrap=True)
        console.print(quoted(verified.title), soft_wrap=True)
        console.print()
        wrong = {each.check for each in verified.findings if each.is_problem}
        for check in verified.checks:
            told = "see below" if check in wrong else _TITLES[check]
            line = f"{check:8} {'WRONG' if check in wrong else 'ok':5}  {told}{_measured(verified, check)}"
            console.print(quoted(line), soft_wrap=True)
        for warning in verified.warnings:
            console.print()
            console.print(quoted(f"warning: {warning}"), style="yellow", soft_wrap=True)
    for problem in verified.problems:
        console.print("" if quiet else "\n", end="")
        console.print("problem: ", style="bold red", end="")
        for line in problem.splitlines():
            console.print(quoted(line), soft_wrap=True)
    if not quiet:
        console.print()
        console.print(quoted(_verdict(verified)), soft_wrap=True)


def _measured(verified: Verified, check: str) -> str:
    if check == "files":
        return f" ({verified.files} files)"
    if check != "replay" or not verified.elements:
        return ""
    apart = f"at most {verified.largest_deviation:.2f} units in the last place apart"
    return f" ({verified.elements:,} elements, {apart}, seed {verified.seed})"


def _verdict(verified: Verified) -> str:
    read = f"Read {as_bytes(verified.bytes_read)} in {verified.seconds:.1f} s."
    if not verified.problems:
        return f"All as recorded. {read}"
    count = len(verified.problems)
    return f"{count} problem{'s' if count > 1 else ''}: this result is not what its record says. {read}"
