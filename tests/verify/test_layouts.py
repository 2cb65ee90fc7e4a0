"""Results of every kind of run: pipelines, tensors that not all checkpoints have, NaN that was let through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckavg
from tests.cli.runner import run_cli
from tests.runs import random_run, write_run

STEPS = (0, 10, 20, 30)


def pipeline(root: Path) -> Path:
    for step, weights in zip(STEPS, random_run(3, len(STEPS), torch.float32), strict=True):
        for component, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
            folder = root / f"checkpoint-{step}" / component
            folder.mkdir(parents=True)
            save_file(
                {f"{component[0]}.{name}": each for name, each in weights.items()}, folder / f"{file}.safetensors"
            )
        (root / f"checkpoint-{step}" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return root


def partly_frozen(root: Path) -> Path:
    weights = random_run(3, len(STEPS), torch.bfloat16)
    del weights[1]["bias"], weights[2]["odd"]
    return write_run(root, weights, STEPS)


def diverged(root: Path) -> Path:
    weights = random_run(3, len(STEPS), torch.float32)
    weights[2]["tiles"][0, 5] = torch.nan
    return write_run(root, weights, STEPS)


RUNS = {
    "pipeline": (pipeline, ()),
    "common only": (partly_frozen, ("--common-only",)),
    "nonfinite": (diverged, ("--allow-nonfinite",)),
}


@pytest.mark.parametrize("scheme", [("pema",), ("pema", "--scope", "tensor"), ("bema",)], ids=" ".join)
@pytest.mark.parametrize("name", RUNS)
def test_sound_and_damaged(tmp_path: Path, name: str, scheme: tuple[str, ...]) -> None:
    make, options = RUNS[name]
    source = make(tmp_path / "run")
    verb, *more = scheme
    done = run_cli(verb, source, *more, *options, "--json")
    assert done.exit_code == 0, done.stderr
    result = Path(json.loads(done.stdout)["outputs"][0]["directory"])
    told = run_cli("verify", result, "--replay", "--sources", "--elements", "1000000", "--json")
    assert told.exit_code == 0, told.stdout + told.stderr
    seen = json.loads(told.stdout)
    assert (seen["problems"], seen["checks"]) == ([], ["record", "files", "weights", "sources", "replay"])
    assert seen["elements"] > 100_000

    (file, *_) = sorted(result.rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 64
    file.write_bytes(data)
    damaged = run_cli("verify", result, "--replay", "--elements", "1000000")
    assert damaged.exit_code == 1
    assert file.name in damaged.stdout + damaged.stderr
    assert "Traceback" not in damaged.stderr


@pytest.mark.parametrize("names", [["nowhere"], ["position_ids"], [""]])
def test_copied_names_tensors_of_the_result(tmp_path: Path, names: list[str]) -> None:
    result = ckavg.average(ckavg.open_run(partly_frozen(tmp_path / "run"), common_only=True), ckavg.EMA()).directory
    record = json.loads((result / "ckavg.json").read_text())
    assert record["copied"] == ["bias", "odd"]
    (result / "ckavg.json").write_text(json.dumps(record | {"copied": record["copied"] + names}))
    told = run_cli("verify", result)
    assert told.exit_code == 1
    assert f"copied names {names[0]!r}, which is no floating tensor of the result." in told.stdout
