"""The site: what of it is made from the program, and that it builds, with every link, from nothing elsewhere."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

import ckavg.schemes
from ckavg import errors
from ckavg.cli.app import app
from ckavg.cli.help import ALL
from ckavg.cli.verbs import Verb
from tests.docs.site import ROOT, load_hooks, page

hooks = load_hooks()
PROGRAM = typer.main.get_command(app)
assert isinstance(PROGRAM, TyperGroup)
VERBS = tuple(PROGRAM.commands)
SCHEMES = {scheme.name for scheme in ckavg.schemes.SCHEMES}
SHARED = "Options of every averaging command"


def _section(page: str, heading: str) -> str:
    (text,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#+ |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    return str(text)


@pytest.fixture(scope="module")
def reference() -> str:
    """The command reference as it stands on the site."""
    return page("cli.md")


@pytest.mark.parametrize("verb", VERBS)
def test_the_reference_has_every_option_and_no_other(reference: str, verb: str) -> None:
    assert isinstance(PROGRAM, TyperGroup)
    command = PROGRAM.commands[verb]
    assert isinstance(command, Verb)
    options = [each for each in command.load().params if each.param_type_name == "option"]
    declared = {name for each in options for name in (*each.opts, *each.secondary_opts)}
    section = _section(reference, f"ckavg {verb}")
    listed = _listed(section)
    if verb in SCHEMES or "All [options" in section:
        listed |= _listed(_section(reference, SHARED))
    assert listed == declared - {ALL}


def _listed(section: str) -> set[str]:
    """The options in the generated lines of a section."""
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `-")]
    also = [line for line in section.splitlines() if line.startswith("As in the [averaging")]
    return {name for line in (*rows, *also) for name in re.findall(r"`(-[\w-]+)`", line)}


def test_a_default_is_that_of_the_program(reference: str) -> None:
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| ([^|]+) \|", reference, flags=re.MULTILINE))
    assert rows["--gamma"] == "0.15"
    assert rows["--eta"] == "0.2"
    assert rows["--budget"] == "12"
    assert rows["--replay"] == "off"
    assert rows["--text"] == "required"


def test_every_error_is_explained(reference: str) -> None:
    kinds = {
        name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.CkavgError)
    } - {"CkavgError"}
    rows = re.findall(r"^\| `(\w+)` \| `\w+` \| (.+) \|$", _section(reference, "Errors"), flags=re.MULTILINE)
    assert {name for name, _ in rows} == kinds
    assert all(meaning.endswith(".") for _, meaning in rows)


def test_no_marker_is_left(reference: str) -> None:
    assert "<!--" not in reference


def test_links_of_the_repository_become_links_of_the_site() -> None:
    assert hooks.as_page("[a](docs/cli.md#x) [b](CHANGELOG.md)") == "[a](cli.md#x) [b](changelog.md)"
    assert hooks.as_page("[c d](examples/e.ipynb)") == "c d"


@pytest.mark.exhaustive
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(tmp_path.rglob("*.html"))
    assert {"index.html", "cli.html", "api.html"} <= {each.name for each in built}
    loaded = r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*rel=\"?(?:stylesheet|preconnect)[^>]*href=\"?https?://"
    assert [each.name for each in built if re.search(loaded, each.read_text(encoding="utf-8"))] == []
