"""What a result directory holds, and that it appears complete or not at all."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckavg
from ckavg.errors import OutputError, OutputExistsError, WriteError
from ckavg.output import output_path
from tests.cli.runner import placeless, snapshot, visible
from tests.runs import random_run, write_checkpoint, write_run

STEPS = (0, 10, 20)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(seed=1, count=3, dtype=torch.bfloat16), STEPS, shards=(1, 1, 3))


def test_files_and_shards_are_those_of_the_last_checkpoint(source: Path) -> None:
    result = ckavg.average(ckavg.open_run(source), ckavg.PEMA())
    last, index = source / "checkpoint-20", "model.safetensors.index.json"
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert result.directory == source / "averaged" / "pema-gamma0.15"
    assert set(result.outputs[0].files) == visible(result.directory)
    made = {"README.md", "ckavg.json"}
    assert visible(result.directory) == made | {"config.json", "tokenizer.json", index, *shards}
    for name in shards:
        with safe_open(result.directory / name, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert {name: (t.shape, t.dtype) for name, t in load_file(result.directory / name).items()} == {
            name: (t.shape, t.dtype) for name, t in load_file(last / name).items()
        }
    assert json.loads((result.directory / index).read_text()) == json.loads((last / index).read_text())


def test_index_states_the_size_of_what_is_written(source: Path) -> None:
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA(), dtype="float32")
    index = json.loads((result.directory / "model.safetensors.index.json").read_text())
    tensors = [t for file in result.directory.glob("*.safetensors") for t in load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_tensors_are_aligned_to_their_items(tmp_path: Path) -> None:
    weights = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5), "c": torch.ones(1, dtype=torch.int64)}
    result = ckavg.average(ckavg.open_run(write_run(tmp_path, [weights] * 2, (0, 1))), ckavg.EMA(), dtype="bfloat16")
    raw = (result.directory / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert all(header[name]["data_offsets"][0] % item == 0 for name, item in {"a": 1, "b": 2, "c": 8}.items())
    loaded = load_file(result.directory / "model.safetensors")
    assert all(torch.equal(loaded[name], weights[name].to(loaded[name].dtype)) for name in weights)


@pytest.mark.parametrize(
    ("config", "written"),
    [
        (
            '{"torch_dtype": "float32", "text_config": {"dtype": "float16", "width": 3}}',
            '{\n  "torch_dtype": "bfloat16",\n  "text_config": {\n    "dtype": "bfloat16",\n    "width": 3\n  }\n}\n',
        ),
        ('{ "torch_dtype" :"bfloat16"  }', '{ "torch_dtype" :"bfloat16"  }'),
    ],
    ids=["changed", "copied to the byte"],
)
def test_config_agrees_with_the_weights(source: Path, config: str, written: str) -> None:
    (source / "checkpoint-20" / "config.json").write_text(config)
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA())
    assert (result.directory / "config.json").read_text() == written


def test_side_files_that_the_run_lacks_come_from_init(tmp_path: Path) -> None:
    weights = random_run(seed=2, count=3, dtype=torch.float32)
    base = write_checkpoint(tmp_path / "base", weights[0])
    (base / "tokenizer.model").write_text("from the base model")
    (base / "config.json").write_text("{}")
    source = write_run(tmp_path / "run", weights[1:], (10, 20))
    result = ckavg.average(ckavg.open_run(source, init=base), ckavg.EMA())
    assert (result.directory / "tokenizer.model").read_text() == "from the base model"
    assert json.loads((result.directory / "config.json").read_text())["model_type"] == "llama"


def test_flat_files_become_a_model(tmp_path: Path) -> None:
    for step, weights in zip(STEPS, random_run(seed=3, count=3, dtype=torch.float32), strict=True):
        save_file(weights, tmp_path / f"step_{step}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    result = ckavg.average(ckavg.open_run(tmp_path), ckavg.EMA())
    assert {"model.safetensors", "config.json"} < set(result.outputs[0].files)


def test_sources_are_untouched(source: Path, tmp_path: Path) -> None:
    before = snapshot(source)
    ckavg.average(ckavg.open_run(source), ckavg.PEMA(), out=tmp_path / "out")
    after = snapshot(source)
    assert after.pop("averaged/path.json")
    assert after == before


def test_existing_result_is_kept_without_force(source: Path) -> None:
    run = ckavg.open_run(source)
    result = ckavg.average(run, ckavg.EMA())
    before = snapshot(result.directory)
    with pytest.raises(OutputExistsError, match=r"already holds a result; gamma 0.15 there, 0.2 asked\."):
        ckavg.average(run, ckavg.EMA(gamma=0.2), out=result.directory)
    again = ckavg.average(run, ckavg.EMA())
    assert again == result, "the same recipe: as it is, and nothing is read"
    assert snapshot(result.directory) == before
    ckavg.average(run, ckavg.EMA(), force=True)
    assert sorted(path.name for path in result.directory.parent.iterdir()) == ["ema-gamma0.15"]


@pytest.mark.parametrize("name", ["notes.txt", "eval/results.json", ".notes", "checkpoint-10/model.gguf", "link"])
def test_what_is_not_of_the_result_is_never_removed(source: Path, tmp_path: Path, name: str) -> None:
    """Its own files go, those that we keep beside them, and what a desktop leaves."""
    run = ckavg.open_run(source)
    result = ckavg.average(run, ckavg.EMA(), snapshot_every=10).directory
    (tmp_path / "folder").mkdir()
    path = result / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(tmp_path / "folder") if name == "link" else path.write_text("mine")
    before = snapshot(result)
    with pytest.raises(OutputExistsError, match=f"would be lost: {name}"):
        ckavg.plan_average(run, ckavg.EMA(), force=True)
    assert snapshot(result) == before
    path.unlink()
    for ours in (".DS_Store", ".ckavg-local.json", ".ckavg-partial.README.md", "README.md"):
        (result / ours).write_text("ours, or listed")
    ckavg.average(run, ckavg.EMA(), force=True)
    assert not (result / ".DS_Store").exists()


def test_what_comes_into_an_earlier_result_meanwhile_is_not_removed(source: Path) -> None:
    run = ckavg.open_run(source)
    result = ckavg.average(run, ckavg.EMA()).directory

    def add(news: ckavg.Progress) -> None:
        (result / "notes.txt").write_text("mine")

    with pytest.raises(OutputExistsError, match=r"would be lost: notes\.txt"):
        ckavg.average(run, ckavg.EMA(), force=True, on_progress=add)
    assert (result / "notes.txt").read_text() == "mine"
    assert [path.name for path in result.parent.iterdir()] == [result.name]


@pytest.mark.parametrize("meanwhile", [False, True])
def test_anything_else_is_never_replaced(source: Path, tmp_path: Path, meanwhile: bool) -> None:
    out = tmp_path / "out"

    def intrude(news: ckavg.Progress | None = None) -> None:
        if not out.exists():
            out.mkdir()
            (out / "thesis.tex").write_text("three years")

    if not meanwhile:
        intrude()
    with pytest.raises(OutputExistsError, match="is not a result of ckavg"):
        ckavg.average(ckavg.open_run(source), ckavg.EMA(), out=out, force=True, on_progress=intrude)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    assert not list(tmp_path.glob(".out*"))


def test_an_empty_directory_and_the_leftovers_of_a_killed_run_are_used(source: Path) -> None:
    partial = source / "averaged" / ".ema-gamma0.15.ckavg-partial"
    (partial / "folder").mkdir(parents=True)
    (partial / "model-00001-of-00003.safetensors").write_bytes(b"half")
    (source / "averaged" / "ema-gamma0.15").mkdir()
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA())
    assert (result.directory / "ckavg.json").exists()
    assert sorted(path.name for path in (source / "averaged").iterdir()) == ["ema-gamma0.15"]


def test_two_writers_of_one_result(source: Path) -> None:
    partial = source / "averaged" / ".ema-gamma0.15.ckavg-partial"
    partial.mkdir(parents=True)
    other = os.open(partial, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputError, match=r"Another ckavg is writing ema-gamma0\.15\."):
            ckavg.average(ckavg.open_run(source), ckavg.EMA())
        assert partial.is_dir()
    finally:
        os.close(other)


def test_full_disk_is_noticed_before_reading(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_path, "_MARGIN_BYTES", 1 << 60)
    with pytest.raises(WriteError, match="GB free; the result needs"):
        ckavg.plan_average(ckavg.open_run(source), ckavg.EMA())


def interrupt(news: ckavg.Progress) -> None:
    if news.stage == "replay" and news.done:
        raise KeyboardInterrupt


def test_interruption_leaves_what_was_there(source: Path) -> None:
    run, before = ckavg.open_run(source), snapshot(source)
    with pytest.raises(KeyboardInterrupt):
        ckavg.average(run, ckavg.BEMA(), on_progress=interrupt)
    assert snapshot(source) == before
    with pytest.raises(KeyboardInterrupt):
        ckavg.average(run, ckavg.PEMA(), on_progress=interrupt)
    assert [path.name for path in (source / "averaged").iterdir()] == ["path.json"]
    assert ckavg.path_length(ckavg.open_run(source)).bytes_read == 0
    ckavg.average(run, ckavg.EMA())
    before = snapshot(source)
    with pytest.raises(KeyboardInterrupt):
        ckavg.average(run, ckavg.EMA(), force=True, on_progress=interrupt)
    assert snapshot(source) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_earlier_result_is_back_after_an_interrupt_between_the_renames(
    source: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    run = ckavg.open_run(source)
    result = ckavg.average(run, ckavg.EMA()).directory
    before = snapshot(result)
    rename = os.rename

    def interrupted(place: Path, target: Path) -> None:
        if place.name.endswith(".ckavg-partial"):
            raise error
        rename(place, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises((error, WriteError)):
        ckavg.average(run, ckavg.EMA(), force=True)
    assert snapshot(result) == before


def test_record_in_the_result_is_the_record_returned(source: Path) -> None:
    result = ckavg.average(ckavg.open_run(source, from_step=0, last=3), ckavg.PEMA(gamma=0.2))
    written = json.loads((result.directory / "ckavg.json").read_text())
    assert placeless(written) == placeless(json.loads(result.to_json()))
    assert written["parameters"] == {"gamma": 0.2, "scope": "global", "pairing": "same", "clock": "steps"}
    assert written["selection"] == {"from_step": 0, "last": 3}
    assert sum(written["weights"]) == pytest.approx(1, abs=1e-12)
    weights = random_run(seed=1, count=1, dtype=torch.bfloat16)[0]
    floats = sum(tensor.numel() * 2 for tensor in weights.values() if tensor.is_floating_point())
    integers = sum(tensor.nbytes for tensor in weights.values() if not tensor.is_floating_point())
    assert written["bytes_read"] == 2 * 3 * floats + integers


def test_card(source: Path) -> None:
    (source / "checkpoint-20" / "config.json").write_text(
        json.dumps({"_name_or_path": "owner/base-model", "model_type": "llama", "torch_dtype": "bfloat16"})
    )
    result = ckavg.average(ckavg.open_run(source, last=2), ckavg.PEMA())
    card = (result.directory / "README.md").read_text()
    assert card.startswith(
        "---\nbase_model: owner/base-model\nlibrary_name: transformers\ntags:\n- checkpoint-averaging\n- pema\n"
        "base_model_relation: finetune\n---\n"
    )
    assert "    ckavg pema --gamma 0.15 --last 2\n" in card
    assert f"| 20 | {result.path_length[-1]:.4f} | " in card if result.path_length else False
    assert str(source) not in card


def test_card_reproduces_every_setting_that_matters(tmp_path: Path) -> None:
    weights = random_run(seed=1, count=4, dtype=torch.float32)
    base = write_checkpoint(tmp_path / "base", weights[0])
    run = ckavg.open_run(write_run(tmp_path / "run", weights[1:], (10, 20, 30)), init=base, every=10, every_from=10)
    settings = {"accumulate": "float64", "dtype": "bfloat16", "path_exclude": ("bias", "norm*"), "zero_sigma": "eps"}
    result = ckavg.average(run, ckavg.PEMA(), **settings)  # type: ignore[arg-type]
    assert (
        "    ckavg pema --gamma 0.15 --init BASE_MODEL --every 10 --dtype bfloat16 --accumulate float64 "
        "--path-exclude bias --path-exclude 'norm*' --zero-sigma eps\n"
    ) in (result.directory / "README.md").read_text()
