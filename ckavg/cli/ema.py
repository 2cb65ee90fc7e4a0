"""`ckavg ema`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ckavg.cli.averaging import averaging_command
from ckavg.errors import SettingError
from ckavg.schemes import EMA, MomentumEMA, Scheme

_DEFAULT = EMA()
_MOMENTUM = MomentumEMA()


@averaging_command
def ema(
    *,
    gamma: Annotated[
        float, typer.Option(help="Power γ: 0 is the last checkpoint, more averages more.")
    ] = _DEFAULT.gamma,
    tau: Annotated[float, typer.Option(help="Offset τ in optimizer steps.")] = _DEFAULT.tau,
    momentum: Annotated[
        float | None, typer.Option(help="A constant momentum ρ instead of the power.", show_default="none")
    ] = None,
    momentum_per: Annotated[
        Literal["step", "update"], typer.Option(help="The momentum is per optimizer step, or per checkpoint.")
    ] = _MOMENTUM.momentum_per,
    batch_scale: Annotated[
        float, typer.Option(help="κ: by how much the batch is larger than that of ρ; uses ρ^κ.")
    ] = _MOMENTUM.batch_scale,
) -> Scheme:
    """EMA with a power schedule, β = (age + τ)^(−γ): the baseline. Reads every checkpoint once.

    With --momentum, β = 1 − ρ^(κ Δ) between checkpoints Δ optimizer steps apart.
    """
    asked_for_power = (gamma, tau) != (_DEFAULT.gamma, _DEFAULT.tau)
    if momentum is None:
        if (momentum_per, batch_scale) != (_MOMENTUM.momentum_per, _MOMENTUM.batch_scale):
            raise SettingError("ema: --momentum-per and --batch-scale go with --momentum.")
        return EMA(gamma=gamma, tau=tau)
    if asked_for_power:
        raise SettingError("ema: --gamma and --tau do not go with --momentum.", hint="Choose one of the two schedules.")
    return MomentumEMA(momentum=momentum, momentum_per=momentum_per, batch_scale=batch_scale)
