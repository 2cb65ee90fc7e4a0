"""One cell of the language-model study: a fine-tuning run, its averages at several intervals, their held-out losses."""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import ckavg
from benchmarks.evidence.language_model_judge import Judge
from benchmarks.evidence.saved import open_saved
from benchmarks.finetune import FineTuning, fine_tune, quiet_transformers, windows_to_judge
from ckavg.averaging.pipeline import carry_out
from ckavg.averaging.plan import Options, plan_averages
from ckavg.engine.context import Context
from ckavg.path.table import PathLength
from ckavg.schemes import Scheme, Timeline

SCHEMES: Mapping[str, Scheme] = {
    "PEMA 0.10": ckavg.PEMA(gamma=0.10),
    "PEMA 0.15": ckavg.PEMA(gamma=0.15),
    "PEMA 0.20": ckavg.PEMA(gamma=0.20),
    "PEMA 0.30": ckavg.PEMA(gamma=0.30),
    "EMA 0.05": ckavg.EMA(gamma=0.05),
    "EMA 0.10": ckavg.EMA(gamma=0.10),
    "EMA 0.15": ckavg.EMA(gamma=0.15),
    "EMA 0.20": ckavg.EMA(gamma=0.20),
    "BEMA 0.2, 0.5": ckavg.BEMA(),
    "BEMA 0.4, 0.5": ckavg.BEMA(eta=0.4),
    "EMA κ 0.5": ckavg.EMA(gamma=0.5, tau=10.0),
    "DEMA": ckavg.DEMA(),
    "OUEMA": ckavg.OUEMA(),
    "mean": ckavg.Mean(),
}
"""The averages evaluated at every interval; BEMA by η and κ. `EMA κ 0.5` is BEMA's average without its correction."""

PER_TENSOR = "PEMA 0.15 by tensor"
"""Evaluated only at the shortest interval."""

BASE, LAST = "base", "last"

_AT_ONCE = 4
"""Averages on the disk at the same time, 0.5 GB each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The settings of one run.

    Attributes:
        learning_rate: the peak rate.
        minimum: end of the cosine, as a fraction of the peak rate; 1 keeps the rate constant.
        batch: windows of 128 tokens per step.
        seed: of the order of the text.
    """

    learning_rate: float
    minimum: float = 1.0
    batch: int = 2
    seed: int = 0

    @property
    def label(self) -> str:
        """All of it, as the name of a file.

        >>> Cell(learning_rate=8e-4, seed=2).label
        'rate 0.0008, minimum 1, batch 2, seed 2'
        """
        return f"rate {self.learning_rate:g}, minimum {self.minimum:g}, batch {self.batch}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Its name in tables, without the settings that most runs share.

        >>> Cell(learning_rate=8e-4, minimum=0.1, seed=2).name, Cell(learning_rate=3e-4, batch=256).name
        ('0.0008 to 10 %, seed 2', '0.0003, batch 256')
        """
        falls = "" if self.minimum == 1 else f" to {100 * self.minimum:g} %"
        batch = "" if self.batch == type(self)(learning_rate=self.learning_rate).batch else f", batch {self.batch}"
        return f"{self.learning_rate:g}{falls}{batch}" + (f", seed {self.seed}" if self.seed else "")


CELLS = (
    Cell(learning_rate=8e-4),
    Cell(learning_rate=8e-4, batch=4),
    Cell(learning_rate=3e-4),
    Cell(learning_rate=8e-4, seed=1),
    Cell(learning_rate=2e-3),
    Cell(learning_rate=8e-4, minimum=0.1),
    Cell(learning_rate=8e-4, seed=2),
)
"""In the order of execution, so that a run that is cut short covers something of everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all cells have in common.

    Attributes:
        steps: optimizer steps of a run.
        warm_up: steps over which the rate rises.
        frequencies: steps between averaged checkpoints; the run is saved at the first, which divides the others.
        windows: number of held-out windows of 128 tokens.
        device: for training, averaging and evaluation.
        cells: the runs.
    """

    steps: int = 80
    warm_up: int = 8
    frequencies: tuple[int, ...] = (4, 8, 16)
    windows: int = 12
    device: Literal["cpu", "cuda"] = "cpu"
    cells: tuple[Cell, ...] = field(default=CELLS)


PAPERS = Setting(
    steps=1800,
    warm_up=100,
    frequencies=(50, 100, 300),
    windows=512,
    device="cuda",
    cells=tuple(
        Cell(learning_rate=rate, minimum=minimum, batch=256)
        for rate, minimum in itertools.product((2e-3, 1e-3, 5e-4, 2e-4), (1.0, 0.1))
    )
    + tuple(Cell(learning_rate=2e-3, batch=256, seed=seed) for seed in (1, 2)),
)
"""The size of Pathwise EMA's runs of SmolLM2-135M (its Table 1), for one GPU."""


class Judging(Protocol):
    """Evaluates a model."""

    def losses(self, checkpoint: Path) -> list[float]:
        """The loss of a model on each of some pieces of text, in nats per token."""
        ...


