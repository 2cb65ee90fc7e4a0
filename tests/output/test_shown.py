"""What a card shows besides its recipe: a picture of the weights, and what the user's own command said of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import ckavg
from ckavg.output import plots
from ckavg.output.plots import card_svg
from ckavg.schemes import Scheme
from tests.cli.runner import run_cli
from tests.output.cards import STEPS, averaged, blocks, fields_of
from tests.runs import random_run, write_run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "checkpoints", random_run(3, len(STEPS), torch.float32), STEPS)


# --- the picture ---


def test_the_picture_is_shown_recorded_and_verified(source: Path) -> None:
    result = ckavg.average(ckavg.open_run(source), ckavg.PEMA(), snapshot_every=10, plot=True)
    of_checkpoint, output = result.outputs[0], result.outputs[-1]
    picture = (result.directory / "ckavg.svg").read_bytes()
    assert (result.directory / "README.md").read_text().count("](ckavg.svg)") == 1
    assert output.sha256["ckavg.svg"] == hashlib.sha256(picture).hexdigest()
    assert "ckavg.svg" not in (*of_checkpoint.files, (of_checkpoint.directory / "README.md").read_text())
    assert ckavg.verify_result(result.directory).findings == ()
    (result.directory / "ckavg.svg").write_bytes(picture + b" ")
    (problem,) = ckavg.verify_result(result.directory).problems
    assert "ckavg.svg" in problem


def test_there_is_a_picture_only_if_a_plot_is_asked_for(source: Path, tmp_path: Path) -> None:
    out, plot = source / "averaged" / "mean", ("--plot", tmp_path / "plot.svg")

    def is_drawn(*words: str | Path) -> bool:
        done = run_cli(*words, "--quiet")
        assert done.exit_code == 0, done.stderr
        card, record = (out / "README.md").read_text(), json.loads((out / "ckavg.json").read_text())
        has = {"ckavg.svg" in card, "ckavg.svg" in record["outputs"][-1]["files"], (out / "ckavg.svg").exists()}
        assert len(has) == 1
        assert "| weight |" in card
        assert ckavg.verify_result(out).findings == ()
        return has.pop()

    assert not is_drawn("mean", source)
    assert not is_drawn("mean", source, *plot), "the result is up to date"
    assert is_drawn("mean", source, *plot, "--force")
    assert is_drawn("mean", source), "it still is"
    assert not is_drawn("sweep", source, "mean", "--force")
    assert is_drawn("sweep", source, "mean", "--force", *plot)
    shutil.rmtree(out)
    assert [run_cli("mean", source, "--part", f"{part}/2").exit_code for part in (0, 1)] == [0, 0]
    assert is_drawn("join", out, *plot)


def test_a_search_draws_only_its_result(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def noted(record: ckavg.Averaged) -> bytes | None:
        drawn.append(record.output.name)
        return card_svg(record)

    monkeypatch.setattr(plots, "card_svg", noted)
    found = ckavg.best(source, lambda directory: len(directory.name), goal="min", budget=3, plot=True)
    assert drawn == ["best"]
    assert (found.record.directory / "ckavg.svg").exists()


def averaged_elsewhere(source: Path, scheme: str = "Mean", before: str = "", **env: str) -> str:
    """What a process of its own prints: the warnings of an average, but for that of the weight of the start."""
    warnings = f"ckavg.average(ckavg.open_run({str(source)!r}), ckavg.{scheme}(), plot=True).warnings"
    code = f"{before}\nimport ckavg; print(*(each for each in {warnings} if 'where the run began' not in each))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_the_picture_has_no_time_no_version_and_no_style_of_a_user(source: Path, tmp_path: Path) -> None:
    here = averaged(source, ckavg.BEMA(), out=tmp_path / "here", plot=True)
    config = tmp_path / "matplotlibrc"
    config.write_text("axes.facecolor: black\nfont.size: 30\n")
    averaged_elsewhere(source, "BEMA", MATPLOTLIBRC=str(config), TZ="Asia/Tokyo", PYTHONHASHSEED="7", HOME="/nowhere")
    picture = (here / "ckavg.svg").read_bytes()
    assert [path.read_bytes() for path in source.glob("averaged/*/ckavg.svg")] == [picture]
    assert not [word for word in (b"dc:date", b"Matplotlib v") if word in picture]


def test_without_matplotlib_there_is_no_picture(source: Path) -> None:
    assert averaged_elsewhere(source, before="import sys; sys.modules['matplotlib'] = None") == ""
    out = source / "averaged" / "mean"
    assert not (out / "ckavg.svg").exists()
    assert "ckavg.svg" not in (out / "README.md").read_text() + (out / "ckavg.json").read_text()
    assert ckavg.verify_result(out).findings == ()


def test_a_picture_that_fails_costs_no_average(source: Path) -> None:
    warning = averaged_elsewhere(source, MPLBACKEND="no such thing")
    assert warning.startswith("The card has no plot of the weights: matplotlib failed with ValueError: ")
    assert ckavg.verify_result(source / "averaged" / "mean").problems == ()


def bars(picture: bytes) -> list[float]:
    """Heights of the bars of the last axes, in units of the drawing, downwards."""
    root = ElementTree.fromstring(picture)
    svg = "{http://www.w3.org/2000/svg}"
    *_, axes = (each for each in root.iter(f"{svg}g") if each.get("id", "").startswith("axes_"))
    heights = []
    for patch in axes.iter(f"{svg}g"):
        path = patch.find(f"{svg}path")
        if not patch.get("id", "").startswith("patch_") or path is None or "z" not in (path.get("d") or ""):
            continue
        ys = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path.get("d") or "")]
        heights.append(ys[0] - ys[2])
    return heights[1:]  # the first is the background


@pytest.mark.parametrize("scheme", [ckavg.PEMA(), ckavg.DEMA(), ckavg.Last()])
def test_the_bars_are_the_weights(source: Path, scheme: Scheme) -> None:
    result = ckavg.average(ckavg.open_run(source), scheme, plot=True)
    drawn = bars((result.directory / "ckavg.svg").read_bytes())
    scale = drawn[-1] / result.weights[-1]
    assert drawn == pytest.approx([weight * scale for weight in result.weights], abs=1e-3)


def test_many_checkpoints_make_one_line(source: Path) -> None:
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA())
    count = 2_000
    many = dataclasses.replace(
        result,
        steps=tuple(range(count)),
        weights=(1 / count,) * count,
        betas=(None,) + (0.5,) * (count - 1),
    )
    picture = card_svg(many)
    assert picture is not None
    assert len(picture) < 250_000


# --- the evaluation ---


def evaluated(source: Path, command: str) -> tuple[str, Path]:
    run_cli("sweep", source, "mean", "--eval", command, "--eval-goal", "min")
    out = source / "averaged" / "mean"
    return (out / "README.md").read_text(), out


def test_the_card_tells_the_evaluation(source: Path) -> None:
    card, out = evaluated(source, f"cd {source}; echo `basename {{dir}}` loss 0.1234567")
    assert ("inline", "0.123457") in blocks(card)
    said = "Less is better. The command, with the directory of the model in place of `{dir}`:"
    assert ("inline", said) in blocks(card)
    assert ("code_block", "cd RUN; echo `basename {dir}` loss 0.1234567\n") in blocks(card)
    assert str(source) not in card
    assert "model-index" not in fields_of(card), "which needs a data set and a metric, and nobody named them"
    assert ckavg.verify_result(out).findings == ()


def test_an_evaluation_breaks_out_of_nothing(source: Path) -> None:
    card, _ = evaluated(source, "echo 2\n\n# Heading {dir}")
    assert ("code_block", "echo 2\\n\\n# Heading {dir}\n") in blocks(card)


@pytest.mark.parametrize(
    ("command", "ending"), [("echo {dir}; exit 3", ""), ("echo mine >> {dir}/README.md; echo 5", "mine\n")]
)
def test_a_failure_and_a_card_that_the_command_edits_are_not_told(source: Path, command: str, ending: str) -> None:
    card, out = evaluated(source, command)
    assert "Evaluation" not in card
    assert card.endswith(ending)
    assert ckavg.verify_result(out).problems == ()
    assert ('"value": 5.0' in (out / "ckavg.json").read_text()) == bool(ending)
