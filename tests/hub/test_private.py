"""What is uploaded tells nothing of the machine it was made on, and no secret, whatever the command line held."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import ckavg
from ckavg.output.output_path import LOCAL
from ckavg.storage.redaction import without_paths, without_secrets
from tests.cli.runner import run_cli
from tests.exhaustive import all_but
from tests.hub.server import Hub
from tests.runs import random_run, write_checkpoint, write_run

REPO = "ada/averaged"
STEPS = (0, 10, 20)
TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ0123456789"
SECRETS = {
    "a token": f"--token {TOKEN}",
    "an option": "--api-key plainword77",
    "an option with =": "--hf-token=plainword77",
    "a quoted option": "--password 'plain word77'",
    "a variable": "AWS_SECRET=plain/word77",
    "an exported variable": "API_KEY=plainword77",
    "an address": "https://ada:plainword77@example.org/data",
    "an address with a token": "https://plainword77@example.org/data",
    "a signed address": "'https://example.org/data?X-Amz-Signature=plainword77&x=1'",
    "a header": "-H 'Authorization: Bearer plainword77'",
    "JSON": """'{"api_key": "plainword77", "n": 1}'""",
    "arguments": "--model_args token=plainword77,dtype=float16",
    "curl": "-u ada:plainword77",
    "of the environment": "plainword77",
}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A run, its base model, a home and a place for results, each below a directory of an unusual name."""
    found = {name: tmp_path / f"Zqx-{name}" / "deep er" for name in ("run", "base", "home", "out", "cwd")}
    for place in found.values():
        place.mkdir(parents=True)
    weights = random_run(0, len(STEPS) + 1, torch.float32)
    write_run(found["run"] / "ckpts", weights[1:], STEPS)
    write_checkpoint(found["base"] / "model", weights[0])
    (found["run"] / "ckpts" / "README.md").write_text("---\nlicense: [mit\n---\n")
    (found["run"] / "eval.py").write_text("print(0.5)\n")
    monkeypatch.setenv("HOME", str(found["home"]))
    monkeypatch.setenv("USER", "zqxuser")
    monkeypatch.setattr("platform.node", lambda: "zqxhost")
    monkeypatch.setenv("MY_PLAIN_TOKEN", "plainword77")
    monkeypatch.chdir(found["cwd"])
    return found


def assert_private(files: dict[str, bytes]) -> None:
    for name, data in files.items():
        text = data.decode(errors="replace")
        for word in ("Zqx", "zqx", "deep er", "word77", TOKEN, TOKEN[3:12]):
            assert word not in text, (name, word, text[max(0, text.find(word) - 99) : text.find(word) + 99])


VERBS = (("pema",), ("bema",), ("ema",), ("ouema",), ("dema",), ("mean",), ("sweep", "ema"))


@pytest.mark.parametrize("words", all_but((("ema",), ("sweep", "ema")), VERBS), ids=lambda words: str(words[0]))
@pytest.mark.parametrize("where", ["in the run", "elsewhere", "relative"])
def test_nothing_of_the_machine_is_uploaded(
    hub: Hub, places: dict[str, Path], words: tuple[str, ...], where: str
) -> None:
    verb, *more = words
    run = places["run"] / "ckpts"
    source = Path(os.path.relpath(run)) if where == "relative" else run
    out: list[str | Path] = [] if where == "in the run" else ["--out", places["out"] / "result"]
    command = f"cd {places['run']}; echo ada@zqxhost ~/x zqxuser {places['home']}/y"
    command += f"; python eval.py {{dir}} --token {TOKEN}; echo 7"
    evaluation = ["--eval", command, "--eval-goal", "min"] if verb == "sweep" else []
    init: list[str | Path] = ["--init", places["base"] / "model", "--init-step", "-10"]
    settings = ["--snapshot-every", "10", "--match", "checkpoint-*"]
    done = run_cli(verb, source, *more, *init, *settings, *evaluation, *out, "--push-to-hub", REPO)
    assert done.exit_code == 0, done.output
    uploaded = hub.files(REPO)
    assert_private(uploaded)
    assert LOCAL not in uploaded
    record = json.loads(uploaded["ckavg.json"])
    assert record["source"] == ("../.." if where == "in the run" else "RUN")
    assert [each["directory"] for each in record["inputs"]] == ["BASE_MODEL", *(f"checkpoint-{step}" for step in STEPS)]
    assert any("RUN/README.md" in each for each in record["warnings"])
    assert (record["evaluation"] is not None) == (verb == "sweep")
    result = run / "averaged" if where == "in the run" else places["out"]
    (result,) = (path.parent for path in result.rglob(LOCAL))
    kept = json.loads((result / LOCAL).read_bytes())
    assert (kept["source"], kept["init"]) == (str(Path(source).absolute()), str(places["base"] / "model"))
    assert any(f"{source}/README.md" in each for each in kept["warnings"])
    for place in (result, result / "checkpoint-10"):
        assert ckavg.verify_result(place, sources=True, replay=True).problems == ()
        ckavg.push(place, "ada/again")
    assert_private(hub.files("ada/again"))
    (result / LOCAL).unlink()
    assert ckavg.verify_result(result).problems == ()
    base, moved = places["base"] / "model", None if where == "in the run" else run
    assert ckavg.verify_result(result, sources=True, init=base, source=moved).problems == ()
    unknown = record["inputs"][: 1 if where == "in the run" else None]
    problems = ckavg.verify_result(result, sources=True).problems
    assert len(problems) == sum(each["checksum"] is not None for each in unknown)


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_of_a_command(places: dict[str, Path], kind: str) -> None:
    shown = without_paths(without_secrets(f": {{dir}} {SECRETS[kind]}; echo 7"), [])
    assert_private({kind: shown.encode()})
    assert shown.startswith(": {dir} ")
    assert shown.endswith("; echo 7")


