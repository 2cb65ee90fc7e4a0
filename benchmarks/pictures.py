"""The plot of the README, its numbers, and the report of the gallery, from a demo: `python -m benchmarks.pictures`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ckavg
from benchmarks.evidence.figures import Curve, Panel, draw
from benchmarks.evidence.tables import ROOT, Table
from ckavg.demo import held_out_loss, train

PICTURES = ROOT / "docs" / "pictures"
REPORT = ROOT / "docs" / "gallery" / "report.html"
_WORDS = ("pema:gamma=0.05,0.1,0.15,0.2,0.3", "ema:gamma=0.1,0.15,0.2", "bema", "mean:last=3,5,10", "last")
_JUDGE = "-c 'from pathlib import Path; from ckavg.demo import held_out_loss; print(held_out_loss(Path(\"{dir}\")))'"


def main() -> None:
    """Train a demo, average it in many ways, and write the three files."""
    with tempfile.TemporaryDirectory() as place:
        run, report = Path(place) / "ckavg-demo", Path(place) / "report.html"
        train(run)
        table = judge_run(run)
        table.write(REPORT.parent)
        draw_gain(table)
        judge = ("--eval", f"python {_JUDGE}", "--eval-goal", "min")
        subprocess.run([sys.executable, "-m", "ckavg", "sweep", run, *_WORDS, *judge, "--report", report], check=True)
        shutil.copyfile(report, REPORT)


def judge_run(directory: Path) -> Table:
    """The held-out loss by step, of the checkpoints and of their average up to that step."""
    run = ckavg.open_run(directory)
    out = Path(ckavg.average(run, ckavg.PEMA(), snapshot_every=40, out=directory.parent / "average").directory)
    places = [out / f"checkpoint-{step}" for step in run.steps[1:-1]] + [out]
    rows = [
        (step, held_out_loss(directory / f"checkpoint-{step}"), held_out_loss(place))
        for step, place in zip(run.steps[1:], places, strict=True)
    ]
    return Table("gain", ("step", "checkpoint", "average"), tuple(rows))


def draw_gain(table: Table) -> None:
    """Draw such a table."""
    steps, own, averaged = ([float(str(cell)) for cell in column] for column in zip(*table.rows, strict=True))
    curves = [
        Curve(name="the run itself", x=steps, y=own),
        Curve(name="its average (ckavg pema)", x=steps, y=averaged),
    ]
    title, x_label = "A small language model, trained at a constant rate", "optimizer step"
    panel = Panel(title=title, x_label=x_label, y_label="held-out loss, nats per byte", curves=curves, y_scale="linear")
    draw("gain", [panel], columns=1, directory=PICTURES)


if __name__ == "__main__":
    main()
