"""`ckavg sweep`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckavg.cli.commands import sweeping_command


@sweeping_command
def sweep(
    *,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[SOURCE] SCHEME...",
            help="Schemes with values to try, such as pema:gamma=0.1,0.15 bema:eta=0.2 mean.",
        ),
    ],
) -> None:
    """Form many averages from one reading of the checkpoints: every value of every scheme.

    Each result is the same to the byte as that of the scheme's own command.
    """
