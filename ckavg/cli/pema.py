"""`ckavg pema`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ckavg.cli.averaging import averaging_command
from ckavg.schemes import PEMA, Scheme

_DEFAULT = PEMA()


@averaging_command
def pema(
    *,
    gamma: Annotated[
        float, typer.Option(help="Power γ: 0 is the last checkpoint, more averages more.")
    ] = _DEFAULT.gamma,
    scope: Annotated[
        Literal["global", "tensor"], typer.Option(help="One β, or one for each tensor's own path.")
    ] = _DEFAULT.scope,
    pairing: Annotated[
        Literal["same", "next"], typer.Option(help="ℓ up to the checkpoint taken in, or to the one before it.")
    ] = _DEFAULT.pairing,
    clock: Annotated[
        Literal["steps", "updates"], typer.Option(help="T in optimizer steps, or in updates.")
    ] = _DEFAULT.clock,
) -> Scheme:
    """Pathwise EMA: forget by how far the weights travelled, not by how many steps were taken.

    Reads every checkpoint twice: first for the path length ℓ, then for the average with
    β = (1 + T · ℓ(T) · ℓ(t))^(−γ). The one to try first: its power needs no tuning.
    """
    return PEMA(gamma=gamma, scope=scope, pairing=pairing, clock=clock)
