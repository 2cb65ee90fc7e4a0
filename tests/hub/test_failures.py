"""What the Hub refuses, and what is lost on the way: one message with what to do next, and nothing that costs twice."""

from __future__ import annotations

import errno
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import _http

import ckavg
from ckavg.errors import HubError, RecordError
from ckavg.hub import Destination, check_access
from ckavg.storage.hub_errors import WAITS, connect, hub_errors, may_pass, retry
from tests.cli.runner import run_cli, snapshot
from tests.exhaustive import all_but
from tests.hub import server
from tests.hub.server import LARGE, STAGES, TOKEN, Hub, Repo
from tests.hub.server import error as refusal
from tests.hub.wire import DROPPED, HELD, LOST, PORTAL, Answer, Request

REPO = "ada/averaged"
OF_CHECK = ("whoami", "info", "refs", "list", "right")
"""Stages before anything is read or sent, in a repository that exists."""
OF_UPLOAD = ("create", "branch", "preupload", "batch", "put", "verify", "yaml", "commit", "look")
FOREVER = 1_000


def large_of(result: Path) -> int:
    """Bytes of the files that are kept as large ones."""
    return sum(path.stat().st_size for path in result.iterdir() if path.stat().st_size > LARGE)


def requests_of(hub: Hub, stage: str) -> int:
    return sum(re.fullmatch(STAGES[stage], line) is not None for line in hub.requests)


@pytest.fixture
def pauses(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would be waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


# --- what is tried again ---


def answered(status: int, reason: str = "", **headers: str) -> Exception:
    """An error of the client with an answer of the Hub."""
    error = OSError("refused")
    error.response = SimpleNamespace(status_code=status, headers=headers)  # type: ignore[attr-defined]
    error.server_message = reason  # type: ignore[attr-defined]
    return error


def caused_by(cause: Exception) -> Exception:
    error = ValueError("of a library between")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *((answered(status), True) for status in (408, 429, 500, 502, 503, 504)),
        *((answered(status), False) for status in (400, 401, 403, 404, 409, 412, 422)),
        (caused_by(answered(503)), True),
        (OSError("Request error: HTTP status server error (503 Service Unavailable), domain: x"), True),
        (OSError("Request error: HTTP status client error (403 Forbidden), domain: x"), False),
        (ConnectionResetError("reset"), True),
        (TimeoutError("timed out"), True),
        (caused_by(type("ConnectError", (Exception,), {"__module__": "httpx"})("of the client")), True),
        (json.JSONDecodeError("half an answer", "", 0), True),
        (RuntimeError("Cannot send a request, as the client has been closed."), True),
        (RuntimeError("a bug"), False),
        (KeyError("a bug"), False),
        (OfflineModeIsEnabled("offline"), False),
        (LocalTokenNotFoundError("no token"), False),
        (HFValidationError("no name"), False),
        (OSError(errno.ENOSPC, "disk full"), False),
        (FileNotFoundError(errno.ENOENT, "no file", "model.safetensors"), False),
        (HubError("decided before"), False),
    ],
)
def test_what_may_pass(error: Exception, passes: bool) -> None:
    assert may_pass(error) == passes


@pytest.mark.parametrize(
    ("after", "waits"),
    [("", WAITS), ("7", (7, 7, 7, 8)), ("60", (60,) * 4), ("3600", ()), ("Wed, 21 Oct 2026 07:28:00 GMT", WAITS)],
)
def test_pauses(monkeypatch: pytest.MonkeyPatch, after: str, waits: tuple[float, ...]) -> None:
    """Five attempts in all, after the pauses that the Hub asks for, unless one is too long."""
    paused: list[float] = []
    monkeypatch.setattr(time, "sleep", paused.append)

    def limited() -> None:
        raise answered(429, **{"Retry-After": after})

    with pytest.raises(OSError, match="refused"):
        retry(limited)
    assert tuple(paused) == waits


@pytest.mark.parametrize("stage", ["whoami", "create", "commit", "look"])
def test_attempts_are_bounded(hub: Hub, result: Path, pauses: list[float], stage: str) -> None:
    hub.faults[stage] = 503, FOREVER
    with pytest.raises(HubError, match="503"):
        ckavg.push(result, REPO)
    assert hub.faults[stage][1] == FOREVER - (len(WAITS) + 1)
    assert tuple(pauses) == WAITS


