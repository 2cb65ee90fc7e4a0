"""Study: averages in place of a learning-rate decay in pretraining; `python -m benchmarks.evidence.pretraining`.

Losses are on held-out text, in nats per byte. Runs of one seed share their beginning, so differences are taken within a
seed, with the standard error over the seeds.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import ckavg
from benchmarks.evidence.figures import Curve, Panel, draw
from benchmarks.evidence.pretraining_run import DECAYS, Setting, train
from benchmarks.evidence.processes import single_threaded
from benchmarks.evidence.tables import Cell, Difference, Table, publish, write_record
from ckavg.demo import held_out_loss
from ckavg.schemes import Scheme
from ckavg.schemes.mean import Decay

LAST = "last"
OTHERS: Mapping[str, Scheme] = {
    "EMA γ 0.15": ckavg.EMA(),
    "PEMA γ 0.15": ckavg.PEMA(),
    "PEMA γ 0.3": ckavg.PEMA(gamma=0.3),
    "EMA κ 0.5": ckavg.EMA(gamma=0.5, tau=10.0),
    "BEMA": ckavg.BEMA(),
}
"""Averages of the whole run, from its random first checkpoint on."""

Losses = Mapping[str, Sequence[float]]
"""Held-out loss of each seed, in nats per byte, by what was judged."""


def merged(decay: str, window: int) -> str:
    return f"merged {decay} {window}"


def decayed(decay: str, window: int) -> str:
    return f"decayed {decay} {window}"


def burnt_in(window: int) -> str:
    return f"BEMA from {100 - window} %"


def judge(setting: Setting, seed: int) -> dict[str, float]:
    """Train all runs of one seed, average the stable run in every way, and evaluate everything."""
    with tempfile.TemporaryDirectory(prefix="ckavg-evidence-") as scratch:
        directory = Path(scratch)
        ends = train(directory, setting, seed)
        run = directory / "run"
        losses = {LAST: held_out_loss(run / f"checkpoint-{setting.steps}")}
        losses |= {decayed(*which): held_out_loss(checkpoint) for which, checkpoint in ends.items()}
        numbers = itertools.count()

        def averaged(scheme: Scheme, *, from_step: int | None = None) -> float:
            out = directory / "averages" / str(next(numbers))
            return held_out_loss(ckavg.average(ckavg.open_run(run, from_step=from_step), scheme, out=out).directory)

        losses |= {name: averaged(scheme) for name, scheme in OTHERS.items()}
        for window in setting.windows:
            begin = setting.begin(window)
            losses[burnt_in(window)] = averaged(ckavg.BEMA(burn_in=begin))
            decay: Decay
            for decay in ("linear", "cosine", "minus-sqrt"):
                losses[merged(decay, window)] = averaged(ckavg.Mean(decay=decay), from_step=begin)
    # The content of the seeds' file, from which everything else follows.
    return {name: round(loss, 5) for name, loss in losses.items()}


def difference(losses: Losses, one: str, other: str) -> Difference:
    """Mean over the seeds of `one` less `other`."""
    return Difference.of([first - second for first, second in zip(losses[one], losses[other], strict=True)])


def told(losses: Losses, one: str, other: str) -> tuple[str, str]:
    """The difference and its verdict; empty for a name and itself."""
    found = difference(losses, one, other)
    return (str(found), found.verdict) if one != other else ("", "")


def tables_of(setting: Setting, losses: Losses) -> list[Table]:
    """The losses of all seeds; merging against decaying; and all other averages against no averaging."""
    raw: list[tuple[Cell, ...]] = [(name, *values) for name, values in losses.items()]
    against: list[tuple[Cell, ...]] = []
    for window, decay in itertools.product(setting.windows, DECAYS):
        one, other = merged(decay, window), decayed(decay, window)
        means = (str(Difference.of(losses[name])) for name in (other, one))
        against.append((f"{window} %, {decay}", *means, *told(losses, one, other)))
    references = (LAST, _best(losses, "decayed"), _best(losses, "merged"))
    names = (LAST, *OTHERS, *map(burnt_in, setting.windows), *(merged("linear", each) for each in setting.windows))
    others: list[tuple[Cell, ...]] = []
    for name in names:
        apart = itertools.chain(*(told(losses, name, other) for other in references))
        others.append((name, str(Difference.of(losses[name])), *apart))
    return [
        Table("pretraining-seeds", ("what", *(f"seed {seed}" for seed in setting.seeds)), tuple(raw)),
        Table("pretraining-decays", ("window, shape", "decayed", "merged", "merged − decayed", "merged is"),
              tuple(against)),
        Table("pretraining-averages",
              ("average", "loss", *itertools.chain(*((f"− {other}", f"than {other}") for other in references))),
              tuple(others)),
    ]  # fmt: skip


def _best(losses: Losses, kind: str) -> str:
    """The name with the least mean loss of those that begin with `kind`."""
    return min((name for name in losses if name.startswith(kind)), key=lambda name: statistics.fmean(losses[name]))


def panels_of(setting: Setting, losses: Losses) -> list[Panel]:
    """Loss against the length of the window, a panel for each shape; the band is one standard error."""
    panels = []
    for decay in DECAYS:
        lines = {"decayed": [decayed(decay, window) for window in setting.windows]}
        lines["merged"] = [merged(decay, window) for window in setting.windows]
        lines["last, no averaging"] = [LAST for _ in setting.windows]
        curves = [
            Curve(
                name=name,
                x=setting.windows,
                y=[statistics.fmean(losses[each]) for each in of_window],
                error=[Difference.of(losses[each]).error for each in of_window],
                dashed=name not in ("decayed", "merged"),
            )
            for name, of_window in lines.items()
        ]
        panels.append(
            Panel(
                title=decay,
                x_label="last part of training, %",
                y_label="held-out loss, nats per byte",
                y_scale="linear",
                ticks={window: str(window) for window in setting.windows},
                curves=curves,
            )
        )
    return panels


def main() -> None:
    """Run all seeds, then write tables, figure and settings."""
    setting = Setting()
    of_seed = []
    with single_threaded() as pool:
        for seed, losses_of_seed in zip(setting.seeds, pool.map(partial(judge, setting), setting.seeds), strict=True):
            of_seed.append(losses_of_seed)
            print(f"seed {seed}: {losses_of_seed}", flush=True)
    losses = {name: [each[name] for each in of_seed] for name in of_seed[0]}
    publish(tables_of(setting, losses))
    draw("pretraining", panels_of(setting, losses), columns=3)
    write_record("pretraining", dataclasses.asdict(setting))


if __name__ == "__main__":
    main()
