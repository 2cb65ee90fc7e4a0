"""What a user's own command says of each average, and that nothing hangs on its success."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ckavg.averaging.evaluation import Criterion, Outcome, evaluate
from ckavg.averaging.metrics import last_number
from ckavg.output.record import Evaluation
from tests.cli.runner import placeless, run_cli, snapshot, visible
from tests.runs import random_run, write_run

MIN = ("--eval-goal", "min")
STEPS = (0, 50, 100, 150)
NAMES = ["mean", "last", "dema-kappa0.5"]
WORDS = ("mean", "last", "dema")


def saying(mean: str, last: str, dema: str) -> str:
    """A command that does something else for each of the results."""
    return f"case $(basename {{dir}}) in mean) {mean};; last) {last};; dema-*) {dema};; *) exit 99;; esac"


def evaluated(directory: Path, command: str) -> Evaluation:
    return evaluate(directory, Criterion(command, None, "min")).evaluation


LOSSES = saying("echo loss 0.75", "echo loss 1.5", "echo loss 0.5")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "checkpoints", random_run(seed=1, count=4, dtype=torch.bfloat16), STEPS)


def said(command: str, value: float, goal: str = "min") -> dict[str, Any]:
    """A successful evaluation as JSON has it."""
    whole = {"command": command, "value": value, "problem": "", "metric": "", "stderr": None, "goal": goal}
    return whole | {"best_of": 0, "data": "", "last_value": None, "last_stderr": None}


def record_of(run: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "averaged" / name / "ckavg.json").read_text())
    return record


def complete(run: Path) -> list[str]:
    """The results that have everything in them."""
    files = {"README.md", "ckavg.json", "config.json", "model.safetensors", "tokenizer.json"}
    return [path.name for path in (run / "averaged").iterdir() if path.is_dir() and visible(path) == files]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3.0), ("loss 0.25\nloss 0.125\n", 0.125), ("-0.5", -0.5), ("loss=-0.5", -0.5), ("+7", 7.0), (".5", 0.5),
        ("5.", 5.0), ("The loss is 1.25.", 1.25), ("1e-3", 0.001), ("1.5E+2", 150.0), ("-2.5e-01", -0.25),
        ("accuracy: 87.5%", 87.5), ("[0.5]", 0.5), ("{'loss': 2.25}", 2.25), ("0.5,", 0.5), ("0.25 in 12s", 0.25),
        ("0.25 in 12.5s", 0.25), ("0.25 with 3.75GB", 0.25), ("0.25 with 1.5e3x", 0.25), ("0.25 of v2", 0.25),
        ("0.25 at step10", 0.25), ("0.25 of float32", 0.25), ("0.25 info", 0.25), ("0.25, no finance", 0.25),
        ("12 of 30", 30.0), ("", None), ("done", None), ("12s", None), ("v1.5", None),
    ],
)  # fmt: skip
def test_last_number(text: str, value: float | None) -> None:
    assert last_number(text) == value


@pytest.mark.parametrize(
    ("command", "value", "problem"),
    [
        ("echo 1; echo {dir} >&2; echo 2; printf 'loss 0.375'", 0.375, ""),
        (r": {dir}; printf '\377\376 0.5'", 0.5, ""),  # bytes that are no text
        ("echo 0.5; exit 3 # {dir}", None, "exit status 3"),
        ("echo 0.5; kill -9 $$ # {dir}", None, "exit status -9"),
        ("no-such-command-anywhere {dir}", None, "exit status 127"),
        (": {dir}", None, "it printed no number"),
        *(
            (f": {{dir}}; echo 0.5; echo '{text}'", None, "it printed ")
            for text in ("nan", "loss: NaN", "-inf", "1e999")
        ),
    ],
)
def test_what_it_prints_last_counts(tmp_path: Path, command: str, value: float | None, problem: str) -> None:
    got = evaluated(tmp_path, command)
    assert (got.command, got.value) == (command, value)
    assert got.problem.startswith(problem)
    assert bool(got.problem) == (value is None)


def test_it_reads_no_input(tmp_path: Path) -> None:
    """What is typed ahead stays for the next command, and a command that asks for something does not wait for it."""
    typed, keyboard = os.pipe()
    before = os.dup(0)
    try:
        os.write(keyboard, b"ls\n")
        os.dup2(typed, 0)
        os.close(keyboard)
        assert evaluated(tmp_path, ": {dir}; wc -c").value == 0
        assert os.read(0, 10) == b"ls\n"
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(typed)


NAMES_OF_DIRECTORIES = [
    "plain", "with  two spaces", "it's", 'a "run"', "'both' \"kinds\"", "$(touch canary)",
    "`touch canary`; touch canary & #", "back\\slash\\", "*", "two\nlines", "{dir}é", "-o1", "-n", "~",
    "$HOME `id` ; echo 7 #",
    "\udcff",  # bytes that are no text
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES_OF_DIRECTORIES)
def test_the_directory_may_stand_in_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    directory = Path(name)
    directory.mkdir()
    (directory / "score").write_text("0.625")
    for command in (
        "cat {dir}/score",
        'cat "{dir}/score"',
        "cat '{dir}/score'",
        "cat '{dir}'/\"score\"",
        "test \"{dir}\" = {dir} && test '{dir}' = {dir} && cat {dir}/score",
        "sh -c 'cat \"$1\"/score' - '{dir}'",
        "true \\' \\\" && cat {dir}/score",
        'true "\\"" && cat "{dir}/score"',
        "cat {dir}/score # it's {dir}",
        "cat <<end >/dev/null && cat '{dir}/score'\n{dir} $(echo 7)\nend",
    ):
        assert evaluated(directory, command) == Evaluation(command, 0.625, goal="min"), command
    assert not list(tmp_path.rglob("canary"))


def test_the_directory_is_absolute(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no name is an option, and that a command may change to another place."""
    monkeypatch.chdir(tmp_path)
    command = 'test {dir} = "$PWD/-o1/mean" && ls {dir} >/dev/null && cd / && test -f {dir}/ckavg.json && echo 0.5'
    told = run_cli("sweep", run, "mean", "--out=-o1", "--eval", command, *MIN, "--json")
    assert json.loads(told.stdout)["averages"][0]["evaluation"] == said(command, 0.5)


