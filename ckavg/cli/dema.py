"""`ckavg dema`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckavg.cli.averaging import averaging_command
from ckavg.schemes import DEMA, Scheme

_DEFAULT = DEMA()


@averaging_command
def dema(
    *,
    kappa: Annotated[float, typer.Option(help="Power κ of the average: 0 does not average.")] = _DEFAULT.kappa,
    multiplier: Annotated[float, typer.Option(help="Weight γ of the step.")] = _DEFAULT.multiplier,
    lag: Annotated[float, typer.Option(help="Lag ρ, added to the step.")] = _DEFAULT.lag,
) -> Scheme:
    """Double EMA: twice an average less its own average, which cancels the lag. Reads every checkpoint once.

    β = (ρ + γ t)^(−κ) in both averages.
    """
    return DEMA(kappa=kappa, multiplier=multiplier, lag=lag)