def test_no_secret_of_a_command_is_uploaded(hub: Hub, places: dict[str, Path]) -> None:
    source = places["run"] / "ckpts"
    command = f": {{dir}} {'; : '.join(SECRETS.values())}; echo 7"
    done = run_cli("sweep", source, "mean", "--eval", command, "--eval-goal", "min", "--push-to-hub", REPO)
    assert done.exit_code == 0, done.output
    assert_private(hub.files(REPO))
    evaluation = json.loads(hub.files(REPO)["ckavg.json"])["evaluation"]
    assert evaluation["command"].startswith(": {dir} ")
    assert evaluation["command"].endswith("; echo 7")
    assert evaluation["value"] == 7
    assert "word77" not in (source / "averaged" / "mean" / LOCAL).read_text()


@pytest.mark.parametrize(
    "command",
    [
        "python eval.py {dir} --max-new-tokens 128 --tokenizer gpt2 --batch_size=8 | tail -1",
        "lm_eval --model hf --model_args pretrained={dir},dtype=bfloat16 --tasks arc_easy",
        "python -m tool --key-bias 1 {dir} 2>&1 && cat a/b.json",
        "curl https://example.org/a/b hf://owner/name@main/x s3://bucket/run; f {dir} $HF_TOKEN --token $HF_TOKEN",
    ],
)
def test_a_command_that_holds_no_secret_stays(command: str) -> None:
    assert without_paths(without_secrets(command), []) == command


def test_a_base_model_is_no_path(places: dict[str, Path]) -> None:
    for step in STEPS:
        config = places["run"] / "ckpts" / f"checkpoint-{step}" / "config.json"
        config.write_text(json.dumps({"model_type": "llama", "_name_or_path": str(places["base"] / "model")}))
    result = ckavg.average(ckavg.open_run(places["run"] / "ckpts"), ckavg.EMA()).directory
    assert "base_model" not in (result / "README.md").read_text()


def test_the_result_moves_with_its_run(places: dict[str, Path], tmp_path: Path) -> None:
    source = places["run"] / "ckpts"
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA(), snapshot_every=10).directory
    shutil.move(source, tmp_path / "moved")
    moved = tmp_path / "moved" / result.relative_to(source)
    for place in (moved, moved / "checkpoint-10"):
        assert ckavg.verify_result(place, sources=True, replay=True).problems == ()


def test_a_record_with_paths_of_its_machine_is_verified(hub: Hub, places: dict[str, Path], tmp_path: Path) -> None:
    """As it was written before; who uploads it is told."""
    source = places["run"] / "ckpts"
    run = ckavg.open_run(source, init=places["base"] / "model", init_step=-10)
    for out in (None, tmp_path / "out"):
        done = ckavg.average(run, ckavg.EMA(), out=out)
        (done.directory / LOCAL).unlink()
        (done.directory / "ckavg.json").write_bytes(done.to_bytes())
        assert ckavg.verify_result(done.directory, sources=True, replay=True).problems == ()
        pushed = ckavg.push(done.directory, REPO)
        assert "ckavg.json was written by an earlier version: it names directories of this machine." in pushed.warnings