@pytest.mark.parametrize("fault", all_but((503,), (429, 503, DROPPED)))
@pytest.mark.parametrize("stage", dict.fromkeys((*OF_CHECK, *OF_UPLOAD)))
def test_what_passes_is_tried_again(hub: Hub, result: Path, stage: str, fault: int) -> None:
    if stage in ("refs", "list", "right"):
        hub.add(REPO)
    hub.faults[stage] = fault, 2
    ckavg.push(result, REPO, revision="averages")
    assert hub.faults[stage][1] == 0
    assert hub.sent.total() == large_of(result)
    assert len(hub.repos[REPO].commits) == 2


# --- what is not ---


@pytest.mark.parametrize(
    ("fault", "message", "next_step"),
    [
        (401, "does not accept the token (401): injected.", "hf auth login"),
        (403, "the token has no write access (403)", "/settings/tokens"),
        (404, "does not have it, or the token may not see it (404)", "hf auth whoami"),
        (409, "conflicts with what is there (409)", "Choose another name"),
        (418, "refused it (418)", "Change what it refuses"),
        (429, "accepts no more requests for now (429)", "Try again in 7 seconds"),
        (503, "has an internal error (503)", "https://status.huggingface.co"),
        (DROPPED, "the connection to http://127.0.0.1", "curl -I http://127.0.0.1"),
        (PORTAL, "is not that of a Hub", "curl -I http://127.0.0.1"),
    ],
)
def test_messages(hub: Hub, fault: int, message: str, next_step: str) -> None:
    hub.faults["whoami"] = fault, FOREVER
    with pytest.raises(HubError) as met:
        check_access(Destination(repo=REPO))
    assert met.value.message.startswith(f"{REPO}: checking the token failed: ")
    assert message in met.value.message
    assert next_step in met.value.hint


def test_used_up_storage(hub: Hub) -> None:
    error = answered(403, "Private repository storage limit reached, please upgrade your plan.")
    with (
        pytest.raises(HubError, match="the storage quota of the account is used up") as met,
        hub_errors("", "", connect()),
    ):
        raise error
    assert f"{hub.url}/settings/billing" in met.value.hint


@pytest.mark.parametrize("stage", OF_UPLOAD)
def test_a_failure_at_every_stage(hub: Hub, result: Path, stage: str) -> None:
    """One message, the result as it was, and the command that goes on; then nothing is sent twice."""
    before = snapshot(result)
    hub.faults[stage] = DROPPED, FOREVER
    command = ("push", str(result), REPO, "--revision", "averages")
    done = run_cli(*command)
    assert done.exit_code == 1, done.output
    assert done.stderr.count("error: ") == 1
    assert "the connection to http://127.0.0.1" in done.stderr
    continued = re.search(r"Continue with: ckavg (push .*)", done.stderr)
    assert continued is not None
    assert tuple(continued[1].split()) == command
    assert snapshot(result) == before

    hub.faults.clear()
    hub.sent.clear()
    kept = set(hub.storage)
    again = run_cli(*command)
    assert again.exit_code == 0, again.output
    assert not kept & hub.sent.keys()
    assert hub.sent.total() == large_of(result) - sum(len(hub.storage[oid]) for oid in kept)
    assert hub.files(REPO, "averages") == {name: (result / name).read_bytes() for name in hub.files(REPO, "averages")}


@pytest.mark.parametrize("stage", OF_CHECK)
def test_a_failure_before_anything_is_read(hub: Hub, run: Path, stage: str) -> None:
    hub.add(REPO)
    hub.faults[stage] = 403, FOREVER
    done = run_cli("ema", run, "--push-to-hub", REPO)
    assert done.exit_code == 1, done.output
    assert done.stderr.count("error: ") == 1
    assert "Continue with" not in done.stderr
    assert requests_of(hub, stage) == 1
    assert not (run / "averaged").exists()