OF_A_JOB = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1", "ROLE_RANK": "0", "ROLE_NAME": "default", "ROLE_WORLD_SIZE": "2", "NODE_RANK": "0",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_ERROR_FILE": "error.json", "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMI_SIZE": "2",
}  # fmt: skip


def test_it_is_told_nothing_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_the_user = {"LOCAL_MODELS": "a", "MASTER_KEY": "b", "RANKING": "c", "MY_RANK": "d", "CUDA_VISIBLE_DEVICES": "0"}
    for name, value in (OF_A_JOB | of_the_user).items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "told.py"
    script.write_text("import os, json; print(json.dumps(dict(os.environ)), file=open('told', 'w')); print(1)")
    monkeypatch.chdir(tmp_path)
    assert evaluated(tmp_path, f"{sys.executable} told.py {{dir}}").value == 1
    told = json.loads((tmp_path / "told").read_text())
    assert not OF_A_JOB.keys() & told.keys()
    assert told.items() >= of_the_user.items()
    assert told["PATH"] == os.environ["PATH"]
    assert os.environ["RANK"] == "0"


@pytest.mark.exhaustive
def test_it_may_start_torch_distributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OF_A_JOB.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import datetime, os, torch.distributed as distributed\n"
        "if 'RANK' in os.environ:\n"
        "    distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=3))\n"
        "print(0.25)\n"
    )
    assert evaluated(tmp_path, f"{sys.executable} {script} {{dir}}").value == 0.25


@pytest.mark.parametrize(("goal", "winner"), [(("--eval-goal", "min"), 2), (("--eval-goal", "max"), 1)])
def test_table_json_and_records(run: Path, goal: tuple[str, ...], winner: int) -> None:
    result = run_cli("sweep", run, *WORDS, "--eval", LOSSES, *goal)
    assert result.exit_code == 0, result.stderr
    _, _, header, *rows = result.stdout.splitlines()
    assert header.split()[-2:] == ["age", "eval"]
    cells = {row.split()[0]: row.split() for row in rows[:3]}
    assert [cells[name][7] for name in NAMES] == ["0.75", "1.5", "0.5"]
    assert [name for name in NAMES if cells[name][-1] == "best"] == [NAMES[winner]]
    *_, best, following = result.stdout.splitlines()
    assert best == f"best     {run / 'averaged' / NAMES[winner]}"
    assert following.startswith("next     python -c ")
    assert f"{run / 'averaged' / NAMES[winner]}" in following
    assert [line for line in result.stderr.splitlines() if line.startswith("evaluating")] == [
        f"evaluating {name}, {place} of 3" for place, name in enumerate(NAMES, start=1)
    ]
    told = json.loads(run_cli("sweep", run, *WORDS, "--eval", LOSSES, *goal, "--json", "--force").stdout)
    assert told.keys() == {"averages", "best"}
    assert told["best"] == NAMES[winner]
    assert [each["evaluation"] for each in told["averages"]] == [
        said(LOSSES, value, goal[1]) | {"last_value": last} for value, last in ((0.75, 1.5), (1.5, None), (0.5, 1.5))
    ]
    assert [placeless(record_of(run, name)) for name in NAMES] == list(map(placeless, told["averages"]))


def test_the_first_of_equals_is_the_best(run: Path) -> None:
    told = json.loads(
        run_cli("sweep", run, *WORDS, "--eval", saying("echo 2", "echo 1", "echo 1"), *MIN, "--json").stdout
    )
    assert told["best"] == "last"


def test_without_a_command_there_is_no_column_and_no_evaluation(run: Path) -> None:
    table = run_cli("sweep", run, "mean", "last").stdout
    assert "eval" not in table.split("next ")[0]
    assert table.endswith("\nnext     the same with --eval 'COMMAND {dir}' shows which is best\n")
    told = json.loads(run_cli("sweep", run, "mean", "last", "--force", "--json").stdout)
    assert [each["evaluation"] for each in told["averages"]] == [None, None]
    assert "best" not in told
    assert record_of(run, "mean")["evaluation"] is None


