"""`ckavg best`: what is tried, what wins and why, what is left on the disk, and what an interrupt costs."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckavg
from ckavg.averaging.evaluation import Criterion, Outcome, evaluate
from tests.cli.runner import run_cli, visible
from tests.runs import write_run

STEPS = tuple(range(0, 1000, 100))
FEW = ("--budget", "6")
KEPT = {"evaluations.json", "path.json", "best"}

_JUDGE = """
import json, math, os, sys
record = json.load(open(os.path.join(sys.argv[1], "ckavg.json")))
open(sys.argv[3], "a").write(record["scheme"] + "\\n")
weights = record["weights"]
place = sum(weight * step for weight, step in zip(weights, record["steps"]))
print(json.dumps({"loss": abs(place - float(sys.argv[2])) / 100 + 1, "loss_stderr": float(sys.argv[4])}))
"""
"""The loss hangs on the mean step of the checkpoints: it is least where that is the second argument."""


class Judge:
    """A command, and what it was called for."""

    def __init__(self, directory: Path) -> None:
        self._file, self._log = directory / "judge.py", directory / "calls"
        self._file.write_text(_JUDGE)
        self._log.touch()

    def command(self, optimum: float, stderr: float = 0.01) -> str:
        python, file, log = map(shlex.quote, (sys.executable, str(self._file), str(self._log)))
        return f"{python} -IS {file} {{dir}} {optimum} {log} {stderr}"

    @property
    def calls(self) -> list[str]:
        return self._log.read_text().split()


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    return Judge(tmp_path)


def write_small_run(directory: Path, steps: tuple[int, ...]) -> Path:
    walk = torch.randn(len(steps), 4, 3, generator=torch.Generator().manual_seed(1)).cumsum(0)
    return write_run(directory, [{"weight": each} for each in walk], steps)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_small_run(tmp_path / "run", STEPS)


def best(run: Path, command: str, *more: str) -> dict[str, Any]:
    done = run_cli("best", run, "--eval", command, "--eval-metric", "loss", "--json", "-q", *more)
    assert done.exit_code == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_one_winner_within_the_budget(run: Path, judge: Judge) -> None:
    """All that is said of each is what its record said; the result is that of the winner's own command."""
    told = best(run, judge.command(720))
    tried = told["search"]["contestants"]
    assert len(judge.calls) == told["search"]["evaluated"] == sum(not each["same_as"] for each in tried) <= 12
    assert tried[0]["name"] == judge.calls[0] == "last"
    least = min(tried, key=lambda each: each["value"])
    assert (told["search"]["winner"], told["search"]["standing"]) == (least["name"], "better")
    assert told["evaluation"]["value"] == least["value"] < tried[0]["value"]
    assert (told["evaluation"]["best_of"], told["evaluation"]["stderr"]) == (len(judge.calls), 0.01)

    result = run / "averaged" / "best"
    recorded = json.loads((result / "ckavg.json").read_text())["evaluation"]
    assert recorded == told["evaluation"] | {"command": recorded["command"]}  # without places of this machine
    assert f"as the best of {len(judge.calls)} candidates" in (result / "README.md").read_text()
    assert {path.name for path in result.parent.iterdir()} == KEPT
    assert run_cli("verify", result, "--replay").exit_code == 0
    selection = [f"--{name.replace('_', '-')}={value}" for name, value in told["selection"].items()]
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in told["parameters"].items()]
    again = json.loads(run_cli(told["scheme"], run, *settings, *selection, "--json").stdout)
    assert again["outputs"][0]["name"] == least["name"]
    assert (
        Path(again["outputs"][0]["directory"], "model.safetensors").read_bytes()
        == (result / "model.safetensors").read_bytes()
    )


def test_what_people_read(run: Path, judge: Judge) -> None:
    confirm = judge.command(800, stderr=0.5)
    done = run_cli(
        "best", run, "--eval", judge.command(720), "--eval-metric", "loss", "--confirm", confirm, "--budget", "8"
    )
    assert done.exit_code == 0, done.stderr
    assert "8 evaluations in 2 rounds" in done.stdout
    assert "is better than the last checkpoint by" in done.stdout
    assert "the best of 8 by this very number: no estimate of quality, but optimistic" in done.stdout
    assert "the last checkpoint 2 ± 0.5" in done.stdout  # |900 − 800| / 100 + 1
    assert len(judge.calls) == 8 + 2