def test_a_resumed_upload_sends_only_the_rest(hub: Hub, result: Path) -> None:
    hub.passes_before["put"] = 1
    hub.faults["put"] = 403, FOREVER
    with pytest.raises(HubError, match=r"uploading model-0000[23]-of-00003.safetensors failed.*403") as met:
        ckavg.push(result, REPO)
    assert met.value.__notes__ == [f"The result is complete in {result}. Continue with: ckavg push {result} {REPO}"]
    first = hub.sent.total()
    assert 0 < first < large_of(result)
    hub.faults.clear()
    ckavg.push(result, REPO)
    assert hub.sent.total() == large_of(result)
    assert len(hub.repos[REPO].commits) == 2


def test_after_averaging_the_result_stays(hub: Hub, run: Path) -> None:
    hub.faults["put"] = 403, FOREVER
    options = ("--public", "--commit-message", "It's mine", "--create-pr")
    done = run_cli("ema", run, "--push-to-hub", REPO, *options)
    out = run / "averaged" / "ema-gamma0.15"
    assert done.exit_code == 1
    line = f"""ckavg push {out} {REPO} --public --commit-message 'It'"'"'s mine' --create-pr"""
    assert line in done.stderr
    assert ckavg.verify_result(out).problems == ()


def test_a_changed_file_is_not_uploaded(hub: Hub, run: Path, result: Path) -> None:
    (result / "config.json").write_text("{}")
    with pytest.raises(RecordError, match=r"config.json was changed"):
        ckavg.push(result, REPO)
    assert f"ckavg verify {result}" in run_cli("push", result, REPO).stderr
    assert hub.repos == {}
    assert "is not a result of ckavg" in run_cli("push", run, REPO).stderr


# --- one commit ---


@pytest.mark.parametrize("stage", ["commit", "create"])
def test_an_answer_that_is_lost(hub: Hub, result: Path, stage: str) -> None:
    """It was done. The next attempt finds it, and does it no second time."""
    hub.faults[stage] = LOST, 1
    pushed = ckavg.push(result, REPO, revision="averages")
    assert requests_of(hub, stage) == 1
    assert len(hub.repos[REPO].commits) == 2
    assert pushed.commit == hub.repos[REPO].branches["averages"]
    assert hub.repos[REPO].private


def test_a_commit_that_arrives_late(hub: Hub, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt is carried out when the second is there already, which names another parent then."""
    original = server._commit
    late: list[Request] = []

    def commit(hub: Hub, request: Request, name: str, repo: Repo, revision: str) -> Answer:
        if not late:
            late.append(request)
            return refusal(504, "took too long")
        original(hub, late[0], name, repo, revision)
        assert b'"parentCommit"' in request.body
        return refusal(412, "A commit has happened since. Please refresh and try again.")

    monkeypatch.setattr(server, "_commit", commit)
    pushed = ckavg.push(result, REPO)
    assert len(hub.repos[REPO].commits) == 2
    assert pushed.commit == hub.repos[REPO].branches["main"]


def test_a_commit_of_somebody_else(hub: Hub, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came between: nothing is committed over it."""
    repo = hub.add(REPO)

    def commit(hub: Hub, request: Request, name: str, repo: Repo, revision: str) -> Answer:
        parent = json.loads(request.body.splitlines()[0])["value"]["parentCommit"]
        if parent == repo.branches["main"]:
            repo.branches["main"] = hub.put(repo, {"README.md": (b"theirs", False)}, "theirs")
        return refusal(412, "A commit has happened since. Please refresh and try again.")

    monkeypatch.setattr(server, "_commit", commit)
    with pytest.raises(HubError, match=r"the branch has changed meanwhile \(412\)"):
        ckavg.push(result, REPO)
    assert repo.messages == ["initial commit", "theirs"]


@pytest.mark.parametrize(("fault", "opened"), [(LOST, 1), (503, 0)])
def test_a_pull_request_whose_answer_is_lost(hub: Hub, result: Path, fault: int, opened: int) -> None:
    hub.add(REPO)
    hub.faults["commit"] = fault, 1
    with pytest.raises(HubError, match="the response to the commit was lost; the pull request may be open") as met:
        ckavg.push(result, REPO, create_pr=True)
    assert f"{hub.url}/{REPO}/discussions" in met.value.hint
    assert (requests_of(hub, "commit"), len(hub.repos[REPO].pulls)) == (1, opened)


def test_a_pull_request_that_was_not_taken_is_asked_for_again(hub: Hub, result: Path) -> None:
    hub.add(REPO)
    hub.faults["commit"] = 429, 2
    ckavg.push(result, REPO, create_pr=True)
    assert (len(hub.repos[REPO].pulls), requests_of(hub, "commit")) == (1, 3)


# --- secrets ---


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "owner"])
@pytest.mark.parametrize("fault", all_but((401,), (401, 500, DROPPED)))
def test_the_token_is_nowhere(hub: Hub, run: Path, stage: str, fault: int) -> None:
    """Not in messages, not in tracebacks, not in the result; even where the server repeats it."""
    hub.careless = True
    hub.faults[stage] = fault, FOREVER
    if stage in ("refs", "list", "right"):
        hub.add(REPO)
    done = run_cli("ema", run, "--push-to-hub", REPO, "--verbose", "--revision", "averages")
    assert done.exit_code == 1, done.output
    assert "Traceback" in done.stderr
    assert "hf_Secret" not in done.output
    assert "SignedSigned" not in done.output
    for path in run.rglob("*"):
        assert path.is_dir() or b"hf_Secret" not in path.read_bytes(), path


