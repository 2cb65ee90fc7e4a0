"""Which revisions and folders are a run, what they may hold, and listings that must not be trusted."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

import ckavg
from ckavg.averaging.sources import inspect_source
from ckavg.checkpoints.run import Selection
from ckavg.errors import (
    CkavgError,
    CorruptFileError,
    MixedOrderError,
    NoCheckpointsError,
    ReadError,
    SettingError,
    TruncatedShardError,
)
from tests.checkpoints.test_pipelines import write_pipeline
from tests.cli.runner import run_cli
from tests.hub.server import Hub, Repo, Tree, entry_of
from tests.runs import OLD_PICKLE, write_run
from tests.storage.outcome import nothing_is_busy, refused, served_of, weights_of
from tests.storage.published import BY_TOKENS, OF_A_MODEL, REPO, publish_folders, publish_revisions, tree_of, weights

FAR = f"hf://{REPO}"
REVISIONS = f"{FAR}@step*"


# --- revisions ---


def put(hub: Hub, repo: Repo, revision: str, value: float, **more: bytes) -> str:
    """A revision of one small file, and others by name; its commit."""
    files = {"model.safetensors": (save({"w": torch.full((3,), value)}), True), "config.json": (b"{}", False)}
    files |= {name.replace("__", "."): (data, False) for name, data in more.items()}
    repo.branches[revision] = hub.put(repo, files, f"Upload {revision}", label=revision)
    return repo.branches[revision]


@pytest.fixture
def model(hub: Hub) -> Repo:
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


def test_stages_are_not_mixed(hub: Hub, model: Repo) -> None:
    for name in ("stage1-step10", "stage1-step20", "stage2-step10", "stage2-step30"):
        put(hub, model, name, 1.0)
    with pytest.raises(MixedOrderError, match=r"^hf://lab/run: the revisions mix stages \(stage1, stage2\)") as met:
        ckavg.open_run(FAR, revisions=["stage*"])
    assert met.value.hint == "Choose one stage: --revisions 'stage1*'"
    assert ckavg.open_run(FAR, revisions=["stage2*"]).steps == (10, 30)
    assert hub.served.total() < 10_000


def test_slashes_bare_numbers_and_names_without_a_step(hub: Hub, model: Repo, tmp_path: Path) -> None:
    for value, name in enumerate(("runs/a/step10", "runs/a/step20", "runs/a/best", "500", "1500", "v1.0")):
        put(hub, model, name, float(value))
    opened = ckavg.open_run(FAR, revisions=["runs/a/*"])
    assert opened.steps == (10, 20)
    assert opened.warnings == ("Skipped revisions whose names state no step: runs/a/best.",)
    record = ckavg.average(opened, ckavg.EMA(), out=tmp_path / "out")
    assert "runs/a/step10 (anchor)" in run_cli("inspect", FAR, "--revisions", "runs/a/*").stdout
    commit = model.branches["runs/a/step10"]
    assert str(record.inputs[0].directory) == f"{FAR}@{commit}"
    assert ckavg.open_run(f"{FAR}@runs%2Fa%2Fs*").steps == (10, 20)
    assert ckavg.open_run(FAR, revisions=["[1-9]*"]).steps == (500, 1500)
    assert str(ckavg.open_run(FAR, revisions=["5*", "15*"]).address) == FAR


def test_what_matches_nothing_names_what_is_there(hub: Hub, model: Repo) -> None:
    for step in range(10, 60, 10):
        put(hub, model, f"stage1-step{step}-tokens1B", 1.0)
    told = refused("inspect", FAR, "--revisions", "nothing*", named=f"{FAR}: no revision matches 'nothing*'")
    assert "it has stage1-step*, main" in told
    assert "--revisions 'step*'" in told or "--revisions 'stage1-step*'" in told
    told = refused("inspect", FAR, "--revisions", "ma*", named=f"{FAR}: no matching revision states a step: main")
    assert "Expected names such as step1000" in told


def test_one_model_is_no_run(hub: Hub, model: Repo) -> None:
    told = refused("ema", FAR, named=f"{FAR} is one checkpoint, not a directory of checkpoints.")
    assert "An average needs several checkpoints of one run" in told
    for step in (10, 20):
        put(hub, model, f"stage1-step{step}-tokens{step}B", 1.0)
    told = refused("ema", FAR, named=f"{FAR} is one checkpoint, not a directory of checkpoints.")
    assert "Its revisions look like checkpoints: --revisions 'stage1-step*'" in told
    told = refused("ema", f"{FAR}@main", named=f"{FAR}@main is one checkpoint")
    assert "--revisions 'stage1-step*'" in told
    told = refused("ema", f"{FAR}@nowhere", named="looking for its revision nowhere")
    assert "Check the name and the revision" in told
    told = refused("inspect", f"{FAR}@main", "--revisions", "step*", named="names a revision", status=2)
    assert "Leave one of them out" in told


def test_headers_of_the_chosen_alone(hub: Hub, model: Repo) -> None:
    for step in range(100, 2100, 100):
        put(hub, model, f"step{step}", float(step))
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


def test_a_branch_that_moves_changes_nothing(hub: Hub, model: Repo, tmp_path: Path) -> None:
    before = {f"step{step}": put(hub, model, f"step{step}", float(step)) for step in (10, 20, 30)}
    expected = ckavg.average(ckavg.open_run(FAR, revisions=["step*"]), ckavg.EMA(), out=tmp_path / "before")
    hub.then["refs"] = lambda: model.branches.update(step10=model.branches["step30"])
    run = ckavg.open_run(FAR, revisions=["step*"])
    hub.then["fetch"] = lambda: model.branches.pop("step20")
    result = ckavg.average(run, ckavg.EMA(), out=tmp_path / "after")
    assert weights_of(result.directory) == weights_of(expected.directory)
    assert [str(each.directory) for each in result.inputs] == [f"{FAR}@{commit}" for commit in before.values()]
    assert model.branches["step10"] == before["step30"]


def test_the_same_weights_twice_are_told_before_they_are_fetched(hub: Hub, tmp_path: Path) -> None:
    weights = [{"w": torch.full((100_000,), float(each))} for each in (1, 2, 1, 3)]
    publish_revisions(hub, REPO, write_run(tmp_path / "run", weights, (10, 20, 30, 40)))
    hub.forget()
    run = ckavg.open_run(FAR, revisions=["step*"])
    assert run.warnings == (
        "Steps 10, 30 hold the same weights, by the hashes of their files: perhaps one was uploaded in place of "
        "another. Leave out the wrong ones with --from-step, --to-step or --revisions.",
    )
    assert served_of(hub.served) == 4 * (64 << 10)
    done = run_cli("inspect", FAR, "--revisions", "step*")
    assert "Steps 10, 30 hold the same weights" in done.output


def test_settings_that_are_of_no_use_here(model: Repo, tmp_path: Path) -> None:
    for words in (("s3://bucket/run",), (str(tmp_path),)):
        with pytest.raises(SettingError, match=r"`revisions` applies to a repository on the Hub; .* is not one"):
            ckavg.open_run(*words, revisions=["step*"])
    with pytest.raises(SettingError, match="`max_disk` limits downloads; all of this is on this machine"):
        ckavg.open_run(tmp_path, max_disk="1GB")
    for bad in ("many", "-1", "1.5.2GB", "1PB", "", "0x10", -1):
        with pytest.raises(SettingError, match="is not a size"):
            ckavg.open_run(FAR, max_disk=bad)
    assert refused("ema", FAR, "--max-disk", "much", named="'much' is not a size", status=2).count("50GB") == 1
    with pytest.raises(SettingError, match="names no repository"):
        ckavg.open_run("hf://@main")
    model.branches["step10"] = model.branches["main"]
    with pytest.raises(SettingError, match="may match several revisions"):
        ckavg.open_run(FAR, init=f"{FAR}@step*", revisions=["step10"])


# --- contents ---


def change(hub: Hub, repo: Repo, revision: str, files: Tree, *, without: str = "") -> None:
    """Another commit of a revision, with these files and without those of one name."""
    tree = {name: each for name, each in repo.commits[repo.branches[revision]].items() if name != without}
    repo.branches[revision] = hub.put(repo, tree | files, f"Change {revision} {sorted(files)}", label=revision)


def test_pipelines_as_revisions(hub: Hub, tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run", (0, 1, 2))
    publish_revisions(hub, REPO, run)
    here = ckavg.average(ckavg.open_run(run), ckavg.PEMA(), out=tmp_path / "here").directory
    out = ckavg.average(ckavg.open_run(REVISIONS, max_disk=0), ckavg.PEMA(), out=tmp_path / "out").directory
    names = {path.relative_to(here) for path in here.rglob("*") if path.is_file()}
    names -= {Path("README.md"), Path("ckavg.json"), Path(".ckavg-local.json")}
    assert {Path("unet/config.json"), Path("tokenizer/vocab.json"), Path("model_index.json")} < names
    assert {name: (out / name).read_bytes() for name in names} == {name: (here / name).read_bytes() for name in names}


def test_adapters_as_revisions(hub: Hub, tmp_path: Path) -> None:
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": "lab/base",
        "target_modules": ["q"],
    }
    for step in (10, 20, 30):
        place = tmp_path / "run" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        save_file({"q.lora_A": torch.full((2, 3), float(step))}, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config))
    repo = publish_revisions(hub, REPO, tmp_path / "run")
    here = ckavg.average(ckavg.open_run(tmp_path / "run"), ckavg.EMA(), out=tmp_path / "here").directory
    out = ckavg.average(ckavg.open_run(REVISIONS), ckavg.EMA(), out=tmp_path / "out").directory
    assert weights_of(out) == weights_of(here)
    assert (out / "adapter_config.json").read_bytes() == (here / "adapter_config.json").read_bytes()
    assert "base_model: lab/base" in (out / "README.md").read_text().replace('"', "")
    change(hub, repo, "step20", {"adapter_config.json": (json.dumps(config | {"r": 8}).encode(), False)})
    with pytest.raises(ckavg.CkavgError, match=r"hf://lab/run@step20|step 20"):
        ckavg.open_run(REVISIONS)


def test_folders_below_a_folder_and_flat_files(hub: Hub, run: Path, tmp_path: Path) -> None:
    repo = publish_folders(hub, REPO, run)
    nested: Tree = {f"runs/a/{name}": each for name, each in tree_of(run).items()}
    flat: Tree = {
        f"flat/step_{step}.safetensors": (save({"w": torch.full((5,), float(step))}), True) for step in (9, 10, 200)
    }
    change(hub, repo, "main", nested | flat)
    expected = ckavg.average(ckavg.open_run(run), ckavg.EMA(), out=tmp_path / "here").directory
    assert run_cli("ema", f"{FAR}@main/runs/a", "--out", tmp_path / "a").exit_code == 0
    assert weights_of(tmp_path / "a") == weights_of(expected)
    assert ckavg.open_run(f"{FAR}/flat").steps == (9, 10, 200)
    assert ckavg.open_run(FAR).steps == (10, 20, 30)
    assert "listing the files of main/nowhere failed" in refused("ema", f"{FAR}/nowhere", named=REPO)


def test_folders_of_revisions(hub: Hub, repo: Repo) -> None:
    """Of each revision, one folder is the checkpoint."""
    for step in (10, 20, 30):
        change(hub, repo, f"step{step}", {"ema/model.safetensors": (save({"w": torch.full((5,), float(step))}), True)})
    run = ckavg.open_run(f"{REVISIONS}/ema")
    assert run.steps == (10, 20, 30)
    assert run.checkpoints[0].entries.keys() == {"w"}


def test_old_pickles_are_refused_with_their_names(hub: Hub, repo: Repo) -> None:
    for step in (10, 30):
        change(hub, repo, f"step{step}", {"pytorch_model.bin": (OLD_PICKLE * 3_000, True)}, without="model.safetensors")
    told = refused("ema", FAR, "--revisions", "step*", named=f"{FAR}@step10")
    assert "pytorch_model.bin" in told
    assert "Download the run; ckavg inspect of the copy has a command that converts it." in told
    assert "python -c" not in told


@pytest.mark.parametrize("bound", [None, 0])
def test_pickles_are_read_as_safetensors_are(hub: Hub, model: Repo, tmp_path: Path, bound: int | None) -> None:
    """Of a pickle, too, no more is fetched than its ends and its tensors; the optimizer in it is left where it is."""
    results = []
    for name in ("model.safetensors", "pytorch_model.bin"):
        for step in (10, 20, 30):
            generator = torch.Generator().manual_seed(step)
            tensors = {name: torch.randn(300, 70, generator=generator) for name in ("z", "a")}
            file = io.BytesIO(save(tensors))
            if name == "pytorch_model.bin":
                torch.save({"model": tensors, "optimizer": {"exp_avg": torch.zeros(1 << 20)}}, file)
            tree: Tree = {name: (file.getvalue(), True), "config.json": (b"{}", False)}
            model.branches[f"step{step}"] = hub.put(model, tree, f"{name} {step}", label=f"step{step}")
        run = ckavg.open_run(REVISIONS, max_disk=bound)
        results.append(ckavg.average(run, ckavg.PEMA(), out=tmp_path / name).directory / "model.safetensors")
    assert results[0].read_bytes() == results[1].read_bytes()
    assert bound is None or served_of(hub.served, ".bin") < 3 << 20


def test_a_revision_without_weights(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    repo.branches["step20"] = hub.put(repo, dict(OF_A_MODEL), "only a card", label="step20")
    told = refused("ema", FAR, "--revisions", "step*", named=f"{FAR}@step20 holds no weights.")
    assert "--skip-incomplete" in told
    run = ckavg.open_run(REVISIONS, skip_incomplete=True)
    assert run.steps == (10, 30)
    assert any(f"{FAR}@step20" in warning or "step20" in warning for warning in run.warnings)
    result = ckavg.average(run, ckavg.EMA(), out=tmp_path / "out")
    assert result.steps == (10, 30)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_a_revision_with_a_part_missing(hub: Hub, repo: Repo, name: str) -> None:
    change(hub, repo, "step20", {}, without=name)
    if name.endswith(".json"):
        assert ckavg.open_run(REVISIONS).steps == (10, 20, 30), "all shards of the count in their names are there"
        return
    told = refused("ema", FAR, "--revisions", "step*", named=f"{FAR}@step20/{name} does not exist")
    assert "--skip-incomplete" in told
    assert ckavg.open_run(REVISIONS, skip_incomplete=True).steps == (10, 30)
    assert run_cli("inspect", FAR, "--revisions", "step*").exit_code == 1
    nothing_is_busy()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", CkavgError),
        (b"\0" * 7, CkavgError),
        (struct.pack("<Q", 10**15) + b"{}", CkavgError),
        (struct.pack("<Q", 90_000_000) + b"{" * 100_000, CkavgError),
        (struct.pack("<Q", 5) + b"{{{{{" + b"\0" * 100, CorruptFileError),
        (save({"a": torch.ones(1000, 200), "b": torch.ones(200, 500), "c": torch.ones(3)})[:-4], TruncatedShardError),
    ],
    ids=["nothing", "no length", "beyond any file", "beyond this file", "no JSON", "cut short"],
)
def test_weights_that_are_none(hub: Hub, repo: Repo, data: bytes, kind: type[CkavgError]) -> None:
    change(hub, repo, "step10", {"model.safetensors": (data, True)})
    (problem,) = inspect_source(REVISIONS, Selection()).problems
    assert isinstance(problem, kind)
    assert f"{FAR}@step10/model.safetensors" in problem.message
    del problem  # it knows where it was raised, and so the run
    refused("ema", FAR, "--revisions", "step*", named=f"{FAR}@step10/model.safetensors")


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/etc/evil.json", "a/../../../evil.json", ".."])
def test_names_that_lead_out(hub: Hub, repo: Repo, tmp_path: Path, name: str) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    change(hub, repo, "step20", {name: (b"evil" * 10, False)})
    told = refused("ema", FAR, "--revisions", "step*", named="leads out of the run")
    assert repr(name) in told
    assert {path.name for path in tmp_path.iterdir()} <= {*before, "cache", "hf-home"}
    assert not list(tmp_path.rglob("evil*"))


def test_sizes_that_cannot_be(hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    def lying(path: str, data: bytes, is_large: bool) -> dict[str, object]:
        entry = entry_of(path, data, is_large)
        if path == "model.safetensors":
            entry["size"] = entry["lfs"]["size"] = 10**18
        return entry

    monkeypatch.setattr("tests.hub.server.entry_of", lying)
    told = refused("ema", FAR, "--revisions", "step*", named=f"{FAR}@step10")
    assert "model.safetensors" in told


def test_a_header_that_is_another_one_later(hub: Hub, repo: Repo, run: Path, tmp_path: Path) -> None:
    """What was checked is the header that was listed; the file that comes has to be the one with that hash."""
    data = bytearray(weights(run))
    opened = ckavg.open_run(REVISIONS)
    digest = next(key for key, value in hub.storage.items() if value == bytes(data))
    data[20] ^= 1
    hub.storage[digest] = bytes(data)
    with pytest.raises(ReadError, match=r"^hf://lab/run@step10: model.safetensors does not have its SHA-256"):
        ckavg.average(opened, ckavg.EMA(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_copied_and_what_the_card_tells(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    card = b"---\nlicense: mit\nbase_model: lab/base\n---\n\n# Of the run\n"
    change(
        hub,
        repo,
        "step30",
        {
            "README.md": (card, False),
            "LICENSE": (b"Do as you like.", False),
            "modeling_own.py": (b"raise SystemExit('never run')", False),
            "extra/notes.txt": (b"notes", False),
            "extra/more.bin": (b"\0" * 10, False),
        },
    )
    done = run_cli("ema", FAR, "--revisions", "step*", "--copy", "extra/*.txt", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    out = tmp_path / "out"
    assert (out / "modeling_own.py").read_bytes() == b"raise SystemExit('never run')"
    assert "modeling_own.py" in done.stderr
    assert (out / "LICENSE").read_bytes() == b"Do as you like."
    assert (out / "extra" / "notes.txt").read_bytes() == b"notes"
    assert not (out / "extra" / "more.bin").exists()
    told = (out / "README.md").read_text().replace('"', "")
    assert "license: mit" in told
    assert "base_model: lab/base" in told
    assert "nothing" in refused("ema", FAR, "--revisions", "step*", "--copy", "*.nothing", named="*.nothing", status=2)


def test_an_empty_repository(hub: Hub) -> None:
    hub.add(REPO, private=False)
    with pytest.raises(NoCheckpointsError, match="hf://lab/run holds no checkpoints"):
        ckavg.open_run(FAR)
