"""Study: all schemes on a fine-tuned language model; `python -m benchmarks.evidence.language_model`.

SmolLM2-135M on Shakespeare, over learning rates, schedules and seeds, evaluated on held-out plays. Two runs at a time,
each with one thread of torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial

from benchmarks.evidence.language_model_figures import draw_all
from benchmarks.evidence.language_model_run import BASE, LAST, PAPERS, Outcome, Setting, carry_out_cell
from benchmarks.evidence.language_model_tables import seconds_of, tables_of
from benchmarks.evidence.processes import single_threaded
from benchmarks.evidence.tables import RESULTS, ROOT, publish, write_record
from benchmarks.finetune import TO_TRAIN, RefusedError, refuse_missing


def outcomes(setting: Setting, *, processes: int) -> list[Outcome]:
    """All cells in order, this many at a time."""
    found = []
    with single_threaded(processes) as pool:
        for outcome in pool.map(partial(carry_out_cell, setting=setting), setting.cells):
            told = f"base {outcome.loss(BASE):.4f}, last {outcome.loss(LAST):.4f}"
            print(f"{outcome.cell.label}: {told}, {sum(outcome.seconds.values()) / 60:.1f} minutes", flush=True)
            found.append(outcome)
    return found


def main(arguments: Sequence[str] = ()) -> int:
    """Run it, then write tables, figures and settings."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.language_model", description=__doc__)
    parser.add_argument("--papers", action="store_true", help="the size of the papers' runs, on one GPU")
    parser.add_argument("--processes", type=int, help="runs at a time; default: 2, on a GPU 1")
    options = parser.parse_args(arguments)
    setting = PAPERS if options.papers else Setting()
    results = ROOT / "build" / "evidence" / "papers" if options.papers else RESULTS
    try:
        refuse_missing(TO_TRAIN)
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = outcomes(setting, processes=options.processes or (1 if options.papers else 2))
    publish(tables_of(setting, found), results)
    draw_all(setting, found, results)
    if not options.papers:  # the document describes the small study alone
        write_record("language_model", dataclasses.asdict(setting) | {"seconds": seconds_of(found)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
