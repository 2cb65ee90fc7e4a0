"""Average the saved checkpoints of a training run into one model, without retraining.

    run = ckavg.open_run("./checkpoints")
    path = ckavg.measure_path(run)                      # how far the weights travelled
    result = ckavg.average(run, ckavg.PEMA(gamma=0.15))
    result.directory                                    # loads with from_pretrained
    ckavg.verify_result(result.directory).problems      # nothing, if it is still what it was

Nothing here prints; progress is a callback. torch is imported when weights are read, not before.
"""

__version__ = "0.1.0"

from ckavg.averaging.pipeline import average, measure_path
from ckavg.averaging.plan import plan_average
from ckavg.checkpoints.run import Run
from ckavg.engine.context import Progress
from ckavg.engine.distributed import all_ranks
from ckavg.errors import CkavgError
from ckavg.hub import Pushed, push_result
from ckavg.output.record import Record
from ckavg.path.table import PathLength
from ckavg.schemes import BEMA, DEMA, EMA, OUEMA, PEMA, Last, Mean, MomentumEMA
from ckavg.sources import open_run
from ckavg.verify.findings import Verified
from ckavg.verify.verify import verify_result

Averaged = Record

__all__ = [
    "BEMA",
    "DEMA",
    "EMA",
    "OUEMA",
    "PEMA",
    "Averaged",
    "CkavgError",
    "Last",
    "Mean",
    "MomentumEMA",
    "PathLength",
    "Progress",
    "Pushed",
    "Run",
    "Verified",
    "__version__",
    "all_ranks",
    "average",
    "measure_path",
    "open_run",
    "plan_average",
    "push_result",
    "verify_result",
]
