"""`ckavg ema`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckavg.cli.commands import averaging_command
from ckavg.schemes import EMA, Scheme

_DEFAULT = EMA()


@averaging_command
def ema(
    *,
    gamma: Annotated[
        float, typer.Option(help="Power γ: 0 is the last checkpoint, more averages more.")
    ] = _DEFAULT.gamma,
    tau: Annotated[float, typer.Option(help="Offset τ in optimizer steps.")] = _DEFAULT.tau,
) -> Scheme:
    """EMA with a power schedule, β = (age + τ)^(−γ): the baseline. Reads every checkpoint once."""
    return EMA(gamma=gamma, tau=tau)
