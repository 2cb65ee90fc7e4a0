"""`ckavg ouema`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckavg.cli.averaging import averaging_command
from ckavg.schemes import OUEMA, Scheme

_DEFAULT = OUEMA()


@averaging_command
def ouema(
    *,
    eta: Annotated[
        float, typer.Option(help="Power η of the correction: near 0 is the strongest, inf turns it off.")
    ] = _DEFAULT.eta,
    kappa: Annotated[float, typer.Option(help="Power κ of the average: 0 does not average.")] = _DEFAULT.kappa,
    multiplier: Annotated[float, typer.Option(help="Weight γ of the step.")] = _DEFAULT.multiplier,
    lag: Annotated[float, typer.Option(help="Lag ρ, added to the step.")] = _DEFAULT.lag,
) -> Scheme:
    """Ornstein–Uhlenbeck EMA: corrects every checkpoint for the pull of the start, then averages.

    Reads every checkpoint once. β and α as in bema.
    """
    return OUEMA(eta=eta, kappa=kappa, multiplier=multiplier, lag=lag)
