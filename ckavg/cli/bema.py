"""`ckavg bema`."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import typer

from ckavg.cli.averaging import averaging_command
from ckavg.schemes import BEMA, Scheme

_DEFAULT = BEMA()


@averaging_command
def bema(
    *,
    eta: Annotated[
        float, typer.Option(help="Power η of the correction: 0 is the strongest, inf turns it off.")
    ] = _DEFAULT.eta,
    kappa: Annotated[float, typer.Option(help="Power κ of the average: 0 does not average.")] = _DEFAULT.kappa,
    multiplier: Annotated[float, typer.Option(help="Weight γ of the step.")] = _DEFAULT.multiplier,
    lag: Annotated[float, typer.Option(help="Lag ρ, added to the step.")] = _DEFAULT.lag,
    burn_in: Annotated[
        int, typer.Option(metavar="N", help="Begin at the first checkpoint at or after step N.")
    ] = _DEFAULT.burn_in,
    form: Annotated[
        Literal["paper", "author"], typer.Option(help="Schedule of the paper, or of the authors' offline code.")
    ] = _DEFAULT.form,
    no_bias_correction: Annotated[
        bool, typer.Option("--no-bias-correction", help="Leave the correction out: --eta inf.")
    ] = False,
) -> Scheme:
    """Bias-corrected EMA: an average that does not lag behind. Reads every checkpoint once.

    β = (ρ + γ t)^(−κ) averages; α = (ρ + γ t)^(−η) then adds α (θ_t − θ_0).
    """
    eta = math.inf if no_bias_correction else eta
    return BEMA(eta=eta, kappa=kappa, multiplier=multiplier, lag=lag, burn_in=burn_in, form=form)
