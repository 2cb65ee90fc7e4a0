"""Environment variables, in real processes; and access rights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ckavg
from tests.cli.runner import run_cli
from tests.exhaustive import all_but
from tests.hub.server import TOKEN, Hub, Repo
from tests.storage.outcome import keeps_to_itself, refused, served_of, weights_of
from tests.storage.published import REPO, publish_folders

PATTERN = ("--revisions", "step*")
FAR = f"hf://{REPO}"
IMPATIENT = """
from ckavg.storage import hub_errors
hub_errors.WAITS = (0.01,) * 4
from ckavg.cli import main
main()
"""


def ran(*command: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """`ckavg` as a user types it; None takes a variable away."""
    merged = {**os.environ, **environment}
    env = {name: value for name, value in merged.items() if value is not None}
    line = [sys.executable, "-c", IMPATIENT, *command]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    keeps_to_itself(
        (done.stdout + done.stderr).replace("Traceback", "") if "-v" in command else done.stdout + done.stderr
    )
    return done


@pytest.fixture
def expected(run: Path, tmp_path: Path) -> dict[str, bytes]:
    return weights_of(ckavg.average(ckavg.open_run(run), ckavg.EMA(), out=tmp_path / "local").directory)


@pytest.mark.parametrize("name", all_but(("HF_HUB_OFFLINE",), ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]))
def test_revisions_offline(hub: Hub, repo: Repo, expected: dict[str, bytes], tmp_path: Path, name: str) -> None:
    out = str(tmp_path / "out")
    assert ran("ema", FAR, *PATTERN, "--out", out).returncode == 0
    hub.forget()
    done = ran("ema", FAR, *PATTERN, "--out", out, "--force", **{name: "1"})
    assert done.returncode == 0, done.stderr
    assert weights_of(Path(out)) == expected
    assert hub.requests == []


@pytest.mark.exhaustive
def test_the_anchor_and_folders_offline(hub: Hub, run: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    publish_folders(hub, REPO, run, revision="v2")
    out = str(tmp_path / "out")
    command = ("bema", f"{FAR}@v2", "--init", f"{FAR}@v2/checkpoint-10", "--from-step", "20", "--out", out)
    assert ran(*command).returncode == 0
    first = weights_of(Path(out))
    hub.forget()
    done = ran(*command, "--force", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert weights_of(Path(out)) == first
    assert hub.requests == []


def test_offline_with_nothing(hub: Hub, repo: Repo) -> None:
    for words in ((FAR, *PATTERN), (FAR,), (f"{FAR}@v2",), (f"{FAR}@{repo.branches['step10']}",)):
        done = ran("inspect", *words, HF_HUB_OFFLINE="1")
        assert done.returncode == 1
        assert done.stderr.count("error: ") == 1
        assert "Unset HF_HUB_OFFLINE" in done.stderr
    assert hub.requests == []


@pytest.mark.exhaustive
def test_offline_with_a_part_of_the_run(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    assert ran("inspect", FAR, *PATTERN).returncode == 0
    done = ran("ema", FAR, *PATTERN, "--out", str(tmp_path / "out"), HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "Unset HF_HUB_OFFLINE" in done.stderr
    assert ran("ema", FAR, *PATTERN, "--last", "2", "--out", str(tmp_path / "out")).returncode == 0
    done = ran("ema", FAR, *PATTERN, "--out", str(tmp_path / "more"), HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "Unset HF_HUB_OFFLINE" in done.stderr
    done = ran("ema", FAR, *PATTERN, "--last", "2", "--out", str(tmp_path / "two"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0
    assert weights_of(tmp_path / "two") == weights_of(tmp_path / "out")


def test_another_home_and_another_endpoint(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    command = ("ema", FAR, *PATTERN, "--out", str(tmp_path / "out"), "--force")
    home = tmp_path / "elsewhere"
    assert ran(*command, HF_HOME=str(home)).returncode == 0
    assert sorted(path.name for path in home.glob("hub/models--*/refs/*")) == ["step10", "step20", "step30"]
    hub.forget()
    assert ran(*command, HF_HUB_CACHE=str(home / "hub")).returncode == 0
    assert served_of(hub.served) == 0, "it is in that cache already"
    done = ran(*command, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "empty"))
    assert done.returncode == 1
    assert "the connection to http://127.0.0.1:9 failed" in done.stderr
    assert "curl -I http://127.0.0.1:9" in done.stderr


@pytest.mark.parametrize("fault", all_but((None, 401), [None, 401, 503]))
def test_an_endpoint_with_a_password(hub: Hub, repo: Repo, tmp_path: Path, fault: int | None) -> None:
    """Whether it is accepted or not: the password is shown nowhere, nor kept in the result."""
    if fault:
        hub.faults["list"] = fault, 1_000
    endpoint = hub.url.replace("http://", "http://me:VerySecret@")
    out = tmp_path / "out"
    done = ran("ema", FAR, *PATTERN, "--out", str(out), "-v", HF_ENDPOINT=endpoint, HF_TOKEN=None)
    assert done.returncode == (1 if fault else 0), done.stderr
    assert "VerySecret" not in done.stdout + done.stderr
    if not fault:
        assert b"VerySecret" not in b"".join(path.read_bytes() for path in out.iterdir())


def test_a_cache_that_cannot_be_written(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file")
    done = ran("ema", FAR, *PATTERN, "--out", str(tmp_path / "out"), HF_HOME=str(home))
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert f"{home}/hub" in done.stderr
    assert "HF_HOME" in done.stderr


@pytest.mark.parametrize(
    ("access", "token", "status", "what_next"),
    [
        ("public", None, 0, ""),
        ("public", "wrong", 1, "Invalid credentials"),
        ("private", TOKEN, 0, ""),
        ("private", None, 1, "hf auth login"),
        ("private", "wrong", 1, "hf auth login"),
        ("gated", None, 1, "the repository is gated"),
        ("gated", TOKEN, 1, f"/{REPO}"),
        ("granted", TOKEN, 0, ""),
        ("granted", None, 1, "Ask for access at"),
        ("missing", TOKEN, 1, "Check the name"),
        ("missing", None, 1, "Check the name. Log in with: hf auth login"),
    ],
)
def test_who_may_read(
    hub: Hub,
    repo: Repo,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    access: str,
    token: str | None,
    status: int,
    what_next: str,
) -> None:
    repo.private = access == "private"
    hub.gated |= {REPO} if access == "gated" else set()
    hub.granted |= {REPO} if access == "granted" else set()
    if access == "missing":
        del hub.repos[REPO]
    wrong = "hf_WrongWrongWrongWrong"
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", wrong if token == "wrong" else token)
    out = tmp_path / "out"
    command = ("ema", FAR, *PATTERN, "--out", out, "-q")
    if status:
        told = refused(*command, named=REPO)
        assert what_next in told
        keeps_to_itself(told, also=[wrong])
        assert not out.exists()
    else:
        assert run_cli(*command).output.count("error: ") == 0
        assert weights_of(out) == expected
