"""The environment that users of huggingface_hub know, in processes of their own; and a model that loads by its name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

import ckavg
from ckavg.hub.transfer import tries_again
from tests.hub.state import TOKEN, Hub
from tests.runs import write_run

REPO = "ada/averaged"


def pushed(result: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """`ckavg push` as a user types it; None takes a variable away."""
    merged = {**os.environ, **environment}
    env = {name: value for name, value in merged.items() if value is not None}
    command = [sys.executable, "-m", "ckavg", "push", str(result), REPO, "--verbose"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_stored_token(hub: Hub, result: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    done = pushed(result, HF_TOKEN=None, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"url      {hub.url}/{REPO}"
    assert hub.files(REPO)["config.json"] == (result / "config.json").read_bytes()


def test_an_implicit_token_may_be_forbidden_elsewhere(hub: Hub, result: Path) -> None:
    """Who says `push` says that the token is to be used."""
    assert pushed(result, HF_HUB_DISABLE_IMPLICIT_TOKEN="1").returncode == 0


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(hub: Hub, result: Path, name: str) -> None:
    done = pushed(result, **{name: "1"})
    assert done.returncode == 1
    assert "huggingface_hub is in offline mode" in done.stderr
    assert hub.requests == []


def test_nobody_is_logged_in(hub: Hub, result: Path) -> None:
    done = pushed(result, HF_TOKEN=None)
    assert done.returncode == 1
    assert "hf auth login" in done.stderr
    assert f"Continue with: ckavg push {result} {REPO}" in done.stderr


@pytest.mark.skipif(huggingface_hub.__version__ == "1.0.1", reason="its HF_DEBUG fails at the first file that it sends")
def test_debugging_shows_no_token(hub: Hub, result: Path) -> None:
    done = pushed(result, HF_DEBUG="1")
    assert done.returncode == 0, done.stderr
    assert "<TOKEN>" in done.stderr


def test_with_xet_a_server_without_it_is_told(hub: Hub, result: Path) -> None:
    """The client's other transfer, in Rust, has errors of its own."""
    done = pushed(result, HF_HUB_DISABLE_XET=None)
    if done.returncode == 0 and not tries_again():
        assert hub.sent, "early versions ask first which transfer the server knows"
        return
    assert done.returncode == 1
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1
    assert "uploading model-00001-of-00003.safetensors failed" in done.stderr
    assert "the token may not see it (404)" in done.stderr


def test_transformers_loads_it_by_its_name(hub: Hub, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    source = tmp_path / "run"
    for step in (0, 10):
        torch.manual_seed(step)
        transformers.LlamaForCausalLM(config).save_pretrained(source / f"checkpoint-{step}")
    out = ckavg.average(ckavg.open_run(source), ckavg.EMA()).directory
    ckavg.push_result(out, REPO)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM as M\n"
        f"there, here = (M.from_pretrained(each).state_dict() for each in ({REPO!r}, {str(out)!r}))\n"
        "assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in here)\n"
        "print(len(here))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(transformers.LlamaForCausalLM(config).state_dict())


def test_nothing_is_asked_where_nothing_is_to_be_pushed(hub: Hub, tmp_path: Path) -> None:
    import torch

    run = write_run(tmp_path / "run", [{"w": torch.ones(3)}, {"w": torch.zeros(3)}], (0, 10))
    code = (
        "import sys; from ckavg.cli.app import app\n"
        f"try: app(['ema', {str(run)!r}])\n"
        "except SystemExit as e: print(e.code, 'huggingface_hub' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "0 False"
    assert hub.requests == []
