"""Whether an upload would be let in is known before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ckavg
from ckavg.errors import HubError
from ckavg.hub.rights import check_token, may_create
from tests.cli.runner import run_cli
from tests.hub.state import Hub

REPO = "ada/averaged"
URL = "https://huggingface.co"


def scoped(name: str, *permissions: str) -> dict[str, Any]:
    scope = {"entity": {"type": "user", "name": name}, "permissions": list(permissions)}
    return {"role": "fineGrained", "fineGrained": {"global": [], "scoped": [scope]}}


@pytest.mark.parametrize(
    ("token", "create_pr", "allowed"),
    [
        ({"role": "write"}, False, True),
        ({"role": "read"}, False, False),
        ({"role": "read"}, True, False),
        ({}, False, True),
        ({"role": "of another kind"}, False, True),
        (scoped("ada", "repo.write"), False, True),
        (scoped("Ada", "repo.write"), False, True),
        (scoped(REPO, "repo.write"), False, True),
        (scoped("ada/another", "repo.write"), False, False),
        (scoped("lab", "repo.write"), False, False),
        (scoped("ada", "repo.content.read"), False, False),
        (scoped("ada", "discussion.write"), False, False),
        (scoped("ada", "discussion.write"), True, True),
        ({"role": "fineGrained", "fineGrained": {"global": ["discussion.write"], "scoped": []}}, True, True),
        ({"role": "fineGrained"}, False, False),
    ],
)
def test_tokens(token: dict[str, Any], create_pr: bool, allowed: bool) -> None:
    me = {"name": "ada", "auth": {"accessToken": token}}
    if allowed:
        check_token(me, REPO, URL, create_pr=create_pr)
        return
    with pytest.raises(HubError, match="the token may not write there") as met:
        check_token(me, REPO, URL, create_pr=create_pr)
    assert f"{URL}/settings/tokens" in met.value.hint


@pytest.mark.parametrize(("role", "allowed"), [("admin", 1), ("write", 1), ("contributor", 1), (None, 1), ("read", 0)])
def test_roles(role: str | None, allowed: int) -> None:
    me = {"name": "ada", "orgs": [{"name": "lab", "roleInOrg": role}]}
    assert may_create(me, "ada/x", URL)
    assert not may_create(me, "other/x", URL)
    if allowed:
        assert may_create(me, "lab/x", URL)
    else:
        with pytest.raises(HubError, match="ada has the role read in lab"):
            may_create(me, "lab/x", URL)


def refused(run: Path, *options: str) -> str:
    done = run_cli("ema", run, *options)
    assert done.exit_code == 1, done.output
    assert done.stderr.count("error: ") == 1
    assert not (run / "averaged").exists()
    return done.stderr


def test_a_read_token(hub: Hub, run: Path) -> None:
    hub.me["auth"]["accessToken"]["role"] = "read"
    assert "it is a read token" in refused(run, "--push-to-hub", REPO)


def test_an_organization_in_which_one_only_reads(hub: Hub, run: Path) -> None:
    assert "ada has the role read in club" in refused(run, "--push-to-hub", "club/x")


def test_somebody_else(hub: Hub, run: Path) -> None:
    assert "ada is not stranger, nor a member of it" in refused(run, "--push-to-hub", "stranger/x")


def test_nobody(hub: Hub, run: Path) -> None:
    said = refused(run, "--push-to-hub", "nobody/x")
    assert "there is no user and no organization nobody" in said
    assert "The token is that of ada." in said


def test_a_repository_that_one_may_not_write(hub: Hub, run: Path) -> None:
    hub.add("stranger/model", private=False)
    hub.no_write.add("stranger/model")
    said = refused(run, "--push-to-hub", "stranger/model")
    assert "the token has no right to it (403): You have no write access to this model" in said


def test_a_gated_repository(hub: Hub, run: Path) -> None:
    hub.add("stranger/model", private=False)
    hub.gated.add("stranger/model")
    said = refused(run, "--push-to-hub", "stranger/model")
    assert "the repository is gated, and the token's user has no access (403)" in said
    assert f"Ask for access at {hub.url}/stranger/model" in said


def test_a_private_repository_that_the_token_does_not_see(hub: Hub, run: Path) -> None:
    """For the Hub it is as if there was none; and as nobody's member one creates none there."""
    assert "ada is not stranger, nor a member of it" in refused(run, "--push-to-hub", "stranger/secret")


@pytest.mark.parametrize(("private", "option"), [(True, "--public"), (False, "--private")])
def test_the_other_visibility(hub: Hub, run: Path, private: bool, option: str) -> None:
    hub.add(REPO, private=private)
    said = refused(run, "--push-to-hub", REPO, option)
    assert f"{option} was asked for" in said
    assert run_cli("ema", run, "--push-to-hub", REPO).exit_code == 0
    assert hub.repos[REPO].private == private


def test_a_tag(hub: Hub, run: Path) -> None:
    repo = hub.add(REPO)
    repo.tags["v1"] = repo.branches["main"]
    assert "v1 is a tag" in refused(run, "--push-to-hub", REPO, "--revision", "v1")


def test_a_pull_request_that_is_not_there(hub: Hub, run: Path) -> None:
    hub.add(REPO)
    assert "has no refs/pr/7" in refused(run, "--push-to-hub", REPO, "--revision", "refs/pr/7")


def test_other_weights_beside(hub: Hub, run: Path) -> None:
    """`model.safetensors` would be loaded in the place of shards."""
    hub.add(REPO, files={"model.safetensors": (b"old", False), "gguf/model.safetensors": (b"of a tool", False)})
    said = refused(run, "--push-to-hub", REPO)
    assert f"{REPO} holds other weights at main, which would be loaded in part or instead: model.safetensors." in said


def test_a_name_that_is_taken(hub: Hub, result: Path) -> None:
    hub.taken.add(REPO)
    with pytest.raises(HubError, match=r"creating the repository failed: it conflicts with what is there \(409\)"):
        ckavg.push_result(result, REPO)


def test_a_gitignore_keeps_a_file_out(hub: Hub, result: Path) -> None:
    hub.ignored.add("tokenizer.json")
    with pytest.raises(HubError, match=r"tokenizer.json is not in commit \w{8} as it was sent"):
        ckavg.push_result(result, REPO)


def test_a_dry_run_asks_for_the_rights(hub: Hub, run: Path) -> None:
    hub.me["auth"]["accessToken"]["role"] = "read"
    assert "it is a read token" in refused(run, "--push-to-hub", REPO, "--dry-run")


def test_a_sweep_that_tells_no_best(hub: Hub, run: Path) -> None:
    done = run_cli("sweep", run, "mean", "last", "--push-to-hub", REPO)
    assert done.exit_code == 2
    assert "Add --eval COMMAND" in done.stderr
    assert hub.requests == []