def test_within_the_noise_no_average_is_shown_to_be_better(run: Path, judge: Judge) -> None:
    told = best(run, judge.command(720, stderr=5.0), *FEW)
    assert told["search"]["standing"] == "level"
    assert "no average is shown to be better" in told["search"]["reason"]
    assert told["scheme"] != "last"


def test_if_the_last_checkpoint_is_best_it_is_the_result(run: Path, judge: Judge) -> None:
    told = best(run, judge.command(900), "--confirm", judge.command(900), *FEW)
    assert (told["search"]["winner"], told["search"]["standing"], told["scheme"]) == ("last", "last", "last")
    assert told["search"]["confirmed"]["best"] == told["search"]["confirmed"]["last"]
    weights = (load_file(place / "model.safetensors") for place in (run / "averaged/best", run / "checkpoint-900"))
    one, other = weights
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_without_a_standard_error_the_noise_is_unknown(run: Path, judge: Judge) -> None:
    command = f"{judge.command(720)} | sed s/loss_stderr/other/"
    told = best(run, command, *FEW)
    assert told["search"]["standing"] == "unknown"
    assert "this may be noise" in told["search"]["reason"]


def test_what_was_evaluated_is_remembered_and_the_search_is_the_same(run: Path, judge: Judge) -> None:
    first = best(run, judge.command(720))
    calls = len(judge.calls)
    again = best(run, judge.command(720), "--force")
    assert len(judge.calls) == calls
    assert again["search"] == first["search"]


def test_an_interrupted_search_leaves_nothing_but_what_was_evaluated(
    run: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(directory: Path, criterion: Criterion) -> Outcome:
        if len(judge.calls) == 9:
            raise KeyboardInterrupt
        return evaluate(directory, criterion)

    monkeypatch.setattr("ckavg.cli.evaluation.evaluate", interrupted)
    done = run_cli("best", run, "--eval", judge.command(720), "--eval-metric", "loss", "-q")
    assert done.exit_code == 130
    assert "the same command goes on from there" in done.stderr
    assert visible(run / "averaged") == KEPT - {"best"}
    assert not [path for path in (run / "averaged").iterdir() if path.is_dir()]
    monkeypatch.undo()
    told = best(run, judge.command(720))
    assert len(judge.calls) == told["search"]["evaluated"]


def test_where_all_fail_there_is_no_result(run: Path) -> None:
    done = run_cli("best", run, "--eval", "echo broken >&2; exit 7; : {dir}", "--eval-goal", "min", "-q")
    assert done.exit_code == 1
    assert "error: No evaluation succeeded. The first problem: exit status 7." in done.stderr
    assert done.stderr.endswith("The last lines of what the command said:\nbroken\n")
    assert visible(run / "averaged") <= KEPT - {"best"}


def test_one_that_fails_costs_its_evaluation_alone(run: Path, judge: Judge) -> None:
    told = best(run, f"case {{dir}} in */last) exit 1;; esac; {judge.command(720)}", *FEW)
    assert told["search"]["contestants"][0]["problem"] == "exit status 1"
    assert told["search"]["standing"] == "unknown"
    assert "has none to compare with" in told["search"]["reason"]


def test_the_same_weights_are_evaluated_once(tmp_path: Path, judge: Judge) -> None:
    """Of steps 0 and 100, power-function EMA is the last checkpoint, by its formula."""
    run = write_small_run(tmp_path / "two", (0, 100))
    told = best(run, judge.command(50))
    same = {each["name"]: each["same_as"] for each in told["search"]["contestants"] if each["same_as"]}
    assert same["power-sigma-rel0.1"] == "last"
    assert "power" not in judge.calls


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "Add --eval 'COMMAND {dir}'."),
        (("--eval", "echo {dir}", "--eval-goal", "min", "--budget", "1"), "budget is 1; it must be 2 or more"),
        (("--eval", "echo {dir}", "--eval-goal", "min", "--strategy", "x"), "it must be halving or soup"),
        (("--eval", "echo {dir}", "--eval-goal", "min", "--confirm", "echo"), "--confirm is 'echo'"),
    ],
)
def test_refusals(run: Path, more: tuple[str, ...], message: str) -> None:
    done = run_cli("best", run, *more)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (run / "averaged").exists()


