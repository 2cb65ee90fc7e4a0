"""Rights first, then one commit where it was asked for; pulled, it has the same bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download

import ckavg
from ckavg.errors import HubError
from ckavg.hub import check_owner, check_token
from ckavg.output.output_path import LOCAL
from tests.cli.runner import placeless, run_cli
from tests.hub.server import TOKEN, Hub
from tests.ranks.launch import Job, run_jobs
from tests.runs import random_run, write_run

REPO = "ada/averaged"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_pull_gives_what_was_pushed(hub: Hub, result: Path, tmp_path: Path) -> None:
    (result / ".notes").write_text("hidden")
    (result / "eval.json").write_text("foreign")
    pushed = ckavg.push(result, REPO)
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


def test_a_result_pushes_itself(hub: Hub, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_run(0, 3, torch.float32), (10, 20, 30))
    pushed = ckavg.average(run, ckavg.Mean()).push_to_hub(REPO, private=True)
    assert hub.repos[REPO].private
    assert pushed.url == f"{hub.url}/{REPO}"


def test_again_sends_nothing_and_commits_nothing(hub: Hub, result: Path) -> None:
    first = ckavg.push(result, REPO)
    sent = hub.sent.total()
    assert ckavg.push(result, REPO) == first
    assert hub.sent.total() == sent
    assert len(hub.repos[REPO].commits) == 2


def test_a_name_alone_is_of_the_user(hub: Hub, result: Path) -> None:
    assert ckavg.push(result, "averaged", private=False).repo == REPO
    assert not hub.repos[REPO].private


def test_a_branch_is_created(hub: Hub, result: Path) -> None:
    pushed = ckavg.push(result, REPO, revision="pema", commit_message="Try it")
    assert pushed.url == f"{hub.url}/{REPO}/tree/pema"
    assert hub.files(REPO, "pema").keys() == set(pushed.files)
    assert hub.files(REPO) == {}
    assert hub.repos[REPO].messages[-1] == "Try it"


def test_a_pull_request_and_more_for_it(hub: Hub, result: Path) -> None:
    hub.add("stranger/model", private=False)
    hub.no_write.add("stranger/model")
    pushed = ckavg.push(result, "stranger/model", create_pr=True)
    assert (pushed.url, pushed.revision) == (f"{hub.url}/stranger/model/discussions/1", None)
    assert hub.files("stranger/model") == {}
    assert hub.files("stranger/model", "refs/pr/1").keys() == set(pushed.files)
    hub.no_write.clear()
    (result / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    more = ckavg.push(result, "stranger/model", revision="refs/pr/1")
    assert hub.files("stranger/model", "refs/pr/1")["README.md"].endswith(b"mine\n")
    assert "README.md was changed" in more.warnings[0]


def test_a_snapshot(hub: Hub, run: Path) -> None:
    made = ckavg.average(ckavg.open_run(run), ckavg.EMA(), snapshot_every=10)
    step = made.outputs[0]
    pushed = ckavg.push(step.directory, REPO)
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
    section = (Path(__file__).parents[2] / "docs" / "json.md").read_text().partition("## The JSON object of push")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", section.partition("\n## ")[0], re.MULTILINE)) == told.keys()
    assert re.findall(r"^uploading: (\S+)", done.stderr, re.MULTILINE)[1:] == ["100"], "the beginning and the end"
    assert run_cli("push", result, REPO, "-q").stdout == f"{hub.url}/{REPO}\n"


def test_after_averaging(hub: Hub, run: Path) -> None:
    done = run_cli("ema", run, "--push-to-hub", REPO, "--public", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told.pop("url") == f"{hub.url}/{REPO}"
    assert placeless(json.loads(hub.files(REPO)["ckavg.json"])) == placeless(told)
    assert not hub.repos[REPO].private
    assert "](ckavg.svg)" in hub.files(REPO)["README.md"].decode()
    assert "ckavg.svg" in hub.files(REPO)


def test_joined_parts(hub: Hub, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for part in range(2):
        assert run_cli("ema", run, "--out", out, "--part", f"{part}/2").exit_code == 0
    words = "--eval", "echo loss 0.5; : {dir}", "--eval-goal", "min", "--push-to-hub", REPO, "--json"
    done = run_cli("join", out, *words)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told.pop("url") == f"{hub.url}/{REPO}"
    assert told["evaluation"]["value"] == 0.5
    assert "ckavg.svg" in hub.files(REPO)
    assert placeless(json.loads(hub.files(REPO)["ckavg.json"])) == placeless(told)


def test_the_best_of_a_sweep(hub: Hub, run: Path) -> None:
    command = "echo {dir} | grep -c last"
    done = run_cli("sweep", run, "mean", "last", "--eval", command, "--eval-goal", "max", "--push-to-hub", REPO)
    assert done.exit_code == 0, done.output
    assert json.loads(hub.files(REPO)["ckavg.json"])["scheme"] == "last"
    assert "ckavg.svg" in hub.files(REPO)
    assert f"uploaded last to {hub.url}/{REPO}" in done.stderr


def test_the_first_of_equals_is_uploaded_with_a_warning(hub: Hub, run: Path) -> None:
    words = ("dema", "last", "mean")
    done = run_cli(
        "sweep", run, *words, "--eval", "echo loss 1; : {dir}", "--eval-metric", "loss", "--push-to-hub", REPO
    )
    assert done.exit_code == 0, done.stderr
    warning = "warning: dema-kappa0.5 is uploaded, the first in the order given; equal to it: last, mean."
    assert warning in done.stderr.splitlines()
    assert json.loads(hub.files(REPO)["ckavg.json"])["scheme"] == "dema"


@pytest.mark.parametrize("best", ["mean", "last"])
def test_the_best_of_a_search_is_uploaded_if_it_beats_the_last_checkpoint(hub: Hub, run: Path, best: str) -> None:
    command = f"echo {{dir}} | grep -c {best}$"
    options = ("--budget", "3", "--eval-goal", "max", "--push-to-hub", REPO)
    done = run_cli("best", run, "--eval", f"{command} || true", *options)
    assert done.exit_code == 0, done.output
    assert (REPO in hub.repos and {"ckavg.json", "ckavg.svg"} <= {*hub.files(REPO)}) == (best == "mean")
    told = "Nothing is uploaded: the result is not shown to beat the last checkpoint. Continue with: ckavg push"
    assert (told in done.stderr) == (best == "last")


@pytest.mark.parametrize("verb", [("sweep", "mean", "last"), ("ema",)])
def test_where_all_fail_nothing_is_uploaded(hub: Hub, run: Path, verb: tuple[str, ...]) -> None:
    name, *words = verb
    evaluation = ("--eval", "echo half way; echo broken >&2; exit 7; : {dir}", "--eval-metric", "loss")
    done = run_cli(name, run, *words, *evaluation, "--push-to-hub", REPO, "--json")
    assert done.exit_code == 1
    assert "error: No evaluation succeeded. The first problem: exit status 7.\n" in done.stderr
    assert done.stderr.endswith("\nhalf way\nbroken\n")
    assert not hub.repos.get(REPO) or "ckavg.json" not in hub.files(REPO)
    assert "url" not in json.loads(done.stdout)


@pytest.mark.parametrize(
    "options",
    [
        ("--create-pr",),
        ("--push-to-hub", "no name"),
        ("--push-to-hub", "a/b/c"),
        ("--push-to-hub", "a" * 97),
        ("--push-to-hub", "a--b"),
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


# --- rights ---


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
    with nullcontext() if allowed else pytest.raises(HubError, match="the token cannot write there") as met:
        check_token(me, REPO, "https://hub", create_pr=create_pr)
    assert met is None or "https://hub/settings/tokens" in met.value.hint


@pytest.mark.parametrize(
    ("owner", "role", "refused"),
    [
        ("ada", None, ""),
        ("Lab", "admin", ""),
        ("lab", "write", ""),
        ("lab", "contributor", ""),
        ("lab", None, ""),
        ("lab", "read", "ada has the role read in lab"),
        ("nobody", None, "ada is neither nobody nor a member of it"),
    ],
)
def test_owners(owner: str, role: str | None, refused: str) -> None:
    me = {"name": "ada", "orgs": [{"name": "lab", "roleInOrg": role}]}
    with pytest.raises(HubError, match=refused) if refused else nullcontext():
        check_owner(me, f"{owner}/x", "https://hub")


def read_token(hub: Hub) -> None:
    hub.me["auth"]["accessToken"]["role"] = "read"


def not_mine(hub: Hub) -> None:
    hub.add("stranger/model", private=False)
    hub.no_write.add("stranger/model")


def gated(hub: Hub) -> None:
    hub.add("stranger/model", private=False)
    hub.gated.add("stranger/model")


def tagged(hub: Hub) -> None:
    repo = hub.add(REPO)
    repo.tags["v1"] = repo.branches["main"]


def other_weights(hub: Hub) -> None:
    """`model.safetensors` would be loaded in the place of shards."""
    hub.add(REPO, files={"model.safetensors": (b"old", False), "gguf/model.safetensors": (b"of a tool", False)})


REFUSED: tuple[tuple[Callable[[Hub], object], tuple[str, ...], str], ...] = (
    (read_token, (REPO,), "it is a read token"),
    (read_token, (REPO, "--dry-run"), "it is a read token"),
    (lambda _: None, ("club/x",), "ada has the role read in club"),
    (lambda _: None, ("stranger/x",), "ada is neither stranger nor a member of it"),
    (not_mine, ("stranger/model",), "the token has no write access (403): You have no write access to this model"),
    (gated, ("stranger/model",), "the repository is gated, and the token's user has no access (403)"),
    (gated, ("stranger/model",), "/stranger/model"),
    (lambda hub: hub.add(REPO), (REPO, "--public"), "--public was asked for"),
    (lambda hub: hub.add(REPO, private=False), (REPO, "--private"), "--private was asked for"),
    (tagged, (REPO, "--revision", "v1"), "v1 is a tag"),
    (tagged, (REPO, "--revision", "refs/pr/7"), "has no refs/pr/7"),
    (
        other_weights,
        (REPO,),
        "has other weights at main, which a loader might take: model.safetensors.",
    ),
)


@pytest.mark.parametrize(("prepare", "options", "said"), REFUSED)
def test_refused_before_anything_is_read(
    hub: Hub, run: Path, prepare: Callable[[Hub], object], options: tuple[str, ...], said: str
) -> None:
    prepare(hub)
    done = run_cli("ema", run, "--push-to-hub", *options)
    assert done.exit_code == 1, done.output
    assert done.stderr.count("error: ") == 1
    assert said in done.stderr
    assert not (run / "averaged").exists()


def test_the_visibility_stays(hub: Hub, result: Path) -> None:
    hub.add(REPO, private=False)
    ckavg.push(result, REPO)
    assert not hub.repos[REPO].private


def test_a_repository_that_was_made_public_meanwhile(hub: Hub, result: Path) -> None:
    hub.then["info"] = lambda: hub.add(REPO, private=False)
    with pytest.raises(HubError, match="exists and is public; private=True was asked for"):
        ckavg.push(result, REPO, private=True)
    assert hub.files(REPO) == {}


def test_a_name_that_is_taken(hub: Hub, result: Path) -> None:
    hub.taken.add(REPO)
    with pytest.raises(HubError, match=r"creating the repository failed: it conflicts with what is there \(409\)"):
        ckavg.push(result, REPO)


def test_a_gitignore_keeps_a_file_out(hub: Hub, result: Path) -> None:
    hub.ignored.add("tokenizer.json")
    with pytest.raises(HubError, match=r"tokenizer.json is missing from commit \w{8} or differs"):
        ckavg.push(result, REPO)


def test_a_sweep_that_tells_no_best(hub: Hub, run: Path) -> None:
    done = run_cli("sweep", run, "mean", "last", "--push-to-hub", REPO)
    assert done.exit_code == 2
    assert "Add --eval COMMAND" in done.stderr
    assert hub.requests == []


# --- progress ---


def test_progress_by_file(hub: Hub, result: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reports: list[ckavg.Progress] = []
    pushed = ckavg.push(result, REPO, on_progress=reports.append)
    sizes = [(result / name).stat().st_size for name in sorted(pushed.files)]
    large = [size for size in sizes if size >= 1 << 20]
    uploads = [each for each in reports if each.stage == "upload"]
    assert [each.done for each in uploads] == [0, large[0], sum(large), pushed.bytes]
    assert {each.total for each in uploads} == {pushed.bytes}
    assert reports[-1].done == pushed.bytes
    assert capfd.readouterr() == ("", "")


def test_bars_in_a_terminal(hub: Hub, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the client: by byte, while a large file is sent."""
    monkeypatch.setattr("ckavg.cli.push.stderr_is_terminal", lambda: True)
    monkeypatch.setattr("ckavg.cli.push.is_plain", lambda: False)
    assert re.search(r"model-0000\d-of-00003.safetensors: .*100%", run_cli("push", result, REPO).stderr)
    assert "safetensors" not in run_cli("push", result, "ada/another", "--quiet").stderr


