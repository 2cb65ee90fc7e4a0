"""`ckavg mean`."""

from __future__ import annotations

from ckavg.cli.commands import averaging_command
from ckavg.schemes import Mean, Scheme


@averaging_command
def mean() -> Scheme:
    """The plain mean of the checkpoints (SWA; LAWA with --last). Reads every checkpoint once.

    The model given with --init is not among them.
    """
    return Mean()
