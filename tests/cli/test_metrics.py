"""Which value of an evaluation counts, what is best by it, what is remembered of it, and curves along the run."""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import ckavg
from ckavg.averaging.evaluation import criterion_of
from ckavg.averaging.evaluation_cache import EvaluationCache
from tests.cli.runner import run_cli, snapshot
from tests.runs import random_run, write_run

STEPS = (0, 50, 100, 150)
HARNESS = Path(__file__).parents[1] / "averaging" / "lm_eval"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "checkpoints", random_run(seed=1, count=4, dtype=torch.float32), STEPS)


def saying(**texts: str) -> str:
    """A command that prints something else for each result, by the beginning of its name."""
    cases = "".join(f"{name}*) echo {shlex.quote(text)};; " for name, text in texts.items())
    return f"case $(basename {{dir}}) in {cases}*) exit 99;; esac"


def evaluations(stdout: str) -> list[dict[str, Any]]:
    return [each["evaluation"] for each in json.loads(stdout)["averages"]]


def accuracy(value: float, error: float) -> str:
    return json.dumps({"acc": value, "acc_stderr": error})


ACCURACIES = saying(mean=accuracy(0.5, 0.01), last=accuracy(0.75, 0.03), dema=accuracy(0.73, 0.9))


# --- which value, and which is best ---


def test_the_standard_error_is_not_the_metric_and_more_accuracy_is_better(run: Path) -> None:
    """The last number printed is the standard error, the least of which would have been the worst average."""
    done = run_cli("sweep", run, "mean", "last", "dema", "--eval", ACCURACIES, "--eval-metric", "acc")
    assert done.exit_code == 0, done.stderr
    rows = {row.split()[0]: row for row in done.stdout.splitlines()[2:6]}
    assert rows["average"].split()[-2:] == ["age", "acc"]
    assert rows["mean"].rstrip().endswith("0.5 ± 0.01")
    assert rows["last"].rstrip().endswith("0.75 ± 0.03  best")
    assert rows["dema-kappa0.5"].rstrip().endswith("0.73 ± 0.9  level with the best")
    assert f"\nbest     {run / 'averaged' / 'last'}\n" in done.stdout
    told = run_cli(
        "sweep", run, "mean", "last", "dema", "--eval", ACCURACIES, "--eval-metric", "acc", "--json", "--force"
    )
    assert evaluations(told.stdout)[1] == {
        "command": ACCURACIES, "value": 0.75, "problem": "", "metric": "acc", "stderr": 0.03, "goal": "max",
        "best_of": 0, "data": "", "last_value": None, "last_stderr": None,
    }  # fmt: skip
    mean = evaluations(told.stdout)[0]
    assert (mean["value"], mean["last_value"], mean["last_stderr"]) == (0.5, 0.75, 0.03)
    assert {key: json.loads(told.stdout)[key] for key in ("best", "level")} == {
        "best": "last",
        "level": ["dema-kappa0.5"],
    }


def test_the_card_and_the_record_say_the_metric(run: Path) -> None:
    run_cli("sweep", run, "last", "--eval", ACCURACIES, "--eval-metric", "acc")
    card = (run / "averaged" / "last" / "README.md").read_text()
    assert "| | acc |\n|---|---:|\n| **this model** | 0.75 ± 0.03 |\n" in card
    assert "\n\nMore is better. ± is the standard error. The command" in card
    assert json.loads((run / "averaged" / "last" / "ckavg.json").read_text())["evaluation"]["metric"] == "acc"
    assert run_cli("verify", run / "averaged" / "last").exit_code == 0


