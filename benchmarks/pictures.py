"""The picture of the README and the report of the gallery, made from a demo: `python -m benchmarks.pictures`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ckavg
from benchmarks.evidence.figures import Curve, Panel, draw
from benchmarks.evidence.tables import ROOT
from ckavg.demo import held_out_loss, train

PICTURES = ROOT / "docs" / "pictures"
REPORT = ROOT / "docs" / "gallery" / "report.html"
_WORDS = ("pema:gamma=0.05,0.1,0.15,0.2,0.3", "ema:gamma=0.1,0.15,0.2", "bema", "mean:last=3,5,10", "last")
_JUDGE = "-c 'from pathlib import Path; from ckavg.demo import held_out_loss; print(held_out_loss(Path(\"{dir}\")))'"


def main() -> None:
    """Train a demo, average it in many ways, and write both files."""
    with tempfile.TemporaryDirectory() as place:
        run, report = Path(place) / "ckavg-demo", Path(place) / "report.html"
        train(run)
        draw_gain(run)
        judge = ("--eval", f"python {_JUDGE}", "--eval-goal", "min")
        subprocess.run([sys.executable, "-m", "ckavg", "sweep", run, *_WORDS, *judge, "--report", report], check=True)
        REPORT.parent.mkdir(exist_ok=True)
        shutil.copyfile(report, REPORT)


def draw_gain(directory: Path) -> None:
    """Draw the held-out loss by step, of the checkpoints and of their average up to each of them."""
    run = ckavg.open_run(directory)
    out = ckavg.average(run, ckavg.PEMA(), snapshot_every=40, out=directory.parent / "average").directory
    steps = run.steps[1:]
    own = [held_out_loss(directory / f"checkpoint-{step}") for step in steps]
    averaged = [held_out_loss(Path(out) / f"checkpoint-{step}") for step in steps[:-1]] + [held_out_loss(Path(out))]
    curves = [
        Curve(name="the run's own checkpoints", x=steps, y=own),
        Curve(name="their average so far (ckavg pema)", x=steps, y=averaged),
    ]
    for step, *losses in zip(steps, own, averaged, strict=True):
        print(step, *(f"{loss:.4f}" for loss in losses))
    title, x_label = "A small language model, trained at a constant rate", "optimizer step"
    panel = Panel(title=title, x_label=x_label, y_label="held-out loss, nats per byte", curves=curves, y_scale="linear")
    draw("gain", [panel], columns=2, directory=PICTURES)


if __name__ == "__main__":
    main()
