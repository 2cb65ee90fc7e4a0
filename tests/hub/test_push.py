"""Pushed and pulled: the same bytes, in one commit, where it was asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

import ckavg
from ckavg.output.owned import LOCAL
from tests.cli.runner import placeless, run_cli
from tests.hub.state import TOKEN, Hub

REPO = "ada/averaged"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_pull_gives_what_was_pushed(hub: Hub, result: Path, tmp_path: Path) -> None:
    (result / ".notes").write_text("hidden")
    (result / "eval.json").write_text("foreign")
    pushed = ckavg.push_result(result, REPO)
    pulled = Path(snapshot_download(REPO, endpoint=hub.url, token=TOKEN, local_dir=tmp_path / "pulled"))
    expected = contents(result)
    del expected[".notes"], expected["eval.json"], expected[LOCAL]
    got = {name: data for name, data in contents(pulled).items() if not name.startswith((".cache", ".git"))}
    assert got == expected
    assert set(pushed.files) == set(expected)
    assert pushed.bytes == sum(map(len, expected.values()))
    assert pushed.url == f"{hub.url}/{REPO}"
    assert hub.repos[REPO].private
    assert hub.repos[REPO].messages == ["initial commit", "Upload ema-gamma0.15, the average of steps 0 to 20"]
    assert ckavg.verify_result(pulled).problems == ()


def test_again_sends_nothing_and_commits_nothing(hub: Hub, result: Path) -> None:
    first = ckavg.push_result(result, REPO)
    sent = hub.sent.total()
    assert ckavg.push_result(result, REPO) == first
    assert hub.sent.total() == sent
    assert len(hub.repos[REPO].commits) == 2


def test_a_name_alone_is_of_the_user(hub: Hub, result: Path) -> None:
    assert ckavg.push_result(result, "averaged").repo == REPO


def test_public(hub: Hub, result: Path) -> None:
    ckavg.push_result(result, "lab/averaged", private=False)
    assert not hub.repos["lab/averaged"].private


def test_a_branch_is_created(hub: Hub, result: Path) -> None:
    pushed = ckavg.push_result(result, REPO, revision="pema", commit_message="Try it")
    assert pushed.url == f"{hub.url}/{REPO}/tree/pema"
    assert hub.files(REPO, "pema").keys() == set(pushed.files)
    assert hub.files(REPO) == {}
    assert hub.repos[REPO].messages[-1] == "Try it"


def test_a_pull_request_and_more_for_it(hub: Hub, result: Path) -> None:
    hub.add("stranger/model", private=False)
    hub.no_write.add("stranger/model")
    pushed = ckavg.push_result(result, "stranger/model", create_pr=True)
    assert (pushed.url, pushed.revision) == (f"{hub.url}/stranger/model/discussions/1", None)
    assert hub.files("stranger/model") == {}
    assert hub.files("stranger/model", "refs/pr/1").keys() == set(pushed.files)
    hub.no_write.clear()
    (result / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    more = ckavg.push_result(result, "stranger/model", revision="refs/pr/1")
    assert hub.files("stranger/model", "refs/pr/1")["README.md"].endswith(b"mine\n")
    assert "README.md was changed" in more.warnings[0]


def test_a_snapshot(hub: Hub, run: Path) -> None:
    made = ckavg.average(ckavg.open_run(run), ckavg.EMA(), snapshot_every=10)
    step = made.outputs[0]
    pushed = ckavg.push_result(step.directory, REPO)
    assert set(pushed.files) == set(step.files)
    assert json.loads(hub.files(REPO)["ckavg.json"])["outputs"][-1]["step"] == 10
    assert hub.repos[REPO].messages[-1] == "Upload checkpoint-10, the average of steps 0 to 10"


def test_command(hub: Hub, result: Path) -> None:
    done = run_cli("push", result, REPO)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"url      {hub.url}/{REPO}"
    told = json.loads(run_cli("push", result, REPO, "--json").stdout)
    assert told["url"] == f"{hub.url}/{REPO}"
    assert told["revision"] == "main"
    section = (Path(__file__).parents[2] / "docs" / "cli.md").read_text().partition("### The JSON object of push")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", section.partition("\n## ")[0], re.MULTILINE)) == told.keys()
    assert re.findall(r"pass 2 of 2, uploading: (\S+)", done.stderr) == ["0.00", "0.00"], "the beginning and the end"


def test_after_averaging(hub: Hub, run: Path) -> None:
    done = run_cli("ema", run, "--push-to-hub", REPO, "--public", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told.pop("url") == f"{hub.url}/{REPO}"
    assert placeless(json.loads(hub.files(REPO)["ckavg.json"])) == placeless(told)
    assert not hub.repos[REPO].private
    assert hub.requests.index("GET /api/whoami-v2") == 0


def test_the_best_of_a_sweep(hub: Hub, run: Path) -> None:
    command = "echo {dir} | grep -c last"
    done = run_cli("sweep", run, "mean", "last", "--eval", command, "--eval-goal", "max", "--push-to-hub", REPO)
    assert done.exit_code == 0, done.output
    assert json.loads(hub.files(REPO)["ckavg.json"])["scheme"] == "last"
    assert f"uploaded last to {hub.url}/{REPO}" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--create-pr",),
        ("--push-to-hub", "no name"),
        ("--push-to-hub", "a/b/c"),
        ("--push-to-hub", REPO, "--revision", "a b"),
        ("--push-to-hub", REPO, "--revision", "0" * 40),
        ("--push-to-hub", REPO, "--revision", "x", "--create-pr"),
        ("--push-to-hub", REPO, "--commit-message", " "),
    ],
)
def test_wrong_usage(hub: Hub, run: Path, options: tuple[str, ...]) -> None:
    done = run_cli("ema", run, *options)
    assert done.exit_code == 2, done.output
    assert hub.requests == []
    assert not (run / "averaged").exists()
