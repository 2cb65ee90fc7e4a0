"""Help and errors as a person sees them: whole screens, at several widths and in plain terminals."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ckavg.cli.help import DOCUMENTATION, EXAMPLES, MOST_LINES
from ckavg.cli.verbs import VERBS, Verb
from tests.cli.screens import ASCII, DUMB, NO_COLOUR, ROOT, Shown, compare, run_in_pipe, run_in_terminal

WIDTHS = (60, 80, 120)
for verb in VERBS:  # what is imported here is there in the processes that are forked
    Verb(verb).load()
ERRORS = {
    "no-such-verb": "pemma",
    "no-such-option": "pema --gama 0.2",
    "not-a-number": "pema --gamma much",
    "not-a-choice": "sweep . mean --dtype int8",
    "missing-argument": "diff averaged/mean",
    "outside-its-domain": "pema . --gamma -1",
    "no-such-parameter": "sweep . pema:gama=0.1",
    "no-such-directory": "ema /data/runs/a-rather-long-name-of-a-training-run/checkpoints-of-the-last-week",
    "a-command-to-copy": "watch nowhere pema",
}


def shown_by(*words: str | Path, columns: int = 80, **more: Any) -> Shown:
    return run_in_terminal(*words, columns=columns, warm=True, **more)


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen(verb: str) -> None:
    shown = shown_by(verb, "--help")
    assert shown.status == 0
    assert len(shown.text.splitlines()) <= MOST_LINES
    compare(f"help-{verb}", shown.text)


@pytest.mark.parametrize("columns", WIDTHS)
def test_help_of_the_program(columns: int) -> None:
    shown = shown_by("--help", columns=columns)
    if columns >= 80:
        assert len(shown.text.splitlines()) <= MOST_LINES
    compare(f"help-{columns}", shown.text)


@pytest.mark.parametrize("verb", ["pema", "bema", "sweep"])
@pytest.mark.parametrize("columns", [60, 120])
def test_help_at_other_widths(verb: str, columns: int) -> None:
    shown = shown_by(verb, "--help", columns=columns)
    longest = max(map(len, shown.text.splitlines()))
    assert longest <= columns
    compare(f"help-{verb}-{columns}", shown.text)


@pytest.mark.parametrize("columns", WIDTHS)
def test_all_options(columns: int) -> None:
    shown = shown_by("pema", "--help-all", columns=columns)
    assert max(map(len, shown.text.splitlines())) <= columns
    compare(f"help-all-{columns}", shown.text)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, columns: int, tmp_path: Path) -> None:
    shown = shown_by(*ERRORS[name].split(), columns=columns, cwd=tmp_path)
    assert shown.status == (1 if name == "no-such-directory" else 2)
    assert shown.text.startswith("error: ")
    assert "\nhint: " in shown.text
    compare(f"error-{name}-{columns}", shown.text)


def test_what_would_be_copied_stays_in_one_piece(tmp_path: Path) -> None:
    place = tmp_path / "my run"
    place.mkdir()
    assert str(place) in shown_by("pema", place, columns=60).raw
    assert "ckavg watch ./checkpoints pema mean:last=5" in shown_by("watch", "nowhere", "pema", columns=60).raw


@pytest.mark.parametrize(("name", "environment"), [("no-colour", NO_COLOUR), ("dumb", DUMB), ("ascii", ASCII)])
def test_plain_terminals(name: str, environment: dict[str, str]) -> None:
    screens = [run_in_terminal(*words, environment=environment) for words in (("bema", "--help"), ("bema", "--eta"))]
    text = "".join(shown.text for shown in screens)
    assert name == "ascii" or not any("\x1b" in shown.raw for shown in screens)
    assert name != "ascii" or text.isascii()
    assert "?" not in text
    compare(f"plain-{name}", text)


def test_pipes() -> None:
    out, err = run_in_pipe("bema", "--help")
    assert (out.status, err.text) == (0, "")
    assert "\x1b" not in out.text
    assert out.text.split() == run_in_terminal("bema", "--help").text.split()
    out, err = run_in_pipe("bema", "--gama", "0.1")
    assert (err.status, out.text) == (2, "")
    assert err.text.count("\n") == 2
    assert "\x1b" not in err.text


def test_without_arguments() -> None:
    out, err = run_in_pipe()
    assert (out.status, err.text) == (2, "")
    assert out.text == run_in_pipe("--help")[0].text


def test_examples_are_of_the_verb_and_of_its_options() -> None:
    assert EXAMPLES.keys() == VERBS.keys()
    for verb, lines in EXAMPLES.items():
        whole = (ROOT / "tests" / "cli" / "screens" / f"help-{verb}.txt").read_text(encoding="utf-8")
        assert all(line in whole for line in lines)
        assert max(map(len, lines)) <= min(WIDTHS) - 2
        assert any(line.startswith(f"ckavg {verb}") for line in lines)


def test_it_names_the_documentation() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Documentation"] == DOCUMENTATION
    headings = re.findall(r"^#+ ckavg (\w+)$", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {*headings} == {*VERBS}
