"""The averaging schemes as pure numbers: β and α for every visited checkpoint. One file a scheme.

No torch, no files, no logging: a scheme turns steps and path lengths into float64 coefficients, and names the update
rule that takes them in. The rules themselves are in `ckavg.replay`.
"""

from ckavg.schemes.base import Coefficients, Scheme, Timeline
from ckavg.schemes.bema import BEMA
from ckavg.schemes.ema import EMA
from ckavg.schemes.pema import PEMA

SCHEMES: dict[str, type[Scheme]] = {scheme.name: scheme for scheme in (EMA, PEMA, BEMA)}
"""Every scheme by the name under which it is typed."""

__all__ = ["BEMA", "EMA", "PEMA", "SCHEMES", "Coefficients", "Scheme", "Timeline"]
