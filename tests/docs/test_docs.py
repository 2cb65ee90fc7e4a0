"""What the documents say is what the program does: options, JSON keys, examples, numbers; and they stay short."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

import ckavg
from ckavg.cli.app import app
from ckavg.cli.verbs import Verb
from ckavg.schemes import Scheme
from tests.cli.runner import placeless
from tests.docs.site import page
from tests.reference import load_floats
from tests.runs import random_run, write_run

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CLI = ROOT / "docs" / "cli.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
AVERAGING = ("pema", "bema", "ema", "power", "ouema", "dema", "mean", "weights")
HELP = {"--help", "-h", "--help-all"}
OF_TORCHRUN = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
OF_SLURM = {"--kill-on-bad-exit"}
OF_LM_EVAL = {"--model", "--model_args", "--tasks", "--output_path"}
OF_SERVERS = {"--enable-lora", "--lora-modules", "--outfile", "--base", "--hf-path"}
OF_INSTALLERS = {"--torch-backend"}
OF_MYPY = {"--strict"}
MOST_WORDS = 15_000
FREE_FORM = {"inputs[].files", "outputs[].sha256", "parameters", "selection", "evaluation"}
"""Objects in the record whose keys depend on what was asked for."""

Options = dict[str, object]
"""Default by option name."""


def _program() -> TyperGroup:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def _declared(verb: str) -> Options:
    command = _program().commands[verb]
    assert isinstance(command, Verb)
    parameters = command.load().params
    options = [each for each in parameters if each.param_type_name == "option"]
    return {name: each.default for each in options for name in (*each.opts, *each.secondary_opts)}


VERBS = tuple(_program().commands)
PROGRAM_OPTIONS = {name for each in _program().params for name in each.opts}


def _sections(document: Path) -> dict[str, str]:
    """The text below each heading, up to the next one."""
    return _by_heading(_prose(document))


def _by_heading(text: str) -> dict[str, str]:
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _prose(document: Path) -> str:
    """The document without fenced blocks, in which a `#` is a comment."""
    return re.sub(r"^ *```.*?^ *```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _rows(section: str) -> Iterator[tuple[str, str]]:
    """First and second cell of every row whose first cell is code."""
    for line in section.splitlines():
        if line.startswith("| `"):
            _, first, second, *_ = line.split("|")
            yield first.strip(), second.strip()


def _blocks(document: Path, language: str) -> list[str]:
    pattern = rf"^( *)```{language}\n(.*?)^ *```$"
    found = re.findall(pattern, document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return ["\n".join(line.removeprefix(indent) for line in text.splitlines()) for indent, text in found]


def _commands(document: Path) -> list[list[str]]:
    """Every `ckavg …` line in the shell and console blocks of a document, as words."""
    lines = [
        line for language in ("sh", "console") for text in _blocks(document, language) for line in text.splitlines()
    ]
    stripped = [re.sub(r"^\$ |^torchrun .* -m (?=ckavg )", "", line) for line in lines]
    return [shlex.split(line) for line in stripped if line.startswith("ckavg ")]


# --- options ---


def test_program_options_are_named() -> None:
    assert all(name in CLI.read_text(encoding="utf-8") for name in PROGRAM_OPTIONS | HELP)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_in_the_documents_exists(document: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text(encoding="utf-8")))
    of_others = OF_TORCHRUN | OF_SLURM | OF_LM_EVAL | OF_SERVERS | OF_INSTALLERS | OF_MYPY
    assert named <= PROGRAM_OPTIONS | HELP | of_others | {name for verb in VERBS for name in _declared(verb)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_example_command_parses(document: Path) -> None:
    for _, verb, *words in _commands(document):
        assert verb in VERBS
        assert {word for word in words if word.startswith("-")} <= set(_declared(verb)) | HELP


def test_there_are_examples() -> None:
    assert {verb for _, verb, *_ in _commands(CLI)} == set(VERBS)


def test_they_are_short() -> None:
    words = [word for document in DOCUMENTS for word in _prose(document).split() if re.search(r"[^\W\d_]{2}", word)]
    assert len(words) <= MOST_WORDS
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


# --- links ---


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", _prose(document))
    for target, anchor in links:
        if not target.startswith("http"):
            aim = (document.parent / target) if target else document
            assert aim.exists(), target
            if anchor:
                assert anchor in {
                    "#" + re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in _sections(aim)
                }


# --- JSON ---


def _keys(value: Any, prefix: str = "") -> set[str]:
    """Dotted names of all leaves, `[]` for the elements of a list of objects."""
    if isinstance(value, dict) and prefix not in FREE_FORM:
        return {name for key, inner in value.items() for name in _keys(inner, f"{prefix}.{key}".removeprefix("."))}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _keys(value[0], f"{prefix}[]")
    return {prefix}


def _documented_keys(heading: str) -> set[str]:
    return {name for names, _ in _rows(_by_heading(page("json.md"))[heading]) for name in re.findall(r"`(.+?)`", names)}


def _json_of(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "checkpoints", random_run(0, 4, torch.float32), (0, 50, 100, 150))


@pytest.mark.parametrize("verb", AVERAGING)
def test_json_of_an_average(source: Path, verb: str) -> None:
    required = ("--weights", "0.1,0.2,0.3,0.4") if verb == "weights" else ()
    told = _json_of(verb, source, "--json", *required)
    assert _keys(told) == _documented_keys("The JSON object")
    assert told["parameters"].keys() <= {
        name[2:].replace("-", "_") for name in set(_declared(verb)) if name.startswith("--")
    }
    written = json.loads((Path(told["outputs"][0]["directory"]) / "ckavg.json").read_bytes())
    assert placeless(written) == placeless(told)


def test_json_of_a_dry_run(source: Path) -> None:
    assert _keys(_json_of("pema", source, "--json", "--dry-run")) == _documented_keys("The JSON object of a dry run")


def test_json_of_path(source: Path) -> None:
    told = _json_of("path", source, "--json")
    told["tensors"] = {"*": next(iter(told["tensors"].values()))}
    assert _keys(told) == _documented_keys("The JSON object of path")


def test_json_of_inspect(source: Path) -> None:
    assert _keys(_json_of("inspect", source, "--json")) == _documented_keys("The JSON object of inspect")


def test_json_of_inspect_deep(tmp_path: Path) -> None:
    still = write_run(tmp_path / "still", random_run(0, 1, torch.float32) * 2, (0, 50))
    told = _json_of("inspect", still, "--sha256", "--json")
    told["health"]["sha256"] = next(iter(told["health"]["sha256"].values()))
    documented = _documented_keys("The JSON object of inspect") | _documented_keys("The health object")
    assert _keys(told) == documented


def test_json_of_verify(source: Path) -> None:
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA()).directory
    assert _keys(_json_of("verify", result, "--json")) == _documented_keys("The JSON object of verify")


def test_documented_selection(source: Path) -> None:
    further = ("--skip-incomplete", "--common-only", "--copy", "trainer_state.json")
    state = {"global_step": 150, "log_history": [{"step": step, "loss": 1.0} for step in (50, 100, 150)]}
    (source / "checkpoint-150/trainer_state.json").write_text(json.dumps(state))
    best = ("--best", 3, "--metric", "loss", "--goal", "max")
    every = ("--init", source / "checkpoint-0", "--init-step", 1, "--every", 50, "--burn-in", 50)
    told = _json_of("bema", source, "--json", *every, "--from-step", 50, "--to-step", 150, "--last", 3, *further, *best)
    row = _by_heading(page("json.md"))["The JSON object"].partition("`selection` holds")[2].partition("`evaluation`")[0]
    assert told["selection"].keys() == set(re.findall(r"`(\w+)`", row))


# --- the worked example ---


def _cells(label: str) -> list[str]:
    """The row of the worked example that begins with `label`."""
    lines = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in row.split("|")[2:-1]]


@pytest.mark.parametrize(
    ("scheme", "name", "first"),
    [
        (ckavg.PEMA(), "PEMA", "0.8340 with PEMA"),
        (ckavg.EMA(), "EMA", "0.7634 with EMA"),
        (ckavg.BEMA(), "BEMA", "0.4812 with BEMA"),
    ],
    ids=("pema", "ema", "bema"),
)
def test_worked_example(tmp_path: Path, scheme: Scheme, name: str, first: str) -> None:
    of_step = {step: _cells(str(step)) for step in (0, 100, 200, 300)}
    weights = [
        {
            "w": torch.tensor([float(value) for value in w.split(",")]),
            "bias": torch.tensor([float(value) for value in bias.split(",")]),
        }
        for w, bias in of_step.values()
    ]
    run = ckavg.open_run(write_run(tmp_path / "run", weights, tuple(of_step)))
    result = ckavg.average(run, scheme, out=tmp_path / "out")
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")

    assert _cells(f"{name}, β") == ["" if beta is None else f"{beta:.6f}" for beta in result.betas]
    assert _cells(f"{name}, weight") == [f"{weight:.6f}" for weight in result.weights]
    if result.alphas is not None:
        assert _cells(f"{name}, α") == ["" if alpha is None else f"{alpha:.6f}" for alpha in result.alphas]
    if result.path_length is not None:
        assert "ℓ = 0, " + ", ".join(f"{length:.6f}" for length in result.path_length[1:]) in text
        assert f"T · ℓ_K = 300 · {result.path_length[-1]:.6f} = {300 * result.path_length[-1]:.3f}" in text
    averaged = load_floats(result.directory)
    assert f"{averaged['w'][0]:.4f} with {name}" == first
    assert first in text
    assert f"{averaged['bias'][0]:.4f}" in text
