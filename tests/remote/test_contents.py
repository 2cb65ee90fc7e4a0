"""What the checkpoints of a run elsewhere may hold, whole or damaged; and lists that are not to be trusted."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

import ckavg
from ckavg.checkpoints.run import Selection
from ckavg.errors import CkavgError, CorruptFileError, NoCheckpointsError, ReadError, TruncatedShardError
from ckavg.sources import inspect_source
from tests.cli.runner import run_cli
from tests.hub.server import Hub, Repo, Tree, entry_of
from tests.remote.outcome import no_view_is_left, refused, served_of, weights_of
from tests.remote.published import OF_A_MODEL, publish_folders, publish_revisions, tree_of, weights
from tests.remote.questions import REPO
from tests.run.test_pipelines import write_pipeline

pytestmark = pytest.mark.usefixtures("without_pictures")

FAR = f"hf://{REPO}"
REVISIONS = f"{FAR}@step*"


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
    assert 'base_model: "lab/base"' in (out / "README.md").read_text()
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


def test_pickles_are_refused_with_their_names(hub: Hub, repo: Repo) -> None:
    for step in (10, 30):
        change(
            hub, repo, f"step{step}", {"pytorch_model.bin": (b"\x80\x02." * 3_000, True)}, without="model.safetensors"
        )
    told = refused("ema", FAR, "--revisions", "step*", named=f"{FAR}@step10")
    assert "pytorch_model.bin" in told
    assert "Download the run; ckavg inspect of the copy has a command that converts it." in told
    assert "python -c" not in told
    assert served_of(hub.served, ".bin") == 0


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
    no_view_is_left()


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
    told = refused("ema", FAR, "--revisions", "step*", named="is listed as a file of the run, and leads out of it")
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
    with pytest.raises(ReadError, match=r"^hf://lab/run@step10: model.safetensors came with other content"):
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
    told = (out / "README.md").read_text()
    assert 'license: "mit"' in told
    assert 'base_model: "lab/base"' in told
    assert "nothing" in refused("ema", FAR, "--revisions", "step*", "--copy", "*.nothing", named="*.nothing", status=2)


def test_an_empty_repository(hub: Hub) -> None:
    hub.add(REPO, private=False)
    with pytest.raises(NoCheckpointsError, match="hf://lab/run holds no checkpoints"):
        ckavg.open_run(FAR)