@pytest.mark.parametrize("scheme", ["mean", "last mean"])
def test_the_card_says_what_was_gained(run: Path, scheme: str) -> None:
    """Against the last checkpoint, if `last` is among the averages or `--eval-run` evaluates the run."""
    values = {"mean": {"loss": 1.5, "tokens": 4096}, "": {"loss": 2.0, "loss_stderr": 0.25}}
    cases = " ".join(f"*{name}) echo '{json.dumps(each)}';;" for name, each in values.items())
    said = f"case {{dir}} in {cases} esac"
    curve = () if "last" in scheme else ("--eval-run",)
    for words in (("sweep", run, *scheme.split(), *curve), ("sweep", run, "mean")):  # the second finds it up to date
        done = run_cli(*words, "--eval", said, "--eval-metric", "loss", "--json")
        assert done.exit_code == 0, done.stderr
        card = (run / "averaged/mean/README.md").read_text()
        rows = "| last checkpoint of the run | 2 ± 0.25 |\n| **this average** | 1.5 |\n"
        assert f"| | loss |\n|---|---:|\n{rows}" in card
        assert "Averaging lowered loss from 2 to 1.5 (by 25 %), which is better. Measured on 4,096 tokens. ± is" in card
    assert run_cli("verify", run / "averaged/mean").exit_code == 0


EQUAL = saying(mean="loss 2", last="loss 1", dema="loss 1")


def test_equal_values_are_named_as_equal(run: Path) -> None:
    done = run_cli("sweep", run, "mean", "last", "dema", "--eval", EQUAL, "--eval-metric", "loss")
    ends = [row.split()[-2:] for row in done.stdout.splitlines()[3:6]]
    assert ends[1:] == [["best,", "equal"]] * 2
    assert ends[0][-1] == "2"
    told = run_cli("sweep", run, "mean", "last", "dema", "--eval", EQUAL, "--eval-metric", "loss", "--json", "--force")
    assert json.loads(told.stdout)["best"] == "last"
    assert json.loads(told.stdout)["equal"] == ["dema-kappa0.5"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"loss": NaN}', "'loss' is nan"),
        ('{"a": {"loss": 1}, "b": {"loss": 2}}', "'loss' is ambiguous: there are a.loss, b.loss"),
        ('{"eval_loss": 1}', "it printed no 'loss'; there are eval_loss"),
    ],
)
def test_what_is_no_value_is_a_failure(run: Path, text: str, problem: str) -> None:
    command = saying(mean=text, last="loss 3")
    done = run_cli("sweep", run, "mean", "last", "--eval", command, "--eval-metric", "loss", "--json")
    assert done.exit_code == 0
    assert f"warning: mean has no evaluation: {problem}." in done.stderr.splitlines()
    assert [(each["value"], each["problem"]) for each in evaluations(done.stdout)] == [(None, problem), (3.0, "")]
    assert json.loads(done.stdout)["best"] == "last"


def test_a_standard_error_that_is_not_there(run: Path) -> None:
    command = saying(mean='{"loss": 2, "se": 0.5}', last='{"loss": 1}')
    more = ("--eval-metric", "loss", "--eval-stderr", "se")
    done = run_cli("sweep", run, "mean", "last", "--eval", command, *more, "--json")
    assert [(each["value"], each["stderr"]) for each in evaluations(done.stdout)] == [(2.0, 0.5), (1.0, None)]
    assert "warning: last is evaluated, but: no standard error 'se' was found." in done.stderr.splitlines()


# --- the goal ---


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "without eval-metric, it must say whether the least or the greatest number is best"),
        (("--eval-metric", "class"), "the name 'class' does not say whether less or more is better"),
        (("--eval-metric", " "), "eval-metric is empty"),
    ],
)
def test_the_goal_is_required_before_anything_is_read(run: Path, options: tuple[str, ...], told: str) -> None:
    before = snapshot(run.parent)
    for words in (("sweep", run, "mean"), ("sweep", run / "nowhere", "mean"), ("mean", run)):
        done = run_cli(*words, "--eval", "echo 1 {dir}", *options)
        assert (done.exit_code, done.stdout) == (2, "")
        assert told in done.stderr
    assert snapshot(run.parent) == before


def test_a_goal_against_the_name_is_warned_of(run: Path) -> None:
    more = ("--eval", ACCURACIES, "--eval-metric", "acc", "--eval-goal", "min")
    done = run_cli("sweep", run, "mean", "last", *more, "--json")
    assert json.loads(done.stdout)["best"] == "mean"
    assert "warning: The least value of 'acc' counts as the best, as eval-goal says; its name says max." in done.stderr
    assert "its name" not in run_cli("sweep", run, "mean", *more[:-1], "max", "--force").stderr