@pytest.mark.parametrize("fault", [None, 503, DROPPED])
def test_a_password_in_the_address_is_nowhere(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, fault: int | None
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("://", "://ada:top%2Fsecret@"))
    if fault is not None:
        hub.faults["whoami"] = fault, FOREVER
    done = run_cli("ema", run, "--push-to-hub", REPO, "--verbose")
    assert fault is None or (done.exit_code == 1 and hub.url in done.stderr)
    for secret in ("top%2Fsecret", "top/secret", "ada:"):
        assert secret not in done.output


# --- the environment ---


def test_no_valid_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"does not accept the token \(401\)") as met:
        check_access(Destination(repo=REPO))
    assert "hf_wrong" not in str(met.value)
    hub.requests.clear()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=f"there is no token for {hub.url}") as met:
        check_access(Destination(repo=REPO))
    assert met.value.hint == "Log in with: hf auth login, or set HF_TOKEN."
    assert hub.requests == []


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="huggingface_hub is in offline mode") as met:
        check_access(Destination(repo=REPO))
    assert "Unset HF_HUB_OFFLINE" in met.value.hint
    assert hub.requests == []


@pytest.mark.parametrize("listens", [False, True])
def test_nobody_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch, listens: bool) -> None:
    library = sys.modules[_http.get_session().__class__.__module__.partition(".")[0]]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listens:
            taken.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        _http.set_client_factory(lambda: library.Client(timeout=0.2))
        try:
            with pytest.raises(HubError, match="did not answer in time" if listens else "the connection to .* failed"):
                check_access(Destination(repo=REPO))
        finally:
            _http.set_client_factory(_http.default_client_factory)


# --- interrupts ---


@pytest.mark.parametrize("number", [signal.SIGINT, *all_but((), [signal.SIGTERM])])
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
    assert TOKEN not in said
    ckavg.push(out, REPO)
    assert hub.sent.total() == large_of(out)


@pytest.mark.parametrize(
    ("words", "place", "said"),
    [
        (("ema",), "average", "The result is complete in {out}/ema-gamma0.15. {go_on} {out}/ema-gamma0.15 {repo}"),
        (("sweep",), "sweep", "All averages are complete in {out}. {go_on} DIR {repo}"),
    ],
)
def test_an_interrupt_before_the_upload(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], place: str, said: str
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"ckavg.cli.{place}.write_plot", interrupted)
    more = ("mean", "last", "--eval", "echo 1 {dir}", "--eval-goal", "min") if words == ("sweep",) else ()
    done = run_cli(*words, run, *more, "--push-to-hub", REPO)
    assert done.exit_code == 130
    expected = said.format(out=run / "averaged", go_on="Continue with: ckavg push", repo=REPO)
    assert done.stderr.splitlines()[-1] == f"interrupted: {expected}"
