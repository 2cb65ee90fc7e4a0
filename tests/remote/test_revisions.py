"""Which revisions of a repository are a run, in which order, and what is told of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import ckavg
from ckavg.errors import MixedOrderError, SettingError
from tests.cli.runner import run_cli
from tests.hub.server import Hub, Repo
from tests.remote.outcome import refused, served_of, weights_of
from tests.remote.published import BY_TOKENS, publish_revisions
from tests.remote.questions import REPO
from tests.runs import write_run

FAR = f"hf://{REPO}"


def put(hub: Hub, repo: Repo, revision: str, value: float, **more: bytes) -> str:
    """A revision of one small file, and others by name; its commit."""
    files = {"model.safetensors": (save({"w": torch.full((3,), value)}), True), "config.json": (b"{}", False)}
    files |= {name.replace("__", "."): (data, False) for name, data in more.items()}
    repo.branches[revision] = hub.put(repo, files, f"Upload {revision}", label=revision)
    return repo.branches[revision]


@pytest.fixture
def repo(hub: Hub) -> Repo:
    """A repository of one model."""
    repo = hub.add(REPO, private=False)
    repo.branches["main"] = put(hub, repo, "main", 0.0)
    return repo


@pytest.mark.parametrize("tags", [False, True])
def test_names_with_tokens_in_numeric_order(hub: Hub, tmp_path: Path, tags: bool) -> None:
    steps = (90, 100, 1000, 20)
    run = write_run(tmp_path / "run", [{"w": torch.full((3,), float(step))} for step in steps], steps)
    publish_revisions(hub, REPO, run, called=BY_TOKENS, tags=tags)
    opened = ckavg.open_run(FAR, revisions=["stage1-*"])
    assert opened.steps == (20, 90, 100, 1000)
    assert opened.warnings == ()
    here = ckavg.average(ckavg.open_run(run), ckavg.PEMA(), out=tmp_path / "here")
    assert weights_of(ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "out").directory) == weights_of(here.directory)


def test_stages_are_not_mixed(hub: Hub, repo: Repo) -> None:
    for name in ("stage1-step10", "stage1-step20", "stage2-step10", "stage2-step30"):
        put(hub, repo, name, 1.0)
    with pytest.raises(MixedOrderError, match=r"^hf://lab/run: the revisions mix stages \(stage1, stage2\)") as met:
        ckavg.open_run(FAR, revisions=["stage*"])
    assert met.value.hint == "Choose those of one stage: --revisions 'stage1*'"
    assert ckavg.open_run(FAR, revisions=["stage2*"]).steps == (10, 30)
    assert hub.served.total() < 10_000


def test_slashes_bare_numbers_and_names_without_a_step(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    for value, name in enumerate(("runs/a/step10", "runs/a/step20", "runs/a/best", "500", "1500", "v1.0")):
        put(hub, repo, name, float(value))
    opened = ckavg.open_run(FAR, revisions=["runs/a/*"])
    assert opened.steps == (10, 20)
    assert opened.warnings == ("Passed over, for the name of the revision states no step: runs/a/best.",)
    record = ckavg.average(opened, ckavg.EMA(), out=tmp_path / "out")
    assert "runs/a/step10 (anchor)" in run_cli("inspect", FAR, "--revisions", "runs/a/*").stdout
    commit = repo.branches["runs/a/step10"]
    assert str(record.inputs[0].directory) == f"{FAR}@{commit}"
    assert ckavg.open_run(f"{FAR}@runs%2Fa%2Fs*").steps == (10, 20)
    assert ckavg.open_run(FAR, revisions=["[1-9]*"]).steps == (500, 1500)
    assert str(ckavg.open_run(FAR, revisions=["5*", "15*"]).address) == FAR


def test_what_matches_nothing_names_what_is_there(hub: Hub, repo: Repo) -> None:
    for step in range(10, 60, 10):
        put(hub, repo, f"stage1-step{step}-tokens1B", 1.0)
    told = refused("inspect", FAR, "--revisions", "nothing*", named=f"{FAR}: no revision matches 'nothing*'")
    assert "it has stage1-step*, main" in told
    assert "--revisions 'step*'" in told or "--revisions 'stage1-step*'" in told
    told = refused("inspect", FAR, "--revisions", "ma*", named=f"{FAR}: no revision that matches states a step: main")
    assert "Expected names such as step1000" in told


def test_one_model_is_no_run(hub: Hub, repo: Repo) -> None:
    told = refused("ema", FAR, named=f"{FAR} is one checkpoint, not a run.")
    assert "Expected folders such as checkpoint-500/" in told
    for step in (10, 20):
        put(hub, repo, f"stage1-step{step}-tokens{step}B", 1.0)
    told = refused("ema", FAR, named=f"{FAR} is one checkpoint, not a run.")
    assert "Its revisions look like checkpoints: --revisions 'stage1-step*'" in told
    told = refused("ema", f"{FAR}@main", named=f"{FAR}@main is one checkpoint")
    assert "--revisions 'stage1-step*'" in told
    told = refused("ema", f"{FAR}@nowhere", named="looking for its revision nowhere")
    assert "Check the name and the revision" in told
    told = refused("inspect", f"{FAR}@main", "--revisions", "step*", named="names one revision", status=2)
    assert "Leave one of them out" in told


def test_headers_of_the_chosen_alone(hub: Hub, repo: Repo) -> None:
    for step in range(100, 2100, 100):
        put(hub, repo, f"step{step}", float(step))
    hub.forget()
    assert ckavg.open_run(FAR, revisions=["step*"], last=3).steps == (1800, 1900, 2000)
    of_headers = [file for file in hub.served if file.endswith("model.safetensors")]
    assert sorted(of_headers) == [f"{REPO}@step{step}/model.safetensors" for step in (1800, 1900, 2000)]
    assert sum("/tree/" in line for line in hub.requests) == 3
    hub.forget()
    run = ckavg.open_run(FAR, revisions=["step*"], every=500, from_step=500, to_step=1700)
    assert run.steps == (500, 1000, 1500)
    assert sum("/tree/" in line for line in hub.requests) == 3
    assert sum("model.safetensors" in line for line in hub.requests) <= 2 * 3


def test_a_branch_that_moves_changes_nothing(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    before = {f"step{step}": put(hub, repo, f"step{step}", float(step)) for step in (10, 20, 30)}
    expected = ckavg.average(ckavg.open_run(FAR, revisions=["step*"]), ckavg.EMA(), out=tmp_path / "before")
    hub.then["refs"] = lambda: repo.branches.update(step10=repo.branches["step30"])
    run = ckavg.open_run(FAR, revisions=["step*"])
    hub.then["fetch"] = lambda: repo.branches.pop("step20")
    result = ckavg.average(run, ckavg.EMA(), out=tmp_path / "after")
    assert weights_of(result.directory) == weights_of(expected.directory)
    assert [str(each.directory) for each in result.inputs] == [f"{FAR}@{commit}" for commit in before.values()]
    assert repo.branches["step10"] == before["step30"]


def test_the_same_weights_twice_are_told_before_they_are_fetched(hub: Hub, tmp_path: Path) -> None:
    weights = [{"w": torch.full((100_000,), float(each))} for each in (1, 2, 1, 3)]
    publish_revisions(hub, REPO, write_run(tmp_path / "run", weights, (10, 20, 30, 40)))
    hub.forget()
    run = ckavg.open_run(FAR, revisions=["step*"])
    assert run.warnings == (
        "Steps 10, 30 hold the same weights, by the hashes of their files: one was uploaded in the place of another, "
        "perhaps. Leave out those that are wrong with --from-step, --to-step or --revisions.",
    )
    assert served_of(hub.served) == 4 * (64 << 10)
    done = run_cli("inspect", FAR, "--revisions", "step*")
    assert "Steps 10, 30 hold the same weights" in done.output


def test_settings_that_are_of_no_use_here(repo: Repo, tmp_path: Path) -> None:
    for words in (("s3://bucket/run",), (str(tmp_path),)):
        with pytest.raises(SettingError, match=r"--revisions are those of a repository on the Hub; .* is none"):
            ckavg.open_run(*words, revisions=["step*"])
    with pytest.raises(SettingError, match="--max-disk bounds what is fetched; all of this is here"):
        ckavg.open_run(tmp_path, max_disk="1GB")
    for bad in ("many", "-1", "1.5.2GB", "1PB", "", "0x10", -1):
        with pytest.raises(SettingError, match="is no size"):
            ckavg.open_run(FAR, max_disk=bad)
    assert refused("ema", FAR, "--max-disk", "much", named="'much' is no size", status=2).count("50GB") == 1
    with pytest.raises(SettingError, match="names no repository"):
        ckavg.open_run("hf://@main")
    repo.branches["step10"] = repo.branches["main"]
    with pytest.raises(SettingError, match="may be several revisions"):
        ckavg.open_run(FAR, init=f"{FAR}@step*", revisions=["step10"])