def test_a_result_that_is_there_is_refused_before_anything_is_evaluated(run: Path, judge: Judge) -> None:
    assert run_cli("mean", run, "--out", run / "averaged" / "best").exit_code == 0
    done = run_cli("best", run, "--eval", judge.command(720), "--eval-metric", "loss")
    assert (done.exit_code, judge.calls) == (1, [])
    assert "already holds a result" in done.stderr


def test_dry_run_says_what_the_disk_must_hold(run: Path, judge: Judge) -> None:
    options = ("--eval", judge.command(720), "--eval-metric", "loss", "--dry-run")
    told = json.loads(run_cli("best", run, *options, "--json").stdout)
    assert len(told["first_round"]) == 7
    assert told["disk_bytes"] == 7 * told["bytes_to_write"]
    assert "while the first round is evaluated" in run_cli("best", run, *options).stdout
    assert (judge.calls, (run / "averaged").exists()) == ([], False)


@pytest.mark.parametrize("init", [False, True])
def test_a_greedy_soup_against_one_by_hand(run: Path, judge: Judge, init: bool) -> None:
    """Model soups, Recipe 1, of the newest six: 12 evaluations allow 6 alone and 5 soups. A base model is not in it."""
    optimum = 650.0

    def loss(steps: list[int]) -> float:
        return abs(sum(steps) / len(steps) - optimum) / 100 + 1

    soup: list[int] = []
    for step in sorted(STEPS[-6:], key=lambda step: loss([step])):
        if not soup or loss([*soup, step]) <= loss(soup):
            soup.append(step)
    base = ("--init", str(run / "checkpoint-0"), "--from-step", "100") if init else ()
    told = best(run, judge.command(optimum), "--strategy", "soup", *base)
    assert told["search"]["winner"] == f"soup of steps {', '.join(map(str, sorted(soup)))}"
    weights = dict(zip(told["steps"], told["weights"], strict=True))
    assert {step for step, weight in weights.items() if weight} == set(soup)
    assert all(math.isclose(weight, 1 / len(soup)) for weight in weights.values() if weight)
    assert math.isclose(told["evaluation"]["value"], loss(soup))
    assert len(judge.calls) <= 12


def test_windows_are_what_the_options_choose(run: Path, judge: Judge) -> None:
    """With --every, which would count among the last ones, a window begins at a step."""
    told = best(run, judge.command(760), "--every", "100")
    assert any("-from-step" in each["name"] for each in told["search"]["contestants"])
    assert "from_step" in told["selection"]
    assert run_cli("verify", run / "averaged" / "best", "--replay").exit_code == 0


def test_from_python(run: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def by_name(directory: Path) -> tuple[float, float] | float:
        seen.append(directory.name)
        return (float("nan") if directory.name == "mean" else len(directory.name), 0.5)

    def by_last(directory: Path) -> float:
        return float(directory.name != "last")

    found = ckavg.best(ckavg.open_run(run), by_name, goal="max", budget=7, out=tmp_path / "out", confirm=by_last)
    assert seen[:7] == [each.name for each in found.contestants]
    longest = max(seen[:7], key=len)
    assert found.contestants[found.winner].name == longest
    assert found.record.directory == tmp_path / "out"
    assert found.confirmed is not None
    assert [each.value for each in found.confirmed] == [1.0, 0.0]
    assert (found.standing, found.beats_last) == ("better", True)
    behind = dataclasses.replace(found, confirmed=found.confirmed[::-1])
    assert not behind.beats_last  # on other data
    assert found.contestants[1].evaluation.problem == "it is nan"


def test_an_error_of_the_evaluation_is_the_callers(run: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        ckavg.best(ckavg.open_run(run), lambda _: 1 / 0, goal="min")
    with pytest.raises(ckavg.CkavgError, match="holds the run itself"):  # before anything is evaluated
        ckavg.best(ckavg.open_run(run), lambda _: 1 / 0, goal="min", out=run)
    assert not (run / "averaged" / "best").exists()
    assert not [path for path in (run / "averaged").iterdir() if path.is_dir()]
