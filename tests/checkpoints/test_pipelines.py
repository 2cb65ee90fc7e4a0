"""Pipelines of several models: each is averaged in its own folder, and all else is copied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckavg
from tests import reference
from tests.cli.runner import run_cli, snapshot

STEPS = (0, 500, 1000)
UNET, TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"
SHARDS = tuple(f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2))
FILES = {
    "model_index.json": {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.35.0", "unet": ["x", "y"]},
    "unet/config.json": {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.35.0"},
    "vae/config.json": {"_class_name": "AutoencoderKL"},
    "text_encoder/config.json": {"model_type": "clip_text_model", "torch_dtype": "float32"},
    "scheduler/scheduler_config.json": {"beta_end": 0.012},
    "tokenizer/vocab.json": {"a": 0},
}


def weights(seed: int) -> dict[str, dict[str, Tensor]]:
    """A step of a random walk, by component. Two components have tensors of one name."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "unet": {"conv.weight": (8, 4), "out.bias": (16,)},
        "vae": {"conv.weight": (3, 5)},
        "text_encoder": {"t": (7,)},
    }
    walk = {part: {n: torch.zeros(s) for n, s in of_part.items()} for part, of_part in shapes.items()}
    for _ in range(seed + 1):
        for of_part in walk.values():
            for name in of_part:
                of_part[name] = of_part[name] + torch.randn(of_part[name].shape, generator=generator)
    walk["text_encoder"]["position_ids"] = torch.arange(3) + seed
    return walk


def write_pipeline(root: Path, seeds: Sequence[int], *, sharded: bool = False) -> Path:
    for seed, step in zip(seeds, STEPS, strict=False):
        directory = root / f"checkpoint-{step}"
        for name, content in FILES.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(json.dumps(content))
        parts = weights(seed)
        for part, tensors in parts.items():
            save_file(tensors, directory / part / (TEXT if part == "text_encoder" else UNET), {"format": "pt"})
        if sharded:
            (directory / "unet" / UNET).unlink()
            placed = dict(zip(parts["unet"], SHARDS, strict=True))
            for tensor, file in placed.items():
                save_file({tensor: parts["unet"][tensor]}, directory / "unet" / file, {"format": "pt"})
            index = {"metadata": {"total_size": 192}, "weight_map": placed}
            (directory / "unet" / f"{UNET}.index.json").write_text(json.dumps(index))
        for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
            (directory / name).write_bytes(b"pickle")
    return root


def floats(directory: Path) -> dict[str, reference.Array]:
    return {
        f"{part}/{name}": values
        for part in ("unet", "vae", "text_encoder")
        for name, values in reference.load_floats(directory / part).items()
    }