@pytest.mark.parametrize(
    "option",
    [("--eval-metric", "loss"), ("--eval-goal", "max"), ("--eval-stderr", "se"), ("--eval-again",), ("--eval-run",),
     ("--csv", "file")],
)  # fmt: skip
def test_options_that_need_a_command(run: Path, option: tuple[str, ...]) -> None:
    done = run_cli("mean", run, *option)
    assert done.exit_code == 2
    assert f"error: {option[0]} needs --eval." in done.stderr


# --- files, and lm-evaluation-harness ---


def test_the_newest_json_file_counts(run: Path) -> None:
    command = (
        "test -d {dir} && test -z \"$(ls -A {out})\" && mkdir -p '{out}/a b' && echo '{\"loss\": 9}' > {out}/z.json"
        ' && echo "{\\"loss\\": 1.5}" > "{out}/a b/results.json" && touch -d 2001-01-01 {out}/z.json && echo loss 7'
    )
    done = run_cli("sweep", run, "mean", "--eval", command, "--eval-metric", "loss", "--json")
    assert evaluations(done.stdout)[0]["value"] == 1.5
    done = run_cli(
        "sweep", run, "mean", "--eval", command + "; rm -r {out}/*", "--eval-metric", "loss", "--json", "--force"
    )
    assert evaluations(done.stdout)[0]["value"] == 7


def test_the_empty_directory_may_need_quotes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange = tmp_path / "it's $(touch canary) {dir}"
    strange.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(strange))
    command = (
        "echo '{\"loss\": 1.5}' > {out}/a.json; cp {out}/a.json '{out}/b.json'; test -d {dir} && rm \"{out}/a.json\""
    )
    done = run_cli("mean", run, "--eval", command, "--eval-metric", "loss", "--json")
    assert json.loads(done.stdout)["evaluation"]["value"] == 1.5, done.stderr
    assert list(strange.iterdir()) == []
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.parametrize("metric", ["acc", "results.sums.acc,none"])
@pytest.mark.parametrize("with_file", [True, False])
def test_real_output_of_the_harness(run: Path, metric: str, with_file: bool) -> None:
    command = f": {{dir}}; cat {HARNESS}/stdout.txt"
    if with_file:
        command += f"; mkdir {{out}}/model && cp {HARNESS}/results.json {{out}}/model/results_2026.json"
    told = evaluations(run_cli("sweep", run, "mean", "--eval", command, "--eval-metric", metric, "--json").stdout)[0]
    exact = json.loads((HARNESS / "results.json").read_text())["results"]["sums"]
    value, error = exact["acc,none"], exact["acc_stderr,none"]
    assert (told["value"], told["stderr"]) == ((value, error) if with_file else (round(value, 4), round(error, 4)))
    assert told["goal"] == "max"


# --- what is remembered ---


@pytest.fixture
def counted(tmp_path: Path) -> tuple[str, Path]:
    """A command that appends a line to a file whenever it runs, and prints a loss of its own for each directory."""
    runs = tmp_path / "runs"
    script = f"basename {{dir}} >> {runs}; echo loss $(cksum < {{dir}}/model.safetensors | cut -c1-4)"
    return script, runs


def lines(runs: Path) -> int:
    count = len(runs.read_text().splitlines()) if runs.exists() else 0
    runs.unlink(missing_ok=True)
    return count


