"""Small runs in the layouts of real trainers, opened and averaged."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from safetensors import safe_open
from torch import Tensor

import ckavg
from ckavg.errors import MismatchError, MixedOrderError, UnsupportedFormatError
from tests import trainers
from tests.cli.runner import run_cli
from tests.trainers import drifting, put


def opened(build: trainers.Build, root: Path, **selection: object) -> ckavg.Run:
    build(root)
    return ckavg.open_run(root, **selection)  # type: ignore[arg-type]


def loaded(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def assert_average(got: dict[str, Tensor], paths: Sequence[Path], weights: Sequence[float]) -> None:
    """Each tensor is the weighted sum of those in the files, in float64."""
    of_all = [loaded(path)[0] for path in paths]
    assert got.keys() == of_all[-1].keys()
    for name, tensor in got.items():
        expected = sum(w * each[name].double().numpy() for w, each in zip(weights, of_all, strict=True))
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=1e-6, atol=1e-7)


def test_an_alpha_that_differs_is_refused(tmp_path: Path) -> None:
    trainers.diffusers_lora(tmp_path)
    other = trainers.PT | {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 4})}
    put(tmp_path / "checkpoint-200/pytorch_lora_weights.safetensors", drifting(1, 200, trainers.UNET_LORA), other)
    with pytest.raises(MismatchError, match=r"step 300: in the header .*lora_adapter_metadata is .* at step 200"):
        ckavg.open_run(tmp_path)
    assert ckavg.open_run(tmp_path, skip_step=(200,)).steps == (100, 300)


def kohya_hashes(path: Path) -> dict[str, str]:
    """The hashes as sd-scripts defines them, from the file written anew by the safetensors library."""
    tensors, header = loaded(path)
    data = safetensors.torch.save(tensors, {key: value for key, value in header.items() if key.startswith("ss_")})
    start = int.from_bytes(data[:8], "little") + 8
    file = io.BytesIO(data)
    file.seek(0x100000)
    legacy = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    return {"sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(), "sshs_legacy_hash": legacy}


@pytest.mark.parametrize("large", [False, True], ids=("small", "beyond 1 MiB"))
def test_kohya_epochs_are_one_run(tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        big: trainers.Shapes = {"lora_unet_blocks_0_q.lora_down.weight": (64, 5000)}
        monkeypatch.setattr(trainers, "KOHYA", trainers.KOHYA | big)
    run = opened(trainers.kohya_epochs, tmp_path)
    assert run.steps == (100, 200, 300, 400)
    result = ckavg.average(run, ckavg.EMA(gamma=0.3))
    tensors, header = loaded(result.directory / "mylora.safetensors")
    paths = [*(tmp_path / f"mylora-00000{epoch}.safetensors" for epoch in (1, 2, 3)), tmp_path / "mylora.safetensors"]
    assert_average(tensors, paths, result.weights)
    of_last = loaded(paths[-1])[1]
    of_last.pop("modelspec.hash_sha256")  # how it was made is not known
    assert header == of_last | kohya_hashes(result.directory / "mylora.safetensors")
    assert ckavg.verify_result(result.directory, replay=True, sources=True).problems == ()


def test_steps_in_headers_put_two_clocks_in_order(tmp_path: Path) -> None:
    run = opened(trainers.kohya_steps_and_epochs, tmp_path)
    assert run.steps == (100, 150, 200, 300)
    assert [each.path.name for each in run.checkpoints][1] == "mylora-000001.safetensors"
    assert any(
        "mylora.safetensors holds the same weights as mylora-000002.safetensors" in each for each in run.warnings
    )


def test_without_headers_the_steps_count_and_the_rest_is_named(tmp_path: Path) -> None:
    for name, step in {"a-step00000100": 1, "a-step00000200": 2, "a-000001": 3, "a-000002": 4, "a": 5}.items():
        put(tmp_path / f"{name}.safetensors", drifting(3, step, trainers.KOHYA))
    run = ckavg.open_run(tmp_path)
    assert run.steps == (100, 200, 300)
    assert [each.path.name for each in run.checkpoints][-1] == "a.safetensors"
    assert any("a.safetensors states no step: it is assumed to be the end" in each for each in run.warnings)
    assert any("a-000001.safetensors, a-000002.safetensors" in each for each in run.warnings)


def test_two_runs_are_refused_and_one_is_chosen_by_name(tmp_path: Path) -> None:
    trainers.two_runs_by_name(tmp_path)
    with pytest.raises(MixedOrderError, match=r"to 2 runs, stages or experiments: styleA.*; styleB") as met:
        ckavg.open_run(tmp_path)
    assert met.value.hint.endswith("--match 'styleA*'")
    assert ckavg.open_run(tmp_path, match="styleB*").steps == (750, 1250)
    done = run_cli("mean", tmp_path, "--match", "styleA*", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["selection"] == {"match": "styleA*"}


def test_two_runs_by_their_headers_are_refused(tmp_path: Path) -> None:
    for step, name in ((100, "cat"), (200, "dog"), (300, "cat")):
        put(tmp_path / f"step_{step}.safetensors", drifting(1, step, trainers.KOHYA), {"ss_output_name": name})
    with pytest.raises(MixedOrderError, match=r"2 runs, by ss_output_name in their headers: cat \(.*\); dog \("):
        ckavg.open_run(tmp_path)
    assert ckavg.open_run(tmp_path, steps=(100, 300)).steps == (100, 300)


def test_tensors_without_elements_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match=r"2 tensors without elements, of 3: embed.weight") as met:
        opened(trainers.zero3_empty, tmp_path)
    assert "zero_to_fp32.py" in met.value.hint
    assert run_cli("inspect", tmp_path).exit_code == 1


def test_config_and_tokenizer_beside_the_checkpoints(tmp_path: Path) -> None:
    run = opened(trainers.accelerate_without_config, tmp_path)
    result = ckavg.average(run, ckavg.EMA())
    for name in ("config.json", "tokenizer_config.json"):
        assert (result.directory / name).read_bytes() == (tmp_path / name).read_bytes()
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    plan = ckavg.plan_average(ckavg.open_run(tmp_path), ckavg.Mean())
    assert any("has no config" in each and "--init" in each for each in plan.warnings)