@dataclass(slots=True)
class Outcome:
    """The outcome of a cell.

    Attributes:
        cell: the run.
        losses: of each window in nats per token, by interval and name; interval 0 for checkpoints.
        paths: statistics of the path by interval; see `path_of`.
        tensor_paths: ℓ_p at the end, by tensor, at the shortest interval.
        seconds: wall-clock time of training, averaging and judging.
    """

    cell: Cell
    losses: dict[tuple[int, str], list[float]] = field(default_factory=dict)
    paths: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    tensor_paths: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "average": 0.0, "judge": 0.0})

    def loss(self, name: str, every: int = 0) -> float:
        """Mean over the windows, nats per token."""
        return statistics.fmean(self.losses[every, name])


def path_of(path: PathLength) -> dict[str, list[float]]:
    """Step, ℓ, β of PEMA and EMA with γ = 0.15, and the spread over the tensors, at every checkpoint but the anchor.

    `spread` is the standard deviation of ℓ_p over the tensors relative to their mean; `uneven` is that of ℓ_p relative
    to the tensor's whole path, on which alone the β of single tensors depends.
    """
    timeline = Timeline(path.steps, path.lengths)
    betas = {
        name: [beta for beta in SCHEMES[name].coefficients(timeline).betas if beta is not None]
        for name in ("PEMA 0.15", "EMA 0.15")
    }
    of_tensors = [path.tensor_lengths(name)[1:] for name in path.counted]
    shares = [[length / lengths[-1] for length in lengths] for lengths in of_tensors if lengths[-1] > 0]
    return {
        "step": list(path.steps[1:]),
        "path_length": list(path.lengths[1:]),
        **betas,
        "spread": [spread(at_once) for at_once in zip(*of_tensors, strict=True)],
        "uneven": [spread(at_once) for at_once in zip(*shares, strict=True)],
    }


def spread(values: Sequence[float]) -> float:
    """Standard deviation over mean."""
    return statistics.stdev(values) / statistics.fmean(values)


def carry_out_cell(cell: Cell, setting: Setting) -> Outcome:
    """Train, average and evaluate one cell in a temporary directory.

    Args:
        cell: the run.
        setting: common to all cells.
    """
    with tempfile.TemporaryDirectory(prefix="ckavg-evidence-") as scratch:
        directory, outcome = Path(scratch), Outcome(cell)
        begun = time.perf_counter()
        fine_tune(directory, fine_tuning(cell, setting))
        outcome.seconds["train"] = time.perf_counter() - begun
        tokenizer = quiet_transformers().AutoTokenizer.from_pretrained(directory / "base", local_files_only=True)
        windows = windows_to_judge(tokenizer, setting.windows)
        judge = Judge(directory / "base", windows, device=setting.device)
        judge_all(directory, setting, judge, outcome)
    return outcome


def fine_tuning(cell: Cell, setting: Setting) -> FineTuning:
    """The cell as the settings of a fine-tuning."""
    return FineTuning(
        steps=setting.steps,
        every=setting.frequencies[0],
        learning_rate=cell.learning_rate,
        schedule="constant" if cell.minimum == 1 else "cosine",
        minimum=cell.minimum,
        warm_up=setting.warm_up,
        batch=cell.batch,
        seed=cell.seed,
        device=setting.device,
    )


def judge_all(directory: Path, setting: Setting, judge: Judging, outcome: Outcome) -> None:
    """Evaluate the base and the last checkpoint of the run in `directory`, then all averages at all intervals."""
    outcome.losses[0, BASE] = judge.losses(directory / "base")
    outcome.losses[0, LAST] = judge.losses(directory / "run" / f"checkpoint-{setting.steps}")
    for every in setting.frequencies:
        schemes = dict(SCHEMES)
        if every == setting.frequencies[0]:
            schemes[PER_TENSOR] = ckavg.PEMA(scope="tensor")
        names = list(schemes)
        for begin in range(0, len(names), _AT_ONCE):
            some = {name: schemes[name] for name in names[begin : begin + _AT_ONCE]}
            _judge_some(directory, every, some, judge, outcome, device=setting.device)


def _judge_some(
    directory: Path, every: int, schemes: Mapping[str, Scheme], judge: Judging, outcome: Outcome, *, device: str
) -> None:
    """Average by some schemes from one reading, evaluate each, and remove them; the first call measures the path."""
    begun = time.perf_counter()
    run = open_saved(directory, every=every)
    averages = directory / "averages"
    # In float32, so that similar averages do not differ by rounding.
    plans = plan_averages(
        [(run, scheme, averages / name) for name, scheme in schemes.items()], Options(dtype="float32")
    )
    done = carry_out(plans, Context(device=device))
    path = next(filter(None, done.paths), None)
    if path is not None and every not in outcome.paths:
        outcome.paths[every] = path_of(path)
        if not outcome.tensor_paths:
            outcome.tensor_paths = {name: path.tensor_lengths(name)[-1] for name in path.counted}
    averaged = time.perf_counter()
    for name in schemes:
        outcome.losses[every, name] = judge.losses(averages / name)
    shutil.rmtree(averages)
    outcome.seconds["average"] += averaged - begun
    outcome.seconds["judge"] += time.perf_counter() - averaged