def test_a_rerun_evaluates_only_what_is_new(run: Path, counted: tuple[str, Path]) -> None:
    command, runs = counted
    sweep = ("--eval", command, "--eval-metric", "loss", "--json", "--force")
    first = run_cli("sweep", run, "ema:gamma=0.1,0.2", "last", *sweep)
    assert lines(runs) == 3
    again = run_cli("sweep", run, "ema:gamma=0.1,0.2", "last", *sweep)
    assert lines(runs) == 0
    assert evaluations(again.stdout) == evaluations(first.stdout)
    assert "evaluated before: last, 3 of 3" in again.stderr
    record = json.loads((run / "averaged" / "last" / "ckavg.json").read_text())
    assert record["evaluation"] == evaluations(first.stdout)[2] | {"command": record["evaluation"]["command"]}
    one_new = run_cli("sweep", run, "ema:gamma=0.1,0.2,0.3", "last", *sweep)
    assert lines(runs) == 1
    assert "evaluating ema-gamma0.3, 3 of 4" in one_new.stderr
    run_cli("ema", run, "--gamma", "0.3", *sweep)  # by its own verb, the same weights
    assert lines(runs) == 0
    run_cli("sweep", run, "ema:gamma=0.1", "last", *sweep, "--eval-again")
    assert lines(runs) == 2
    run_cli("sweep", run, "last", "--eval", f"{command} ", "--eval-metric", "loss", "--force")
    assert lines(runs) == 1, "another command"
    run_cli("sweep", run, "last", "--eval", command, "--eval-goal", "min", "--force")
    assert lines(runs) == 1, "another metric"


def test_a_failure_is_not_remembered(run: Path, tmp_path: Path) -> None:
    command = f"echo x >> {tmp_path}/runs; echo loss nan; : {{dir}}"
    for _ in range(2):
        assert run_cli("mean", run, "--eval", command, "--eval-metric", "loss", "--force").exit_code == 1
    assert lines(tmp_path / "runs") == 2
    assert not (run / "averaged" / "evaluations.json").exists()