# --- processes of their own ---


def pushed(result: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """`ckavg push` as a user types it; None takes a variable away."""
    env = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    command = [sys.executable, "-m", "ckavg", "push", str(result), REPO, "--verbose"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_stored_token(hub: Hub, result: Path, tmp_path: Path) -> None:
    """Also where it is not used by itself: who says `push` says that it is to be used. Debugging does not show it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    home = str(tmp_path / "home")
    done = pushed(result, HF_TOKEN=None, HF_HOME=home, HF_HUB_DISABLE_IMPLICIT_TOKEN="1", HF_DEBUG="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"url      {hub.url}/{REPO}"
    assert hub.files(REPO)["config.json"] == (result / "config.json").read_bytes()
    assert "<TOKEN>" in done.stderr


def test_with_xet_a_server_without_it_is_told(hub: Hub, result: Path) -> None:
    """The client's other transfer, in Rust, has errors of its own."""
    done = pushed(result, HF_HUB_DISABLE_XET=None)
    if hub.sent:
        return  # early clients ask first which transfer the server knows
    assert done.returncode == 1
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1
    assert "uploading model-00001-of-00003.safetensors failed" in done.stderr
    assert "the token may not see it (404)" in done.stderr


@pytest.mark.exhaustive
def test_transformers_loads_it_by_its_name(hub: Hub, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    source = tmp_path / "run"
    for step in (0, 10):
        transformers.LlamaForCausalLM(config).save_pretrained(source / f"checkpoint-{step}")
    out = ckavg.average(ckavg.open_run(source), ckavg.EMA()).directory
    ckavg.push(out, REPO)
    code = (
        "import torch\n"
        "from transformers import AutoModelForCausalLM as M\n"
        f"there, here = (M.from_pretrained(each).state_dict() for each in ({REPO!r}, {str(out)!r}))\n"
        "assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in here)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_asked_where_nothing_is_to_be_pushed(hub: Hub, run: Path) -> None:
    assert run_cli("ema", run).exit_code == 0
    assert hub.requests == []


@pytest.mark.exhaustive
def test_one_process_of_a_job_uploads(hub: Hub, run: Path, tmp_path: Path) -> None:
    words = ("ema", run, "--push-to-hub")
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    elsewhere = "--out", tmp_path / "refused", "--rank-timeout", "3"
    refused, done = run_jobs(jobs, 2, Job((*words, "nobody/x", *elsewhere)), Job((*words, "ada/x")))
    assert refused.status == [1, 1]
    assert "ada is neither nobody" in refused.err[0]
    assert "rank 0, which did not join" in refused.err[1]
    assert done.first_out.splitlines()[-1] == f"url      {hub.url}/ada/x"
    assert hub.requests.count("GET /api/whoami-v2") == 3, "once in vain, then before and after the averaging"
    assert len(hub.repos["ada/x"].commits) == 2
    assert not any(TOKEN in text for ran in (refused, done) for text in (*ran.out, *ran.err))
