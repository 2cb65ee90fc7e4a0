"""Several averages from one reading of the checkpoints and, with an evaluation, the best of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.averaging.best import judged_by
from ckavg.averaging.evaluation import compare_with_last, rank, record_evaluation
from ckavg.averaging.pipeline import carry_out
from ckavg.averaging.plan import Options, plan_averages, result_name
from ckavg.averaging.publish import discard_sent, send_results
from ckavg.averaging.sources import opened
from ckavg.checkpoints.run import Run
from ckavg.checkpoints.trainer_log import Goal
from ckavg.engine.context import Context, OnProgress, listening
from ckavg.errors import EvaluationError, SettingError
from ckavg.output.output_path import path_within
from ckavg.output.plots import averages_figure, require_matplotlib
from ckavg.output.record import Record
from ckavg.path.table import PathLength, data_frame
from ckavg.schemes import Scheme
from ckavg.storage.base import AnyPath

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, slots=True)
class Sweep:
    """The outcome of a sweep: a sequence of its results.

    Attributes:
        results: in the order of the schemes, with their evaluations.
        goal: whether the least or the greatest value is best.
        path: of the checkpoints; None if no scheme needed it.
    """

    results: tuple[Record, ...]
    goal: Goal
    path: PathLength | None

    def __repr__(self) -> str:
        names = ", ".join(each.output.name for each in self.results[:4])
        return f"Sweep({len(self.results)} averages: {names}{', …' if len(self.results) > 4 else ''})"

    def __iter__(self) -> Iterator[Record]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> Record:
        return self.results[index]

    @property
    def best(self) -> Record:
        """The result with the best value, the first of equals.

        Raises:
            EvaluationError: none has a value.
        """
        ranking = rank([each.evaluation for each in self.results], self.goal)
        if ranking is None:
            raise EvaluationError(
                "None of the averages has a value.",
                hint="Pass evaluate to sweep, a function from a directory to a number.",
            )
        return self.results[ranking.best]

    def plot(self) -> Figure:
        """ℓ, β and the weight of every checkpoint, for each average, as a matplotlib figure.

        Raises:
            SettingError: matplotlib is not installed.
        """
        require_matplotlib()
        return averages_figure(self.results, self.path)

    def to_pandas(self) -> DataFrame:
        """A data frame with a row for each average: its value and standard error, its weights, its directory.

        Raises:
            SettingError: pandas is not installed.
        """
        evaluations = [each.evaluation for each in self.results]
        columns: dict[str, Sequence[object]] = {
            "scheme": [each.scheme for each in self.results],
            "value": [each and each.value for each in evaluations],
            "stderr": [each and each.stderr for each in evaluations],
            "effective_count": [each.effective_count for each in self.results],
            "mean_age": [each.mean_age for each in self.results],
            "anchor_weight": [each.anchor_weight for each in self.results],
            "directory": [str(each.directory) for each in self.results],
        }
        return data_frame(columns, index=[each.output.name for each in self.results], index_name="average")


def sweep(
    run: Run | AnyPath | str,
    schemes: Sequence[Scheme],
    *,
    evaluate: Callable[[Path], float | tuple[float, float]] | None = None,
    goal: Goal = "min",
    out: Path | str | None = None,
    device: str = "auto",
    progress: bool | OnProgress = False,
    **options: Any,
) -> Sweep:
    """Form many averages in one reading of the checkpoints; each has the same bytes as with `average`.

    Args:
        run: see `average`.
        schemes: how to average; at least one.
        evaluate: takes the directory of a model; returns its value, or the value and its standard error; NaN: no value.
        goal: `min` if the least value is best, as with a loss; `max` if the greatest is.
        out: the directory for the results, each under its own name; None: `<source>/averaged`.
        device, progress: see `average`.
        options: see `average`: `dtype`, `force` and so on.

    Raises:
        SettingError: there is no scheme, or two are the same; `goal` is neither.
        CkavgError: see `average`. What `evaluate` raises is passed on; the averages stay.
    """
    if not schemes:
        raise SettingError("schemes is empty; it must hold at least one.", hint="For example: [ckavg.PEMA(0.15)]")
    if goal not in ("min", "max"):
        raise SettingError(f"goal is {goal!r}; it must be min or max.")
    run, asked = opened(run), Options(**options)
    home = Path(out) if out is not None else path_within(run.home, "averaged")
    places = [path_within(home, result_name(each, run.selection, asked.lora, asked.rank)) for each in schemes]
    plans = plan_averages([(run, *each) for each in zip(schemes, places, strict=True)], asked)
    with listening(progress, 1 + any(plan.path_bytes for plan in plans)) as on_progress:
        context = Context(device=device, on_progress=on_progress)
        done = carry_out(plans, context)
    records = list(done.records)
    if evaluate is not None:
        judge = judged_by(evaluate, goal)
        for place, (record, plan) in enumerate(zip(done.records, plans, strict=True)):
            records[place] = record_evaluation(record, judge(record, plan), plan)
        for place, evaluation in compare_with_last(records):
            records[place] = record_evaluation(records[place], evaluation, plans[place])
    sent = send_results(plans, records, dataclasses.replace(context, on_progress=None))
    discard_sent(plans)
    return Sweep(sent, goal, next((path for path in done.paths if path is not None), None))
