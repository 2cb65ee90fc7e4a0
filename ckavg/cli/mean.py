"""`ckavg mean`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ckavg.cli.averaging import averaging_command
from ckavg.schemes import Mean, Scheme

_DEFAULT = Mean()


@averaging_command
def mean(
    *,
    decay: Annotated[
        Literal["none", "linear", "cosine", "minus-sqrt"],
        typer.Option(help="Weights that stand for a learning-rate decay over the checkpoints."),
    ] = _DEFAULT.decay,
) -> Scheme:
    """The mean of the checkpoints (SWA; LAWA with --last; WSM with --decay). Reads every checkpoint once.

    The model given with --init is not among them.
    """
    return Mean(decay=decay)
