"""Average the saved checkpoints of a training run into one model, without retraining.

    run = ckavg.open_run("./checkpoints")
    path = ckavg.measure_path(run)                      # how far the weights travelled
    result = ckavg.average(run, ckavg.PEMA(gamma=0.15))
    result.directory                                    # loads with from_pretrained
    ckavg.verify_result(result.directory).problems      # nothing, if it is still what it was

Nothing here prints; progress is a callback. torch is imported when weights are read, not before.
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ckavg.errors import CkavgError
from ckavg.schemes import (
    BEMA,
    DEMA,
    EMA,
    OUEMA,
    PEMA,
    Last,
    Mean,
    MomentumEMA,
    PowerEMA,
    PowerExponentEMA,
    Weights,
)

if TYPE_CHECKING:
    from ckavg.averaging.best import Best, best
    from ckavg.averaging.pipeline import average, measure_path
    from ckavg.averaging.plan import plan_average
    from ckavg.averaging.sources import open_run
    from ckavg.checkpoints.run import Run
    from ckavg.engine.context import Progress
    from ckavg.engine.distributed import all_ranks
    from ckavg.hub import Pushed, push_result
    from ckavg.output.record import Record as Averaged
    from ckavg.path.table import PathLength
    from ckavg.verify.findings import Verified
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
    "Last",
    "Mean",
    "MomentumEMA",
    "PathLength",
    "PowerEMA",
    "PowerExponentEMA",
    "Progress",
    "Pushed",
    "Run",
    "Verified",
    "Weights",
    "__version__",
    "all_ranks",
    "average",
    "best",
    "measure_path",
    "open_run",
    "plan_average",
    "push_result",
    "verify_result",
]

_MODULES = {
    "Averaged": "output.record:Record",
    "Best": "averaging.best",
    "PathLength": "path.table",
    "Progress": "engine.context",
    "Pushed": "hub",
    "Run": "checkpoints.run",
    "Verified": "verify.findings",
    "all_ranks": "engine.distributed",
    "average": "averaging.pipeline",
    "best": "averaging.best",
    "measure_path": "averaging.pipeline",
    "open_run": "averaging.sources",
    "plan_average": "averaging.plan",
    "push_result": "hub",
    "verify_result": "verify.verify",
}
"""Where the names are that are imported when they are first used, so that `ckavg --help` need not wait for them."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _MODULES[name].partition(":")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), attribute or name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
