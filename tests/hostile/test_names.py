"""Names that a terminal would obey, in every place a name may come from: shown as escapes, and never acted upon."""

from __future__ import annotations

import json
import os
import re
import subprocess
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.runner import placeless, run_cli, snapshot
from tests.exhaustive import all_but
from tests.hostile.contract import check_text, write_small_run

NAMES = {
    "escape": "a\x1b[31mb\x1b]0;title\x07",
    "csi": "a\x9b31mb",
    "newline": "a\nerror: b\n---\n",
    "return": "a\rb\x08\x7f",
    "bidi": "a\u202egpj.exe\u202c\u2066b\u2069",
    "invisible": "a\u200b\u00ad\ufeffb\u2028c\U000e0041",
    "markup": "[red]a[/red][link=https://example.org]b[/link] :smile: [/]",
    "card": "a | b | --- `c` <b> *d* # e",
    "no text": os.fsdecode(b"a\xff\xfeb"),
    "accents": "mod\u00e8le \u6a21\u578b \U0001f600",
}
VERBS = ("pema", "bema", "ema", "ouema", "dema", "mean")


def shown(name: str) -> str:
    return name if name.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def said(*arguments: str | Path, status: int = 0) -> tuple[str, str]:
    result = run_cli(*arguments)
    assert result.exit_code == status, result.stderr
    for text in (result.stdout, result.stderr):
        check_text(text)
        assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co") for char in text.replace("\n", ""))
    return result.stdout, result.stderr


@pytest.fixture(params=all_but(("escape", "newline", "bidi", "card", "no text"), NAMES))
def name(request: pytest.FixtureRequest) -> str:
    return NAMES[request.param]


@pytest.fixture
def run(tmp_path: Path, name: str) -> Path:
    return write_small_run(tmp_path / name.replace("/", "_"))


