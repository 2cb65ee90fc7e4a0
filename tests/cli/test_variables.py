"""Options that the environment sets: by names like those of the options, said aloud, and never what is dangerous."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ckavg.averaging.evaluation import DIRECTORY, FILES
from ckavg.cli.verbs import TYPED_ONLY, VERBS, Verb
from tests.cli.runner import run_cli
from tests.runs import random_run, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(0, 4, torch.float32), (0, 10, 20, 30))


def test_they_set_options(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKAVG_EMA_GAMMA", "0.3")
    monkeypatch.setenv("CKAVG_EMA_SKIP_STEP", "10 20")
    monkeypatch.setenv("CKAVG_EMA_JSON", "yes")
    monkeypatch.setenv("CKAVG_MEAN_LAST", "1")
    done = run_cli("ema", run)
    told = json.loads(done.stdout)
    assert told["parameters"]["gamma"] == 0.3
    assert told["steps"] == [0, 30]
    assert "--gamma is 0.3, by the variable CKAVG_EMA_GAMMA\n" in done.stderr
    assert "--skip-step is 10 20, by the variable CKAVG_EMA_SKIP_STEP\n" in done.stderr


def test_what_is_typed_counts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKAVG_EMA_GAMMA", "0.3")
    done = run_cli("ema", run, "--gamma", "0.2", "--json")
    assert json.loads(done.stdout)["parameters"]["gamma"] == 0.2
    assert "CKAVG" not in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("CKAVG_EMA_GAMMA", "much", "The variable CKAVG_EMA_GAMMA is 'much'; it must be a number."),
        ("CKAVG_EMA_LAST", "0", "The variable CKAVG_EMA_LAST is '0'; it must be 1 or more."),
        ("CKAVG_EMA_DRY_RUN", "perhaps", "The variable CKAVG_EMA_DRY_RUN is 'perhaps'; it must be true or false."),
        ("CKAVG_EMA_GAMMA", "-1", "by the variable CKAVG_EMA_GAMMA\nerror: ema: gamma is -1; it must be 0 or more."),
        ("CKAVG_EMA_GAMA", "0.2", "sets no option of ema.\nhint: Did you mean CKAVG_EMA_GAMMA?"),
        ("CKAVG_EMA_FORCE", "1", "but --force is only taken from the command line.\nhint: Unset it with: unset CKAVG"),
        ("CKAVG_EMA_PUSH_TO_HUB", "lab/model", "but --push-to-hub is only taken from the command line."),
        ("CKAVG_EMA_EVAL", "rm {dir}", "but --eval is only taken from the command line."),
    ],
)
def test_what_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str) -> None:
    monkeypatch.setenv(variable, value)
    done = run_cli("ema", run)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert not (run / "averaged").exists()


def test_those_of_an_evaluation_are_no_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of --eval may be `ckavg eval`, which finds them in its environment."""
    for name in (DIRECTORY, FILES):
        monkeypatch.setenv(f"CKAVG_EVAL_{name.strip('{}').upper()}", str(tmp_path))
    (tmp_path / "text").write_text("Words.")
    done = run_cli("eval", tmp_path, "--text", tmp_path / "text")
    assert "variable" not in done.stderr


def test_help_is_shown_whatever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKAVG_EMA_GAMA", "0.2")
    monkeypatch.setenv("CKAVG_VERSION", "1")
    assert run_cli("ema", "--help-all").stdout.count("CKAVG_EMA_GAMMA=0.15") == 1


def test_no_two_options_share_one() -> None:
    names = {verb: [(each.name, each.envvar) for each in Verb(verb).load().params] for verb in VERBS}
    variables = [variable for options in names.values() for _, variable in options if variable]
    assert len({*variables}) == len(variables)
    known = {name for options in names.values() for name, _ in options}
    assert known >= TYPED_ONLY
    assert not [name for options in names.values() for name, variable in options if variable and name in TYPED_ONLY]
