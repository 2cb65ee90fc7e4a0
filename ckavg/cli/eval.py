"""`ckavg eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckavg.cli.errors import failures
from ckavg.cli.options import Verbose, display, folder
from ckavg.cli.text import print_json


def eval(  # noqa: A001 - the name of the verb
    directory: Annotated[Path, folder("DIR", "Directory of a result, or of a checkpoint.")],
    *,
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text in UTF-8 that no training saw.", readable=False)],
    length: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens of a window.", show_default="1024, or what the model takes"),
    ] = None,
    as_json: Annotated[bool, display("Prints a JSON object, as it does without.", "--json")] = False,
    verbose: Verbose = False,
) -> None:
    """Compute the held-out loss of a causal language model on a text, in nats per token.

    Prints a JSON object with loss, stderr and tokens. Computes in float32 on the CPU, and asks no network. Needs
    transformers, and peft for an adapter.
    """
    with failures(verbose=verbose):
        from ckavg.averaging.held_out import held_out_loss

        print_json(held_out_loss(directory, text, length).to_dict())