def unwrapped(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_directories(run: Path) -> None:
    name = run.name
    assert unwrapped(shown(name)) in unwrapped(said("inspect", run)[0])
    assert json.loads(said("inspect", "--json", run)[0])["source"] == str(run)
    for verb in VERBS:
        assert unwrapped(shown(name)) in unwrapped(said(verb, "--dry-run", run)[0])
        record = json.loads(said(verb, "--json", run)[0])
        place = Path(record["outputs"][-1]["directory"])
        assert place.parent.parent == run
        assert placeless(json.loads((place / "ckavg.json").read_bytes())) == placeless(record)
    said("path", run, "--csv", run / "averaged" / f"{name.replace('/', '_')}.csv")
    assert json.loads(said("sweep", run, "mean", "last", "--json", "--force")[0])["averages"]
    assert unwrapped(shown(name)) in unwrapped(said("sweep", run, "mean", "ema", "--force")[0])


def test_results(run: Path) -> None:
    out = run / run.name
    stdout, _ = said("mean", run, "--out", out)
    assert shown(run.name) in stdout
    card = (out / "README.md").read_text()
    check_text(card)
    assert card.count("\n---\n") == 1
    assert card.count("\n# ") == 1
    assert {path.name for path in out.iterdir()} >= {"README.md", "ckavg.json", "model.safetensors"}


def test_the_next_command_can_be_typed(run: Path) -> None:
    """What is offered for copying names the same directory in a shell, whatever the name is."""
    line = next(line for line in said("inspect", run)[0].splitlines() if line.startswith("next     ckavg pema "))
    words = line.removeprefix("next     ckavg pema ")
    printed = subprocess.run(["bash", "-c", f"printf %s {words}"], capture_output=True, check=True).stdout
    assert printed == os.fsencode(run)


def test_errors(run: Path) -> None:
    (run / "checkpoint-20" / "model.safetensors").write_bytes(b"short")
    for verb in (*VERBS, "path"):
        _, stderr = said(verb, run, status=1)
        assert shown(run.name) in stderr
        assert stderr.count("\n") == 2
    _, stderr = said("sweep", run, "mean", status=1)
    stdout, _ = said("inspect", run, status=1)
    assert unwrapped(shown(run.name)) in unwrapped(stdout)
    assert len(re.findall("^problem: ", stdout, re.MULTILINE)) == 1
    (problem,) = json.loads(said("inspect", "--json", run, status=1)[0])["problems"]
    assert str(run) in problem


def test_missing_things(tmp_path: Path, name: str) -> None:
    run = write_small_run(tmp_path / "run")
    before = snapshot(run)
    named = name.replace("/", "_")
    for arguments in (
        ("inspect", tmp_path / named),
        ("ema", run, "--init", tmp_path / named),
        ("ema", run, "--csv", tmp_path / named),
        ("ema", run, f"--{named}"),
        ("ema", run, named),
        ("ema", run, "--dtype", named),
        ("ema", run, "--device", named),
        ("ema", run, "--gamma", named),
        ("ema", run, "--plot", tmp_path / named),
        ("sweep", run, f"pema:{named}=1"),
        ("sweep", run, "pema:gamma=" + named),
        ("sweep", run, "mean", "--eval", named, "--eval-goal", "min"),
        (named,),
    ):
        result = run_cli(*arguments)
        assert result.exit_code in (1, 2)
        assert result.stderr.strip()
        check_text(result.stderr)
        check_text(result.stdout)
    assert snapshot(run) == before


def test_tensors(tmp_path: Path, name: str) -> None:
    if name.encode(errors="ignore").decode() != name:
        pytest.skip("a tensor's name is text")
    run = tmp_path / "run"
    for step in range(3):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        save_file(
            {name: torch.ones(3) * step, "w": torch.arange(3.0) + step},
            run / f"checkpoint-{step}" / "model.safetensors",
        )
    stdout, stderr = said("path", run)
    assert unwrapped(shown(name))[:40] in unwrapped(stdout + stderr)
    assert name in json.loads(said("path", run, "--json")[0])["tensors"]
    said("pema", run, "--path-exclude", name)
    card = (run / "averaged" / "pema-gamma0.15" / "README.md").read_text()
    check_text(card)
    (command,) = re.findall("^    (ckavg pema .*)$", card, re.MULTILINE)
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    assert name.encode() in words.split(b"\0")
    assert name in load_file(run / "averaged" / "pema-gamma0.15" / "model.safetensors")
    spoilt = load_file(run / "checkpoint-2" / "model.safetensors")
    spoilt[name][1] = torch.nan
    save_file(spoilt, run / "checkpoint-2" / "model.safetensors")
    _, stderr = said("mean", run, "--force", status=1)
    assert "holds NaN or infinity" in stderr
    save_file({"w": torch.ones(4)}, run / "checkpoint-1" / "model.safetensors")
    _, stderr = said("mean", run, "--force", status=1)
    assert "is missing" in stderr


def test_configs_and_side_files(tmp_path: Path, name: str) -> None:
    run = write_small_run(tmp_path / "run")
    config = {"model_type": name, "architectures": [name + "ForCausalLM"], "_name_or_path": name, "torch_dtype": name}
    text = json.dumps(config)
    for step in (0, 10, 20):
        (run / f"checkpoint-{step}" / "config.json").write_text(text)
    (run / "checkpoint-20" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"a/{name}"}))
    (run / "checkpoint-20" / f"{name.replace('/', '_')}.json").write_text("{}")
    (run / "checkpoint-10" / "trainer_state.json").write_text(name, errors="surrogateescape")
    (run / f"epoch_{name.replace('/', '_')}").mkdir()
    said("mean", run, "--dry-run")
    record = json.loads(said("mean", run, "--json")[0])
    assert f"{name.replace('/', '_')}.json" in record["outputs"][-1]["files"]
    said("mean", run, "--force")
    result = run / "averaged" / "mean"
    assert (result / "config.json").read_text() == text
    card = (result / "README.md").read_text()
    check_text(card)
    front = card.split("\n---\n")[0]
    assert re.fullmatch(
        r"---\n(?:base_model: a/[\w.-]+\n)?library_name: peft\n"
        r"tags:(?:\n- [\w.-]+)+(?:\nbase_model_relation: adapter)?",
        front,
    )


def test_words_of_an_evaluation(tmp_path: Path) -> None:
    run = write_small_run(tmp_path / "run")
    said("sweep", run, "mean", "--eval", "printf '\x1b[31m\u202e 0.5'; : {dir}", "--eval-goal", "min")
    record = json.loads((run / "averaged" / "mean" / "ckavg.json").read_text())
    assert record["evaluation"]["value"] == 0.5
    failing = ("--eval", "printf '\x1b[31m'; : {dir}", "--eval-goal", "min")
    _, stderr = said("sweep", run, "mean", "--force", *failing, status=1)
    assert "no number" in stderr
