"""Stage *report*: what `push` shows."""

from __future__ import annotations

from ckavg.hub import Pushed
from ckavg.report.console import print_json, quoted, stdout_console
from ckavg.report.text import as_bytes


def print_pushed(pushed: Pushed, *, as_json: bool, quiet: bool = False) -> None:
    """Print where the result can be looked at, or one JSON object."""
    if as_json:
        print_json(pushed.to_dict())
    elif not quiet:
        console = stdout_console()
        told = f"{len(pushed.files)} files, {as_bytes(pushed.bytes)}, commit {pushed.commit[:8]}"
        console.print(quoted(f"uploaded {told}"), soft_wrap=True)
        console.print(quoted(f"url      {pushed.url}"), soft_wrap=True)