@pytest.mark.parametrize(("scheme", "sharded"), [("pema", True), ("ema", False)])
def test_components_are_averaged_each_in_its_folder(tmp_path: Path, scheme: str, sharded: bool) -> None:
    run = write_pipeline(tmp_path / "run", (0, 1, 2), sharded=sharded)
    before = snapshot(run)
    if not sharded:
        inspected = json.loads(run_cli("inspect", run, "--json").stdout)
        assert inspected["checkpoints"][0]["files"] == [f"text_encoder/{TEXT}", f"unet/{UNET}", f"vae/{UNET}"]
    done = run_cli(scheme, run, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr

    checkpoints = [floats(run / f"checkpoint-{step}") for step in STEPS]
    expected = getattr(reference, scheme)(checkpoints, STEPS)
    found = floats(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)

    last = run / "checkpoint-1000"
    wanted = {path for path in snapshot(last) if not path.endswith((".bin", ".pkl"))}
    wanted |= {"README.md", "ckavg.json"}
    assert set(json.loads(done.stdout)["outputs"][0]["files"]) == wanted
    assert set(snapshot(tmp_path / "out")) - {".ckavg-local.json"} == wanted
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (last / name).read_bytes()
    after = snapshot(run)
    after.pop("averaged/path.json", None)
    assert after == before


@pytest.mark.parametrize("sharded", [False, True], ids=("whole", "sharded"))
def test_files_of_a_component_load_by_themselves(tmp_path: Path, sharded: bool) -> None:
    run = write_pipeline(tmp_path / "run", (0, 1, 2), sharded=sharded)
    result = ckavg.average(ckavg.open_run(run), ckavg.EMA(), dtype="bfloat16")
    for part, tensors in weights(2).items():
        files = sorted((result.directory / part).glob("*.safetensors"))
        found: dict[str, Tensor] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
                found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in tensors.items()}
        if part == "unet" and sharded:
            index = json.loads((result.directory / part / f"{UNET}.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
            assert index["weight_map"] == dict(zip(tensors, SHARDS, strict=True))
    assert torch.equal(found["position_ids"], torch.arange(3) + 2)
    assert json.loads((result.directory / "text_encoder" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "library_name: diffusers" in (result.directory / "README.md").read_text()


def test_a_component_can_be_left_out_of_the_path(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run", (0, 1, 2))
    told = json.loads(run_cli("pema", run, "--path-exclude", "vae/*", "--json").stdout)
    checkpoints = [floats(run / f"checkpoint-{step}") for step in STEPS]
    own = [{name: values for name, values in each.items() if not name.startswith("vae/")} for each in checkpoints]
    assert told["path_length"] == pytest.approx(reference.path_length(own)[0], rel=1e-6)
    assert told["excluded_from_path"] == ["vae/conv.weight"]
    assert told["parameters_counted"] == 8 * 4 + 16 + 7


def test_snapshots_have_the_folders_too(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run", (0, 1, 2))
    result = ckavg.average(ckavg.open_run(run), ckavg.EMA(), snapshot_every=500)
    snapshot_of = floats(result.directory / "checkpoint-500")
    expected = reference.ema([floats(run / f"checkpoint-{step}") for step in STEPS[:2]], STEPS[:2])
    for name in expected:
        np.testing.assert_allclose(snapshot_of[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_component_that_is_missing_or_cut_short_is_told(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run", (0, 1, 2), sharded=True)
    (run / "checkpoint-500" / "unet" / SHARDS[1]).unlink()
    os.truncate(run / "checkpoint-1000" / "vae" / UNET, 50)
    done = run_cli("ema", run)
    assert done.exit_code == 1
    assert f"checkpoint-500/unet/{SHARDS[1]} does not exist" in done.stderr
    assert f"checkpoint-1000/vae/{UNET} is 50 bytes long" in done.stderr


def test_a_pickled_component_is_averaged_among_others(tmp_path: Path) -> None:
    run = write_pipeline(tmp_path / "run", (0, 1, 2))
    expected = ckavg.average(ckavg.open_run(run), ckavg.EMA(), out=tmp_path / "expected").directory
    pickled = run / "checkpoint-500" / "vae" / "diffusion_pytorch_model.bin"
    torch.save(load_file(pickled.with_name(UNET)), pickled)
    pickled.with_name(UNET).unlink()
    result = ckavg.average(ckavg.open_run(run), ckavg.EMA(), out=tmp_path / "out").directory
    for place in (f"unet/{UNET}", f"vae/{UNET}"):
        assert (result / place).read_bytes() == (expected / place).read_bytes()


def test_a_whole_pipeline_is_the_anchor_of_a_run_of_one_component(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", (0,)) / "checkpoint-0"
    run = write_pipeline(tmp_path / "run", (1, 2))
    for path in list(run.glob("checkpoint-*/*")):
        if path.name != "unet":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / "checkpoint-0").rename(run / "checkpoint-100")
    result = ckavg.average(ckavg.open_run(run, init=base), ckavg.EMA())
    assert set(result.outputs[0].files) == {
        "README.md", "ckavg.json", f"unet/{UNET}", "unet/config.json",
    }  # fmt: skip
    parts = [{"unet/" + n: t.double().numpy() for n, t in weights(seed)["unet"].items()} for seed in range(3)]
    expected = reference.ema(parts, (0, 100, 500))
    found = {f"unet/{name}": values for name, values in reference.load_floats(result.directory / "unet").items()}
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