def test_a_command_that_fails_costs_nothing_else(run: Path) -> None:
    command = saying("echo 0.5; exit 3", "echo none", "echo 0.75")
    result = run_cli("sweep", run, *WORDS, "--eval", command, *MIN, "--json")
    assert result.exit_code == 0
    assert [line for line in result.stderr.splitlines() if "evaluation" in line] == [
        "warning: mean has no evaluation: exit status 3.",
        "warning: last has no evaluation: it printed no number.",
    ]
    told = json.loads(result.stdout)
    assert told["best"] == "dema-kappa0.5"
    assert [(each["evaluation"]["value"], each["evaluation"]["problem"]) for each in told["averages"]] == [
        (None, "exit status 3"),
        (None, "it printed no number"),
        (0.75, ""),
    ]
    assert placeless(record_of(run, "mean")) == placeless(told["averages"][0])
    assert sorted(complete(run)) == sorted(NAMES)


def test_where_all_fail_there_is_no_best(run: Path) -> None:
    command = "echo one; echo nan {dir} >&2; echo nan"
    result = run_cli("sweep", run, *WORDS, "--eval", command, *MIN)
    assert result.exit_code == 1
    assert result.stderr.count("has no evaluation: it printed nan.") == 3
    assert "error: No evaluation succeeded. The first problem: it printed nan.\n" in result.stderr
    assert result.stderr.endswith(f"command said:\none\nnan\nnan {run / 'averaged' / 'mean'}\n")
    assert result.stdout.count("failed") == 3
    assert "best" not in result.stdout
    assert result.stdout.endswith(f"\nresults  {run / 'averaged'}\n")
    assert sorted(complete(run)) == sorted(NAMES)
    told = run_cli("sweep", run, "mean", "--eval", "false {dir}", *MIN, "--json", "--force")
    assert told.exit_code == 1
    assert "best" not in json.loads(told.stdout)


@pytest.mark.parametrize("command", ["echo 1", "", "echo {DIR}", "echo $dir"])
def test_a_command_without_the_directory_is_refused_before_anything_is_read(run: Path, command: str) -> None:
    before = snapshot(run.parent)
    for source in (run, run / "nowhere"):
        result = run_cli("sweep", source, "mean", "--eval", command, *MIN)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"error: eval is {command!r}; it must contain {{dir}}, which stands for the directory of a result." in (
            result.stderr
        )
    assert snapshot(run.parent) == before


def test_its_stderr_is_shown_and_its_stdout_is_not(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run_cli("sweep", run, "mean", "--eval", ": {dir}; echo half way >&2; echo '{\"loss\": 1}'", *MIN, "--json")
    assert json.loads(result.stdout)["averages"][0]["evaluation"]["value"] == 1
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "half way\n")


def test_it_sees_each_complete_result_once_and_no_snapshot(run: Path, tmp_path: Path) -> None:
    dry = run_cli("sweep", run, "mean", "--eval", f"touch {tmp_path}/ran {{dir}}", *MIN, "--dry-run")
    assert dry.exit_code == 0
    assert not (tmp_path / "ran").exists()
    command = (
        f"echo {{dir}} >> {tmp_path}/seen; test -f {{dir}}/model.safetensors && test -f {{dir}}/ckavg.json; echo 1"
    )
    result = run_cli("sweep", run, "mean", "dema", "--snapshot-every", "100", "--eval", command, *MIN, "-q")
    results = "".join(f"{run}/averaged/{name}\n" for name in ("mean", "dema-kappa0.5"))
    assert (result.exit_code, result.stdout) == (0, results)
    assert (tmp_path / "seen").read_text().splitlines() == [
        str(run / "averaged" / name) for name in ("mean", "dema-kappa0.5")
    ]
    assert record_of(run, "mean")["evaluation"]["value"] == 1
    assert record_of(run, "mean/checkpoint-100")["evaluation"] is None


def test_an_interrupt_ends_the_evaluation_and_keeps_all_averages(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(directory: Path, criterion: Criterion) -> Outcome:
        if directory.name == "last":
            raise KeyboardInterrupt
        return evaluate(directory, criterion)

    monkeypatch.setattr("ckavg.cli.evaluation.evaluate", interrupted)
    result = run_cli("sweep", run, *WORDS, "--eval", LOSSES, *MIN, "--json")
    assert result.exit_code == 130
    assert "interrupted: The evaluation ends here. All averages are complete.\n" in result.stderr
    told = json.loads(result.stdout)
    assert told["best"] == "mean"
    assert [each["evaluation"] and each["evaluation"]["value"] for each in told["averages"]] == [0.75, None, None]
    assert [placeless(record_of(run, name)) for name in NAMES] == list(map(placeless, told["averages"]))
    assert sorted(complete(run)) == sorted(NAMES)
