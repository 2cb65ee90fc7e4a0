"""The averaging schemes as pure numbers: β and α for every visited checkpoint. One file a scheme.

No torch, no files, no logging: a scheme turns steps and path lengths into float64 coefficients, and names the update
rule that uses them. The rules are in `averaging/rules.py`.
"""

from ckavg.schemes.base import Coefficients, Scheme, Timeline
from ckavg.schemes.bema import BEMA
from ckavg.schemes.dema import DEMA
from ckavg.schemes.ema import EMA
from ckavg.schemes.mean import Last, Mean
from ckavg.schemes.momentum import MomentumEMA, scaled_momentum
from ckavg.schemes.ouema import OUEMA
from ckavg.schemes.pema import PEMA
from ckavg.schemes.power import PowerEMA, PowerExponentEMA
from ckavg.schemes.weights import Weights

SCHEMES: tuple[type[Scheme], ...] = (
    PEMA, BEMA, EMA, MomentumEMA, PowerEMA, PowerExponentEMA, OUEMA, DEMA, Mean, Weights, Last,
)  # fmt: skip
"""All schemes, in the order in which commands are shown. Commands and their options are made from it."""

__all__ = [
    "BEMA",
    "DEMA",
    "EMA",
    "OUEMA",
    "PEMA",
    "SCHEMES",
    "Coefficients",
    "Last",
    "Mean",
    "MomentumEMA",
    "PowerEMA",
    "PowerExponentEMA",
    "Scheme",
    "Timeline",
    "Weights",
    "scaled_momentum",
]
