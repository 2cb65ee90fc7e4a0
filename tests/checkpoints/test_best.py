"""The best checkpoints by a metric of the trainer's log: which they are, in which order choices are made, and what is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ckavg
from ckavg.errors import SettingError
from tests.cli.runner import run_cli
from tests.runs import write_run

STEPS = (100, 200, 300, 400, 500, 600)
LOSSES = ((90, 3.0), (100, 2.0), (200, 1.5), (290, 1.0), (390, 1.2), (400, 1.6), (600, 1.3))
"""300 has that of 290, 400 that of 400, and 500 none: nothing was logged after 400."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = write_run(tmp_path / "run", [{"w": torch.full((3,), float(step))} for step in STEPS], STEPS)
    log(root, [{"step": step, "eval_loss": value, "eval_f1": -value, "eval_x": value} for step, value in LOSSES])
    return root


def log(root: Path, history: Sequence[Any]) -> None:
    state = {"global_step": STEPS[-1], "log_history": [*history, {"step": 600, "eval_nan": float("nan")}]}
    (root / "checkpoint-600/trainer_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        ({"best": 2, "metric": "eval_loss"}, (300, 600)),
        ({"best": 3, "metric": "eval_loss"}, (200, 300, 600)),
        ({"best": 3, "metric": "eval_f1"}, (200, 300, 600)),
        ({"best": 2, "metric": "eval_loss", "goal": "max"}, (100, 400)),
        ({"best": 3, "metric": "eval_x", "goal": "min"}, (200, 300, 600)),
        ({"best": 9, "metric": "eval_loss"}, (100, 200, 300, 400, 600)),
        ({"best": 3, "metric": "eval_loss", "to_step": 400}, (200, 300, 400)),
        ({"best": 3, "metric": "eval_loss", "skip_step": (300,)}, (200, 400, 600)),
        ({"best": 4, "metric": "eval_loss", "last": 2}, (400, 600)),
        ({"best": 3, "metric": "eval_loss", "every": 200}, (200, 600)),
    ],
)
def test_which_are_best(source: Path, chosen: dict[str, Any], steps: tuple[int, ...]) -> None:
    run = ckavg.open_run(source, **chosen)
    assert run.steps == steps
    told = [line for line in run.warnings if "metric" in line or "eval_" in line]
    assert told[0].startswith("No eval_")
    assert told[0].endswith("so not chosen: step 500.")
    assert told[-1].startswith(f"Chosen by {chosen['metric']}, which is optimistic")
    assert len(told) == 2 + (chosen["best"] > 5)


def test_of_equals_the_later_one(source: Path) -> None:
    log(source, [{"step": step, "eval_loss": 1} for step in STEPS])
    assert ckavg.open_run(source, best=2, metric="eval_loss").steps == (500, 600)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"best": 2}, "`best` and `metric` require each other"),
        ({"metric": "eval_loss"}, "`best` and `metric` require each other"),
        ({"goal": "max"}, "`best` and `metric` require each other"),
        ({"best": 0, "metric": "eval_loss"}, "`best` is 0; it must be at least 1."),
        ({"best": 2, "metric": "eval_x"}, "does not say which values are better"),
        (
            {"best": 2, "metric": "loss"},
            "is not in the trainer's log, checkpoint-600/trainer_state.json: it holds eval_f1, ",
        ),
        ({"best": 2, "metric": "eval_nan", "goal": "min"}, "is not in the trainer's log"),
    ],
)
def test_refused(source: Path, chosen: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingError) as caught:
        ckavg.open_run(source, **chosen)
    assert told in str(caught.value)


def test_without_a_log(source: Path) -> None:
    (source / "checkpoint-600/trainer_state.json").unlink()
    with pytest.raises(SettingError, match="there is none"):
        ckavg.open_run(source, best=2, metric="eval_loss")


def test_the_command_line_and_the_record(source: Path) -> None:
    words = ("--best", "3", "--metric", "eval_loss", "--goal", "min")
    done = run_cli("mean", source, *words, "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["steps"] == [200, 300, 600]
    assert told["selection"] == {"best": 3, "metric": "eval_loss", "goal": "min"}
    card = Path(told["outputs"][0]["directory"], "README.md").read_text()
    assert " ".join(("ckavg mean", *words)) in card
    assert "optimistic" in done.stderr
