"""What a person sees while and after a command runs, as whole screens; `screens.py` records them anew."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.cli.runner import run_cli
from tests.cli.screens import ASCII, DUMB, NO_COLOUR, ROOT, compare, run_in_pipe, run_in_terminal
from tests.exhaustive import unless
from tests.runs import random_run, write_run

STEPS = (0, 30, 60, 100, 120, 150)
NEGATIVE = "bema run --eta 0 --kappa 0.1"
SWEEP = "sweep run pema:gamma=0.1,0.3 bema:eta=0,kappa=0.1 mean:last=2 last"
JUDGE = "case {dir} in *mean*) echo loss 2.5;; *) echo loss 3.5;; esac"
JUDGED = f'--eval "{JUDGE}" --eval-metric loss'

COMMANDS = {
    "pema": ("pema run", ""),
    "pema-dry-run": ("pema run --dry-run", ""),
    "pema-up-to-date": ("pema run", "pema run -q"),
    "bema-negative": (NEGATIVE, f"{NEGATIVE} -q"),
    "sweep": (SWEEP, ""),
    "sweep-judged": (f"{SWEEP} {JUDGED}", f"{SWEEP} {JUDGED} -q"),
    "best": (f"best run {JUDGED} --budget 4", ""),
    "path": ("path run", ""),
    "inspect": ("inspect run", ""),
    "ls": ("ls run", f"{SWEEP} {JUDGED} -q"),
    "diff": ("diff run/averaged/pema-gamma0.15 run/averaged/mean", "sweep run pema mean -q"),
    "verify": ("verify run/averaged/mean", "mean run -q"),
}
"""By the name of a screen: its command, and the one that comes before it."""

QUICK = ("pema-dry-run", "pema-up-to-date", "bema-negative", "sweep-judged", "inspect", "ls")
"""Those that do not wait for torch."""

TERMINALS = {"no-colour": NO_COLOUR, "dumb": DUMB, "ascii": ASCII, "ascii-dumb": ASCII | DUMB}


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a run in it, so that screens name it in one way."""
    write_run(tmp_path / "run", random_run(1, len(STEPS), torch.float32), STEPS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(name: str) -> Sequence[str]:
    """Do what comes before a command, and give its words."""
    command, before = COMMANDS[name]
    if before:
        assert run_cli(*shlex.split(before)).exit_code == 0
    return shlex.split(command)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        pytest.param(name, columns, marks=unless(name in QUICK or columns == 80))
        for name in COMMANDS
        for columns in (60, 80, 120)
    ],
)
def test_screens(cwd: Path, name: str, columns: int) -> None:
    shown = run_in_terminal(*prepare(name), columns=columns, cwd=cwd)
    assert shown.status == 0, shown.text
    compare(f"{name}-{columns}", shown.text)
    assert "\x1b[" in shown.raw
    assert "\x1b[35m" not in shown.raw, "nothing is magenta"
    assert "249;38;114" not in shown.raw, "nor pink"


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("name", ["pema", "bema-negative", "sweep-judged", "inspect"])
def test_terminals_that_show_less(cwd: Path, name: str, terminal: str) -> None:
    shown = run_in_terminal(*prepare(name), environment=TERMINALS[terminal], cwd=cwd)
    assert shown.status == 0, shown.text
    compare(f"{name}-{terminal}", shown.text)
    if terminal != "ascii":
        assert "\x1b" not in shown.raw
    if "ascii" in terminal:
        assert shown.raw.isascii()
        assert "?" not in shown.text


@pytest.mark.parametrize("name", ["pema", "sweep-judged"])
def test_pipes(cwd: Path, name: str) -> None:
    out, err = run_in_pipe(*prepare(name), cwd=cwd)
    assert out.status == 0, err.text
    compare(f"{name}-piped", f"{err.text}--- stdout ---\n{out.text}")
    assert "\x1b" not in out.raw + err.raw


def test_colours_are_few(cwd: Path) -> None:
    raw = run_in_terminal(*prepare("sweep-judged"), cwd=cwd).raw
    (best,) = (line for line in raw.splitlines() if line.startswith("\x1b[32m") and "mean" in line)
    assert best.rstrip().endswith("\x1b[0m")
    assert "\x1b[36mrun/averaged/mean-last2\x1b[0m" in raw, "where the best is"


def test_the_first_line_comes_before_torch(cwd: Path) -> None:
    """And the last says what goes on after all bytes: both are said in a terminal, though they are gone in the end."""
    raw = run_in_terminal("pema", "run", cwd=cwd).raw
    order = [
        raw.index(text)
        for text in (
            "looking for checkpoints in run",
            "reading 6 checkpoints in run: 2.6 MB for the path",
            "pass 1 of 2, measuring the path",
            "pass 2 of 2, averaging",
            "syncing and hashing",
            "writing card and record",
            "Pathwise EMA (PEMA)",
        )
    ]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (("pema", "run"), "run/averaged/pema-gamma0.15\n"),
        (("ema", "run", "--out", "a b/é"), "a b/é\n"),
        (("sweep", "run", "mean", "last"), "run/averaged/mean\nrun/averaged/last\n"),
        (("best", "run", *shlex.split(JUDGED), "--budget", "2"), "run/averaged/best\n"),
        (("inspect", "run"), ""),
        (("path", "run"), ""),
        (("diff", "run/checkpoint-0", "run/averaged/mean"), ""),
        (("verify", "run/averaged/mean"), ""),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_quiet_prints_where_the_results_are_alone(cwd: Path, words: tuple[str, ...], printed: str) -> None:
    assert run_cli("mean", "run", "-q").stdout == "run/averaged/mean\n"
    for _ in range(2):  # the second time, what is there is up to date
        done = run_cli(*words, "-q", *(["--force"] if words[0] == "best" else []))
        assert (done.exit_code, done.stdout) == (0, printed)
    assert run_cli(*words[:1], "nowhere", "-q").stdout == ""


def test_a_quiet_result_is_a_path_to_the_byte(cwd: Path) -> None:
    name = "r\udcffs\x1bé"
    shutil.move("run", name)
    command = [sys.executable, "-m", "ckavg", "mean", name, "-q"]
    ran = subprocess.run(command, env=os.environ | ASCII | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
    assert ran.stdout == os.fsencode(name) + b"/averaged/mean\n"
    shown = run_in_terminal("mean", name, "-q", environment=NO_COLOUR, cwd=cwd)
    assert (shown.status, "\x1b" in shown.raw) == (0, False), "a terminal would obey it"
