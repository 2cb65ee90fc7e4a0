"""Average the saved checkpoints of a training run into one model, without retraining.

    run = ckavg.open_run("checkpoints")                     # or "hf://owner/name"
    ckavg.path_length(run).plot()                           # how far the weights moved
    ckavg.effective_weights(run, ckavg.PEMA(0.15))          # {step: weight}, without averaging
    result = ckavg.average(run, ckavg.PEMA(0.15), progress=True)
    result.directory                                        # loads with from_pretrained
    ckavg.verify_result(result).problems                    # empty if the result is intact

Every function that takes a run also takes its directory or address. Nothing here prints, except with `progress=True`.
torch is imported only when weights are read.
"""

__version__ = "0.1.0"

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ckavg.errors import CkavgError
from ckavg.schemes import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    PEMA,
    Coefficients,
    Last,
    Mean,
    MomentumEMA,
    PowerEMA,
    PowerExponentEMA,
    Scheme,
    Timeline,
    Weights,
)

if TYPE_CHECKING:
    from ckavg.averaging.best import Best, best
    from ckavg.averaging.pipeline import average, path_length
    from ckavg.averaging.plan import plan_average
    from ckavg.averaging.sources import open_run
    from ckavg.averaging.sweep import Sweep, sweep
    from ckavg.averaging.tensors import average_tensors, effective_weights
    from ckavg.checkpoints.run import Run
    from ckavg.cli.progress import show_progress as show_progress
    from ckavg.engine.context import Progress
    from ckavg.engine.distributed import all_ranks
    from ckavg.hub import Pushed
    from ckavg.hub import push_result as push
    from ckavg.output.plots import path_figure as path_figure
    from ckavg.output.record import Record as Averaged
    from ckavg.path.table import PathLength
    from ckavg.verify.findings import Verified
    from ckavg.verify.inspect import Inspected, inspect
    from ckavg.verify.verify import verify_result

__all__ = [
    "BEMA",
    "DEMA",
    "EMA",
    "OUEMA",
    "PEMA",
    "Averaged",
    "Best",
    "CkavgError",
    "Coefficients",
    "Inspected",
    "Last",
    "Mean",
    "MomentumEMA",
    "PathLength",
    "PowerEMA",
    "PowerExponentEMA",
    "Progress",
    "Pushed",
    "Run",
    "Scheme",
    "Sweep",
    "Timeline",
    "Verified",
    "Weights",
    "__version__",
    "all_ranks",
    "average",
    "average_tensors",
    "best",
    "effective_weights",
    "inspect",
    "open_run",
    "path_length",
    "plan_average",
    "push",
    "sweep",
    "verify_result",
]

_MODULES = {
    "Averaged": "output.record:Record",
    "Best": "averaging.best",
    "Inspected": "verify.inspect",
    "PathLength": "path.table",
    "Progress": "engine.context",
    "Pushed": "hub",
    "Run": "checkpoints.run",
    "Sweep": "averaging.sweep",
    "Verified": "verify.findings",
    "all_ranks": "engine.distributed",
    "average": "averaging.pipeline",
    "average_tensors": "averaging.tensors",
    "best": "averaging.best",
    "effective_weights": "averaging.tensors",
    "inspect": "verify.inspect",
    "open_run": "averaging.sources",
    "path_length": "averaging.pipeline",
    "plan_average": "averaging.plan",
    "push": "hub:push_result",
    "sweep": "averaging.sweep",
    "verify_result": "verify.verify",
}
"""The modules of names that are imported on first use, so that `ckavg --help` is fast."""


_INTERNAL = {
    "path_figure": "output.plots",
    "show_progress": "cli.progress",
}
"""Functions of later rooms that methods in earlier rooms call."""

_OLD = {"measure_path": "path_length", "push_result": "push"}
"""Deprecated names, to be removed in the next version."""


def __getattr__(name: str) -> Any:
    if name in _OLD:
        new = _OLD[name]
        warnings.warn(f"ckavg.{name} is now ckavg.{new}.", DeprecationWarning, stacklevel=2)
        return globals()[new] if new in globals() else __getattr__(new)
    known = _MODULES | _INTERNAL
    if name not in known:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = known[name].partition(":")
    value = getattr(import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
