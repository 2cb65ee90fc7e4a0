"""What the Hub refuses, and what is lost on the way: one message with what to do next, and nothing that costs twice."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

import ckavg
from ckavg.errors import HubError, RecordError
from ckavg.hub.transfer import tries_again
from tests.cli.runner import run_cli, snapshot
from tests.exhaustive import all_but
from tests.hub.state import DROPPED, HELD, LARGE, PORTAL, STAGES, TOKEN, Hub

pytestmark = pytest.mark.usefixtures("without_pictures")

REPO = "ada/averaged"
OF_CHECK = ("whoami", "info", "refs", "list", "right")
"""Stages before anything is read or sent, in a repository that exists."""
OF_UPLOAD = ("create", "branch", "preupload", "batch", "put", "verify", "yaml", "commit", "look")
FOREVER = 1_000
SAID = {
    401: "does not accept the token (401)",
    403: "has no right to it (403)",
    404: "knows no such thing, or the token may not see it (404)",
    409: "conflicts with what is there (409)",
    429: "takes no more requests for now (429)",
    503: "has a fault of its own (503)",
    DROPPED: "the connection to http://127.0.0.1",
}
NEXT = {
    401: "hf auth login",
    403: "hf auth login",
    404: "hf auth whoami",
    409: "Choose another name",
    429: "Try again in 7 seconds",
    503: "https://status.huggingface.co",
    DROPPED: "curl -I http://127.0.0.1",
}


def large_of(result: Path) -> int:
    """Bytes of the files that are kept as large ones."""
    return sum(path.stat().st_size for path in result.iterdir() if path.stat().st_size > LARGE)


def skip_what_is_found(stage: str, status: int) -> None:
    """With early versions of the client, it is we who try again, and find the file there that was not confirmed."""
    if stage == "verify" and status in (429, 500, 503, DROPPED) and not tries_again():
        pytest.skip("found there when it is tried again")


def assert_told(output: str, status: int) -> None:
    assert output.count("error: ") == 1, output
    assert SAID[status] in output, output
    assert NEXT[status] in output, output


@pytest.mark.parametrize("status", all_but((401, 503, DROPPED), SAID))
@pytest.mark.parametrize("stage", OF_UPLOAD)
def test_every_failure_at_every_stage(hub: Hub, result: Path, stage: str, status: int) -> None:
    """One message, the result as it was, and the command that goes on; then nothing is sent twice."""
    skip_what_is_found(stage, status)
    before = snapshot(result)
    hub.faults[stage] = status, FOREVER
    command = ("push", str(result), REPO, "--revision", "averages")
    done = run_cli(*command)
    assert done.exit_code == 1, done.output
    continued = re.search(r"Continue with: ckavg (push .*)", done.stderr)
    assert continued is not None, done.stderr
    assert tuple(continued[1].split()) == command
    # that a branch is there already is no failure, until the Hub says that it is not
    assert_told(done.stderr, 404 if (stage, status) == ("branch", 409) else status)
    assert TOKEN not in done.output
    assert snapshot(result) == before

    hub.faults.clear()
    hub.sent.clear()
    kept = set(hub.storage)
    again = run_cli(*command)
    assert again.exit_code == 0, again.output
    assert not kept & hub.sent.keys()
    assert hub.sent.total() == large_of(result) - sum(len(hub.storage[oid]) for oid in kept)
    assert hub.files(REPO, "averages") == {name: (result / name).read_bytes() for name in hub.files(REPO, "averages")}


@pytest.mark.parametrize(
    ("stage", "status"),
    # that there is no such repository is no failure
    [(stage, status) for stage in OF_CHECK for status in SAID if (stage, status) != ("info", 404)],
)
def test_every_failure_before_anything_is_read(hub: Hub, run: Path, stage: str, status: int) -> None:
    hub.add(REPO)
    hub.faults[stage] = status, FOREVER
    done = run_cli("ema", run, "--push-to-hub", REPO)
    assert done.exit_code == 1, done.output
    assert_told(done.stderr, status)
    assert "Continue with" not in done.stderr
    assert not (run / "averaged").exists()
    assert hub.sent.total() == 0


@pytest.mark.parametrize("status", [429, 503, DROPPED])
@pytest.mark.parametrize("stage", ["whoami", "info", *OF_UPLOAD])
def test_what_passes_is_tried_again(hub: Hub, result: Path, stage: str, status: int) -> None:
    hub.faults[stage] = status, 2
    ckavg.push_result(result, REPO, revision="averages")
    assert hub.faults[stage][1] == 0
    assert hub.sent.total() == large_of(result)
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize("status", [429, 503, DROPPED])
@pytest.mark.parametrize("stage", ["refs", "list", "right"])
def test_what_passes_is_asked_again_of_what_exists(hub: Hub, result: Path, stage: str, status: int) -> None:
    hub.add(REPO)
    hub.faults[stage] = status, 2
    ckavg.push_result(result, REPO)
    assert hub.faults[stage][1] == 0


def test_a_resumed_upload_sends_only_the_rest(hub: Hub, result: Path) -> None:
    hub.passes_before["put"] = 1
    hub.faults["put"] = 403, FOREVER
    with pytest.raises(HubError, match=r"uploading model-0000[23]-of-00003.safetensors failed.*403") as met:
        ckavg.push_result(result, REPO)
    assert met.value.__notes__ == [f"The result is complete in {result}. Continue with: ckavg push {result} {REPO}"]
    first = hub.sent.total()
    assert 0 < first < large_of(result)
    hub.faults.clear()
    ckavg.push_result(result, REPO)
    assert hub.sent.total() == large_of(result)
    assert [*hub.sent.values()].count(first) == 2, "the two files have one size, and each came once"
    assert len(hub.repos[REPO].commits) == 2


def test_an_answer_to_the_commit_that_is_lost(hub: Hub, result: Path) -> None:
    """The commit was made. The next attempt finds it, and makes no second one."""
    hub.faults["look"] = DROPPED, FOREVER
    with pytest.raises(HubError, match="looking at what was uploaded failed"):
        ckavg.push_result(result, REPO)
    hub.faults.clear()
    ckavg.push_result(result, REPO)
    assert len(hub.repos[REPO].commits) == 2


def test_a_pull_request_that_was_opened_all_the_same(hub: Hub, result: Path) -> None:
    hub.faults["look"] = DROPPED, FOREVER
    done = run_cli("push", result, REPO, "--create-pr")
    assert done.exit_code == 1
    assert f"The pull request is open, and another attempt opens another one: {hub.url}/{REPO}/discussions/1" in (
        done.stderr
    )


def test_after_averaging_the_result_stays(hub: Hub, run: Path) -> None:
    hub.faults["put"] = 403, FOREVER
    options = ("--public", "--commit-message", "It's mine", "--create-pr")
    done = run_cli("ema", run, "--push-to-hub", REPO, *options)
    out = run / "averaged" / "ema-gamma0.15"
    assert done.exit_code == 1
    line = f"""ckavg push {out} {REPO} --public --commit-message 'It'"'"'s mine' --create-pr"""
    assert line in done.stderr
    assert ckavg.verify_result(out).problems == ()
    hub.faults.clear()
    again = run_cli("push", out, REPO, "--public", "--commit-message", "It's mine", "--create-pr")
    assert again.stdout.splitlines()[-1] == f"url      {hub.url}/{REPO}/discussions/1"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("status", [401, 500, DROPPED])
def test_the_token_is_nowhere(hub: Hub, run: Path, stage: str, status: int) -> None:
    """Not in messages, not in tracebacks, not in the result; even where the server repeats it."""
    skip_what_is_found(stage, status)
    hub.careless = True
    hub.faults[stage] = status, FOREVER
    done = run_cli("ema", run, "--push-to-hub", "stranger/x" if stage == "owner" else REPO, "--verbose")
    if stage not in ("right", "refs", "list", "branch"):
        assert done.exit_code == 1, done.output
        assert "Traceback" in done.stderr
    assert "hf_Secret" not in done.output
    assert "SignedSigned" not in done.output
    for path in run.rglob("*"):
        assert path.is_dir() or b"hf_Secret" not in path.read_bytes(), path


@pytest.mark.parametrize("stage", ["whoami", "info", "preupload", "batch", "commit", "look"])
def test_somebody_else_answers(hub: Hub, result: Path, stage: str) -> None:
    hub.faults[stage] = PORTAL, FOREVER
    done = run_cli("push", result, REPO)
    assert done.exit_code == 1
    assert f"the answer of {hub.url} is not that of a Hub" in done.stderr
    assert f"Continue with: ckavg push {result} {REPO}" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=("int", "term"))
def test_an_interrupt_costs_the_rest_of_the_upload(hub: Hub, run: Path, number: signal.Signals) -> None:
    hub.faults["put"] = HELD, 1
    hub.passes_before["put"] = 1
    out = run / "averaged" / "ema-gamma0.15"
    command = [sys.executable, "-m", "ckavg", "ema", str(run), "--push-to-hub", REPO]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert hub.held.wait(60)
        process.send_signal(number)
        said = process.communicate()[1]
    assert process.returncode == 130
    line = f"interrupted: The result is complete in {out}. Continue with: ckavg push {out} {REPO}"
    assert said.splitlines()[-1] == line
    assert ckavg.verify_result(out).problems == ()
    ckavg.push_result(out, REPO)
    assert hub.sent.total() == large_of(out)


def test_no_token(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = run_cli("ema", run, "--push-to-hub", REPO)
    assert done.exit_code == 1
    assert f"{REPO}: there is no token for {hub.url}. Log in with: hf auth login, or set HF_TOKEN." in " ".join(
        done.stderr.split()
    )
    assert hub.requests == []


def test_a_wrong_token(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = run_cli("ema", run, "--push-to-hub", REPO)
    assert_told(done.stderr, 401)
    assert "hf_wrong" not in done.output


def test_offline(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = run_cli("ema", run, "--push-to-hub", REPO)
    assert "huggingface_hub is in offline mode" in done.stderr
    assert "Unset HF_HUB_OFFLINE" in done.stderr
    assert hub.requests == []


def test_no_network(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert_told(run_cli("ema", run, "--push-to-hub", REPO).stderr, DROPPED)


def test_a_changed_file_is_not_uploaded(hub: Hub, result: Path) -> None:
    (result / "config.json").write_text("{}")
    with pytest.raises(RecordError, match=r"config.json was changed"):
        ckavg.push_result(result, REPO)
    assert hub.repos == {}
    done = run_cli("push", result, REPO)
    assert done.exit_code == 1
    assert f"ckavg verify {result}" in done.stderr


def test_no_result(hub: Hub, run: Path) -> None:
    done = run_cli("push", run, REPO)
    assert "is not a result of ckavg" in done.stderr
    assert hub.requests == []
