"""What passes is tried again, a bounded number of times, and nothing is ever committed twice."""

from __future__ import annotations

import importlib
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import ckavg
from ckavg.errors import HubError
from ckavg.hub.retrying import WAITS, pause_after
from tests.cli.runner import run_cli
from tests.hub import server
from tests.hub.faults import LOST
from tests.hub.reading import error
from tests.hub.state import DROPPED, STAGES, Hub, Repo
from tests.hub.wire import Answer, Request

REPO = "ada/averaged"
FOREVER = 1_000


def requests_of(hub: Hub, stage: str) -> int:
    return sum(re.fullmatch(STAGES[stage], line) is not None for line in hub.requests)


@pytest.fixture
def pauses(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would be waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def test_a_commit_whose_answer_is_lost_is_found(hub: Hub, result: Path) -> None:
    hub.faults["commit"] = LOST, 1
    pushed = ckavg.push_result(result, REPO, revision="averages")
    assert len(hub.repos[REPO].commits) == 2
    assert requests_of(hub, "commit") == 1
    assert pushed.commit == hub.repos[REPO].branches["averages"]


def test_a_pull_request_whose_answer_is_lost_is_found(hub: Hub, result: Path) -> None:
    repo = hub.add(REPO)
    repo.pulls["refs/pr/1"] = repo.branches["main"]
    hub.faults["commit"] = LOST, 1
    pushed = ckavg.push_result(result, REPO, create_pr=True)
    assert pushed.url == f"{hub.url}/{REPO}/discussions/2"
    assert pushed.commit == hub.repos[REPO].pulls["refs/pr/2"]
    assert (len(hub.repos[REPO].pulls), requests_of(hub, "commit")) == (2, 1)


def test_a_repository_that_was_created_all_the_same(hub: Hub, result: Path) -> None:
    hub.faults["create"] = LOST, 1
    ckavg.push_result(result, REPO)
    assert requests_of(hub, "create") == 1
    assert hub.repos[REPO].private


def test_a_commit_that_arrives_late_is_not_made_twice(hub: Hub, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt is carried out when the second is there already, which names another parent then."""
    original = server._commit
    late: list[Request] = []

    def commit(hub: Hub, request: Request, name: str, repo: Repo, revision: str) -> Answer:
        if not late:
            late.append(request)
            return error(504, "took too long")
        original(hub, late[0], name, repo, revision)
        assert b'"parentCommit"' in request.body
        return error(412, "A commit has happened since. Please refresh and try again.")

    monkeypatch.setattr(server, "_commit", commit)
    pushed = ckavg.push_result(result, REPO)
    assert len(hub.repos[REPO].commits) == 2
    assert pushed.commit == hub.repos[REPO].branches["main"]


@pytest.mark.parametrize("status", [503, DROPPED])
def test_a_pull_request_of_which_nothing_is_known_is_not_opened_again(hub: Hub, result: Path, status: int) -> None:
    hub.add(REPO)
    hub.faults["commit"] = status, FOREVER
    done = run_cli("push", result, REPO, "--create-pr")
    assert done.exit_code == 1
    assert "the answer to the commit was lost, and no pull request of it is there yet" in done.stderr
    assert f"{hub.url}/{REPO}/discussions" in done.stderr
    assert requests_of(hub, "commit") == 1


def test_a_pull_request_that_was_not_taken_is_asked_for_again(hub: Hub, result: Path) -> None:
    hub.add(REPO)
    hub.faults["commit"] = 429, 2
    ckavg.push_result(result, REPO, create_pr=True)
    assert (len(hub.repos[REPO].pulls), requests_of(hub, "commit")) == (1, 3)


@pytest.mark.parametrize("stage", ["whoami", "create", "commit", "look"])
def test_attempts_are_bounded(hub: Hub, result: Path, pauses: list[float], stage: str) -> None:
    hub.faults[stage] = 503, FOREVER
    with pytest.raises(HubError, match="503"):
        ckavg.push_result(result, REPO)
    assert hub.faults[stage][1] == FOREVER - (len(WAITS) + 1)
    assert tuple(pauses) == WAITS


def test_the_hub_says_how_long_to_wait(hub: Hub, result: Path, pauses: list[float]) -> None:
    hub.faults["whoami"] = 429, 2
    ckavg.push_result(result, REPO)
    assert pauses == [7.0, 7.0]


def test_nobody_waits_for_an_hour() -> None:
    class LimitedError(Exception):
        def __init__(self, after: str) -> None:
            self.response = type("Response", (), {"status_code": 429, "headers": {"Retry-After": after}})()

    assert pause_after(LimitedError("60"), 1) == 60
    assert pause_after(LimitedError("3600"), 1) is None
    assert pause_after(LimitedError("Wed, 21 Oct 2026 07:28:00 GMT"), 1) == 1


def test_what_does_not_pass_is_asked_once(hub: Hub, result: Path, pauses: list[float]) -> None:
    hub.faults["whoami"] = 401, FOREVER
    with pytest.raises(HubError):
        ckavg.push_result(result, REPO)
    assert Counter(hub.requests) == {"GET /api/whoami-v2": 1}
    assert pauses == []


def test_no_answer(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with impatient():
            said = run_cli("ema", run, "--push-to-hub", REPO).stderr
    assert "did not answer in time" in said
    assert "HF_HUB_DOWNLOAD_TIMEOUT=60" in said


@contextmanager
def impatient() -> Iterator[None]:
    """The client with a short timeout, whichever library its version sends requests with."""
    _http: Any = importlib.import_module("huggingface_hub.utils._http")
    if hasattr(_http, "set_client_factory"):
        library = getattr(_http, "httpx2", None) or _http.httpx
        _http.set_client_factory(lambda: library.Client(timeout=0.2))
        try:
            yield
        finally:
            _http.set_client_factory(_http.default_client_factory)
        return
    from requests import Session

    class Impatient(Session):
        def request(self, *arguments: Any, **options: Any) -> Any:
            return super().request(*arguments, **options | {"timeout": 0.2})

    _http.configure_http_backend(Impatient)
    try:
        yield
    finally:
        _http.configure_http_backend()


# --- a password in the address ---


@pytest.mark.parametrize("fault", [None, 503, DROPPED])
def test_a_password_in_the_address_is_nowhere(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, fault: int | None
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("://", "://ada:top%2Fsecret@"))
    if fault is not None:
        hub.faults["whoami"] = fault, FOREVER
    done = run_cli("ema", run, "--push-to-hub", REPO, "--verbose")
    if fault is not None:
        assert done.exit_code == 1
        assert f"{hub.url} " in done.stderr or f"{hub.url}\n" in done.stderr
    for secret in ("top%2Fsecret", "top/secret"):
        assert secret not in done.output
    assert "ada:" not in done.output


# --- an interrupt when the average is there ---


def test_an_interrupt_before_the_upload(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckavg.cli.average.write_plot", interrupted)
    out = run / "averaged" / "ema-gamma0.15"
    done = run_cli("ema", run, "--push-to-hub", REPO, "--public")
    assert done.exit_code == 130
    line = f"interrupted: The result is complete in {out}. Continue with: ckavg push {out} {REPO} --public"
    assert done.stderr.splitlines()[-1] == line
    done = run_cli("ema", run, "--force")
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == f"interrupted: The result is complete in {out}."
    assert ckavg.verify_result(out).problems == ()


def test_an_interrupt_after_a_sweep(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckavg.cli.sweep.write_plot", interrupted)
    done = run_cli("sweep", run, "mean", "last", "--eval", "echo 1 {dir}", "--push-to-hub", REPO)
    assert done.exit_code == 130
    said = f"interrupted: All averages are complete in {run / 'averaged'}. Continue with: ckavg push DIR {REPO}"
    assert done.stderr.splitlines()[-1] == said
