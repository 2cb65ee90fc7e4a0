"""Study: all schemes on a fine-tuned language model; `python -m benchmarks.evidence.language_model`.

SmolLM2-135M on Shakespeare, over learning rates, schedules and seeds, judged on plays that no run has seen. Runs are
carried out two at a time, each with one thread of torch. What is finished is kept in `build/evidence`, so that an
interrupted study goes on with the next run; `--anew` begins again.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.evidence.language_model_figures import draw_all
from benchmarks.evidence.language_model_run import BASE, LAST, PAPERS, Cell, Outcome, Setting, carry_out_cell
from benchmarks.evidence.language_model_tables import seconds_of, tables_of
from benchmarks.evidence.processes import single_threaded
from benchmarks.evidence.tables import ROOT, publish, write_record
from benchmarks.finetune import TO_TRAIN, RefusedError, refuse_missing

KEPT = ROOT / "build" / "evidence"


def kept(cell: Cell, setting: Setting, directory: Path) -> Outcome | None:
    """What was found for a cell before; None where it is not there, not finished, or of another setting."""
    file = directory / f"{cell.label}.json"
    return Outcome.from_json(file.read_text(encoding="utf-8"), setting) if file.is_file() else None


def _carry_out(cell: Cell, setting: Setting, directory: Path) -> Outcome:
    """In a process of its own: one cell, kept as it comes."""
    file = directory / f"{cell.label}.json"

    def keep(outcome: Outcome) -> None:
        file.write_text(outcome.to_json(setting), encoding="utf-8")
        print(f"{cell.label}: {len(outcome.losses)} losses", flush=True)

    return carry_out_cell(cell, setting, keep)


def outcomes(setting: Setting, directory: Path, *, processes: int) -> list[Outcome]:
    """All cells in order, those that are not there carried out first, so many at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    to_do = [cell for cell in setting.cells if kept(cell, setting, directory) is None]
    with single_threaded(processes) as pool:
        for outcome in pool.map(partial(_carry_out, setting=setting, directory=directory), to_do):
            told = f"base {outcome.loss(BASE):.4f}, last {outcome.loss(LAST):.4f}"
            print(f"{outcome.cell.label}: {told}, {sum(outcome.seconds.values()) / 60:.1f} minutes", flush=True)
    found = (kept(cell, setting, directory) for cell in setting.cells)
    return [outcome for outcome in found if outcome is not None]


def main(arguments: Sequence[str] = ()) -> int:
    """Carry it out, then write tables, figures and settings."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.language_model", description=__doc__)
    parser.add_argument("--anew", action="store_true", help="forget what an earlier study has finished")
    parser.add_argument("--papers", action="store_true", help="the size of the papers' runs, on one GPU")
    parser.add_argument("--processes", type=int, help="runs at a time; default: 2, on a GPU 1")
    options = parser.parse_args(arguments)
    setting, directory = (PAPERS, KEPT / "papers") if options.papers else (Setting(), KEPT / "language_model")
    try:
        refuse_missing(TO_TRAIN)
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.anew:
        shutil.rmtree(directory, ignore_errors=True)
    found = outcomes(setting, directory, processes=options.processes or (1 if options.papers else 2))
    tables = tables_of(setting, found)
    if options.papers:  # the document tells of the small study alone
        for table in tables:
            table.write(directory)
        draw_all(setting, found, directory)
    else:
        publish(tables)
        draw_all(setting, found)
        write_record("language_model", dataclasses.asdict(setting) | {"seconds": seconds_of(found)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