def resealed(table: dict[str, Any]) -> bytes:
    """A table with the checksum that goes with it."""
    text = json.dumps(table, separators=(",", ":"))
    return json.dumps(table | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def test_what_is_not_as_it_was_written_is_not_believed(run: Path, counted: tuple[str, Path]) -> None:
    command, runs = counted
    sweep = ("sweep", run, "last", "--eval", command, "--eval-metric", "loss", "--force", "--json")
    first = evaluations(run_cli(*sweep).stdout)
    file = run / "averaged" / "evaluations.json"
    sound = file.read_bytes()
    table = json.loads(sound)
    del table["sha256"]
    ((key, pair),) = table["evaluations"].items()
    assert (len(key), pair) == (64, [first[0]["value"], None])
    assert resealed(table) != resealed(table | {"format": 7})
    values: list[Any] = [[None, None], ["1", None], [True, None], [1], [1, 2, 3], [1, -1], "12", {}, [1, "x"]]
    wrong = [sound[:-5], b"", b"[]", b"\xff", b"[" * 100_000, sound.replace(b"null", b"0.25")]
    wrong += [resealed(table | {"evaluations": {key: value}}) for value in values]
    wrong += [resealed(table | {"evaluations": {"short": pair}}), resealed(table | {"evaluations": []})]
    wrong += [resealed(table | {"format": 7}), resealed(table | {"more": 1})]
    criterion = criterion_of(command, "loss")
    opened = ckavg.open_run(run)
    for content in wrong:
        file.write_bytes(content)
        cache = EvaluationCache.load(opened, criterion)
        assert cache.values == {}, content[:200]
        assert [
            warning.startswith(f"{file} is damaged, edited, or from another version") for warning in cache.warnings
        ] == [True]
    file.write_bytes(resealed(table))
    assert EvaluationCache.load(opened, criterion).values == {key: (*pair, "")}
    file.write_bytes(wrong[-1])
    lines(runs)
    done = run_cli(*sweep)
    assert evaluations(done.stdout) == first
    assert f"warning: {file} is damaged, edited, or from another version of ckavg" in done.stderr
    assert lines(runs) == 1
    assert file.read_bytes() == sound


def test_a_planted_link_is_not_followed(
    run: Path, counted: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, runs = counted
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (run / "averaged").mkdir()
    (tmp_path / "mine").write_text("mine")
    (run / "averaged" / "evaluations.json").symlink_to(tmp_path / "mine")
    for _ in range(2):
        done = run_cli("mean", run, "--eval", command, "--eval-metric", "loss", "--force")
        assert done.exit_code == 0, done.stderr
    assert lines(runs) == 1, "it is kept in the cache of the user instead"
    assert (tmp_path / "mine").read_text() == "mine"


# --- curves ---


def test_curves_of_the_run_and_of_averages(run: Path, counted: tuple[str, Path], tmp_path: Path) -> None:
    command, runs = counted
    more = (
        "--eval",
        command,
        "--eval-metric",
        "loss",
        "--eval-run",
        "--snapshot-every",
        "50",
        "--csv",
        tmp_path / "c.csv",
    )
    done = run_cli("sweep", run, "mean", "ema", *more, "--plot", tmp_path / "plot.svg")
    assert done.exit_code == 0, done.stderr
    assert lines(runs) == 2 + 4 + 2 * 2
    rows = list(csv.reader((tmp_path / "c.csv").read_text().splitlines()))
    assert rows[0] == ["series", "step", "value", "stderr"]
    assert [row[:2] for row in rows[1:]] == [
        *(["run", str(step)] for step in STEPS),
        *([name, str(step)] for name in ("mean", "ema-gamma0.15") for step in STEPS[1:]),
    ]
    places = {"run": run, "mean": run / "averaged" / "mean", "ema-gamma0.15": run / "averaged" / "ema-gamma0.15"}
    for series, step, value, error in rows[1:]:
        directory = places[series]
        directory = directory if series != "run" and step == "150" else directory / f"checkpoint-{step}"
        file = shlex.quote(str(directory / "model.safetensors"))
        check = subprocess.check_output(f"cksum < {file} | cut -c1-4", shell=True)
        assert (float(value), error) == (float(check), "")
    table = done.stdout[done.stdout.index("loss by step") :].splitlines()
    assert table[1].split() == ["step", "run", "mean", "ema-gamma0.15"]
    assert [len(row.split()) for row in table[2:6]] == [2, 4, 4, 4]
    assert "loss; grey: checkpoints of the run" in (tmp_path / "plot.svg").read_text().replace("<!-- ", "")
    again = run_cli("sweep", run, "mean", "ema", *more, "--force", "--json")
    assert lines(runs) == 0
    assert [[each["series"], each["step"], each["value"]] for each in json.loads(again.stdout)["curves"]] == [
        [series, int(step), float(value)] for series, step, value, _ in rows[1:]
    ]


def test_a_checkpoint_that_does_not_load_is_a_failed_evaluation(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-50" / "config.json").unlink()
    command = "test -f {dir}/config.json && echo loss 1"
    done = run_cli(
        "ema", run, "--eval", command, "--eval-metric", "loss", "--eval-run", "--csv", tmp_path / "c.csv", "--json"
    )
    assert done.exit_code == 0
    assert "warning: step 50 of the run has no evaluation: exit status 1." in done.stderr
    told = json.loads(done.stdout)
    assert told["evaluation"]["value"] == 1
    assert [(each["series"], each["step"], each["value"], each["problem"]) for each in told["curves"]] == [
        ("run", 0, 1.0, ""), ("run", 50, None, "exit status 1"), ("run", 100, 1.0, ""), ("run", 150, 1.0, ""),
        ("ema-gamma0.15", 150, 1.0, ""),
    ]  # fmt: skip
    assert (tmp_path / "c.csv").read_text().splitlines()[2] == "run,50,,"


def test_a_single_average(run: Path, counted: tuple[str, Path]) -> None:
    command, _ = counted
    done = run_cli("ema", run, "--eval", command, "--eval-metric", "loss")
    record = json.loads((run / "averaged" / "ema-gamma0.15" / "ckavg.json").read_text())
    assert f"\neval     loss {record['evaluation']['value']:g}\n" in done.stdout
    told = json.loads(run_cli("ema", run, "--eval", command, "--eval-metric", "loss", "--force", "--json").stdout)
    assert told["evaluation"] == record["evaluation"] | {"command": command}
    inside = run_cli(
        "ema", run, "--eval", command, "--eval-metric", "loss", "--csv", run / "checkpoint-50" / "c", "--force"
    )
    assert inside.exit_code == 1
    assert "lies inside the checkpoint" in inside.stderr
