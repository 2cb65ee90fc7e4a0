"""Which weight files of a checkpoint belong to the model, and warnings about what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ckavg
from ckavg.checkpoints.inspect import Inspection, inspect_run
from ckavg.checkpoints.run import Selection
from ckavg.errors import MismatchError, MissingShardError, UnsupportedFormatError
from tests.runs import write_checkpoint
from tests.trainers import note, put

STEPS = (10, 20, 30)
MODEL = "model.safetensors"


def weights(step: int, name: str = "w") -> dict[str, Tensor]:
    return {name: torch.arange(6.0) + step}


def write_run(root: Path, *files: str, main: str = MODEL) -> Path:
    """Checkpoints with a model, and further weight files of other tensors."""
    for step in STEPS:
        here = root / f"checkpoint-{step}"
        put(here / main, weights(step), {"format": "pt"})
        note(here / "config.json", {"model_type": "llama"})
        for file in files:
            put(here / file, weights(2 * step, f"of.{Path(file).stem}"))
    return root


def mean_files(root: Path) -> dict[str, dict[str, Tensor]]:
    """The weight files of the mean of a run, by relative path."""
    out = ckavg.average(ckavg.open_run(root), ckavg.Mean(), out=root.parent / "mean").directory
    return {path.relative_to(out).as_posix(): load_file(path) for path in out.rglob("*.safetensors")}


@pytest.mark.parametrize(
    "part",
    [
        "value_head.safetensors",
        "2_Dense/model.safetensors",
        "reference/adapter_model.safetensors",
        "a/b/0/c/12/d/e/head.safetensors",
        "critic.safetensors",
    ],
)
def test_parts_beside_the_model_are_averaged_where_they_lie(tmp_path: Path, part: str) -> None:
    run = write_run(tmp_path / "run", part)
    found = mean_files(run)
    assert found.keys() == {MODEL, part}
    assert torch.equal(found[MODEL]["w"], torch.arange(6.0) + 20)
    assert torch.equal(found[part][f"of.{Path(part).stem}"], torch.arange(6.0) + 40)
    assert ckavg.verify_result(tmp_path / "mean", replay=True, sources=True).problems == ()


def test_sharded_parts_and_their_indexes(tmp_path: Path) -> None:
    for step in STEPS:
        here = write_checkpoint(
            tmp_path / f"run/checkpoint-{step}", weights(step) | {"v": torch.full((2,), float(step))}, shards=2
        )
        write_checkpoint(here / "head", weights(step, "h") | {"g": torch.full((3,), float(step))}, shards=2)
        put(here / "value_head.safetensors", weights(step))
    found = mean_files(tmp_path / "run")
    assert {name: set(tensors) for name, tensors in found.items()} == {
        f"{place}model-0000{number}-of-00002.safetensors": {tensor}
        for place, of_place in (("", "wv"), ("head/", "hg"))
        for number, tensor in enumerate(of_place, start=1)
    } | {"value_head.safetensors": {"w"}}
    for place in ("", "head/"):
        index = json.loads((tmp_path / f"mean/{place}model.safetensors.index.json").read_text())
        files = {name: file for file, tensors in found.items() if file.startswith(f"{place}model-") for name in tensors}
        assert index["weight_map"] == {name: Path(file).name for name, file in files.items()}
        assert index["metadata"]["total_size"] == sum(found[file][name].nbytes for name, file in files.items())
    assert ckavg.verify_result(tmp_path / "mean").problems == ()


LEFT_OUT = {
    "training_state/optimizer.safetensors": ("Training state", "training_state/"),
    "optimizer.safetensors": ("Training state", "optimizer.safetensors"),
    "master_weights.safetensors": ("Training state", "master_weights.safetensors"),
    "optim_states/model.safetensors": ("Training state", "optim_states/"),
    "scheduler-0.safetensors": ("Training state", "scheduler-0.safetensors"),
    "random_states_0.safetensors": ("Training state", "random_states_0.safetensors"),
    "rng/state.safetensors": ("Training state", "rng/"),
    "model_ema.safetensors": ("Averages", "model_ema.safetensors"),
    "swa_model.safetensors": ("Averages", "swa_model.safetensors"),
    "model_averaged.safetensors": ("Averages", "model_averaged.safetensors"),
    "shadow.safetensors": ("Averages", "shadow.safetensors"),
    "unet_ema/model.safetensors": ("Averages", "unet_ema/"),
    "ema/model.safetensors": ("Averages", "ema/"),
    "model_1.safetensors": ("Other weight files", "model_1.safetensors"),
    "model_1-00001-of-00002.safetensors": ("Other weight files", "model_1-00001-of-00002.safetensors"),
    "model.fp16.safetensors": ("Other weight files", "model.fp16.safetensors"),
    "model_bf16.safetensors": ("Other weight files", "model_bf16.safetensors"),
    "consolidated.safetensors": ("Other weight files", "consolidated.safetensors"),
    "consolidated.00.safetensors": ("Other weight files", "consolidated.00.safetensors"),
    "fp16/model.safetensors": ("Other weight files", "fp16/"),
    "onnx/model_quantized.safetensors": ("Other weight files", "onnx/"),
    "original/consolidated.safetensors": ("Other weight files", "original/"),
    "model-00001-of-00001.safetensors": ("Other weight files", "model-00001-of-00001.safetensors"),
    "adapter_model.safetensors": ("Other weight files", "adapter_model.safetensors"),
}


@pytest.mark.parametrize(("number", "file"), enumerate(LEFT_OUT))
def test_what_is_no_part_is_left_out_and_said(tmp_path: Path, number: int, file: str) -> None:
    (text, name), folder = LEFT_OUT[file], "transformer/" * (number % 2)
    for step in STEPS:
        put(tmp_path / f"run/checkpoint-{step}/{folder}{MODEL}", weights(step))
        put(tmp_path / f"run/checkpoint-{step}/{folder}{file}", weights(step**2, "x"))
    run = ckavg.open_run(tmp_path / "run")
    assert all(entry.shape == (6,) for entry in run.tensors.values())
    assert len(run.tensors) == 1
    assert any(each.startswith(text) and f"{folder}{name}" in each for each in run.warnings)
    assert mean_files(tmp_path / "run").keys() == {f"{folder}{MODEL}"}


def test_moments_are_training_state_under_any_name(tmp_path: Path) -> None:
    for step in STEPS:
        here = tmp_path / f"run/checkpoint-{step}"
        put(here / MODEL, weights(step))
        put(here / "adam.safetensors", {f"state.{place}.exp_avg": torch.ones(4) * step for place in range(3)})
        put(here / "aux/state.safetensors", {"0/momentum_buffer": torch.ones(4) * step})
    run = ckavg.open_run(tmp_path / "run")
    assert set(run.tensors) == {"w"}
    assert any("Training state" in each and "adam.safetensors, aux/state.safetensors" in each for each in run.warnings)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "non_lora_trainables.bin", "value_head.pt", "head/head.pt"])
def test_pickles_beside_are_named(tmp_path: Path, file: str) -> None:
    write_run(tmp_path / "run", main="adapter_model.safetensors")
    for step in STEPS:
        note(tmp_path / f"run/checkpoint-{step}/{file}", "a pickle")
        note(tmp_path / f"run/checkpoint-{step}/optimizer.pt", "a pickle that every trainer leaves")
    run = ckavg.open_run(tmp_path / "run")
    assert [each for each in run.warnings if "Pickles" in each] == [
        f"Pickles outside the model are neither averaged nor copied: {file}."
    ]
    assert not (ckavg.average(run, ckavg.Mean(), out=tmp_path / "mean").directory / file).exists()


def test_folders_that_a_pipeline_names_are_its_own(tmp_path: Path) -> None:
    for step in STEPS:
        here = tmp_path / f"run/checkpoint-{step}"
        put(here / "unet/diffusion_pytorch_model.safetensors", weights(step))
        put(here / "unet/diffusion_pytorch_model.fp16.safetensors", weights(step))
        put(here / "optimizer/model.safetensors", weights(step))
        note(here / "scheduler/scheduler_config.json", {"beta_end": 0.1})
        note(here / "model_index.json", {"unet": ["a", "b"], "scheduler": ["a", "b"], "optimizer": ["a", "b"]})
    run = ckavg.open_run(tmp_path / "run")
    assert set(run.tensors) == {"unet/w", "optimizer/w"}
    assert any("unet/diffusion_pytorch_model.fp16.safetensors" in each for each in run.warnings)
    assert "scheduler/scheduler_config.json" in ckavg.plan_average(run, ckavg.Mean()).side_files


@pytest.mark.parametrize("folder", ["0", "checkpoint-5", "runs", "linked"])
def test_a_folder_that_is_not_looked_into_is_named(tmp_path: Path, folder: str) -> None:
    write_run(tmp_path / "run", *([f"{folder}/{MODEL}"] if folder != "linked" else []))
    for step in STEPS if folder == "linked" else ():
        put(tmp_path / f"elsewhere/{step}/{MODEL}", weights(step))
        (tmp_path / f"run/checkpoint-{step}/linked").symlink_to(tmp_path / f"elsewhere/{step}")
    warnings = ckavg.open_run(tmp_path / "run").warnings
    assert any("Other weight files" in each and f"{folder}/" in each for each in warnings)


def test_a_part_that_not_all_have_is_left_out_and_said(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    put(tmp_path / "run/checkpoint-30/merged/model.safetensors", weights(1))
    run = ckavg.open_run(tmp_path / "run")
    assert set(run.tensors) == {"w"}
    assert any(
        each == "Not in every checkpoint, so neither averaged nor copied: merged/model.safetensors."
        for each in run.warnings
    )
    result = ckavg.average(run, ckavg.EMA(), out=tmp_path / "out")
    assert not (result.directory / "merged").exists()
    assert ckavg.verify_result(result.directory, replay=True, sources=True).problems == ()


def write_sharded(root: Path, *dropped: str, main: int = 2) -> Path:
    """Checkpoints of `main` shards and a part beside them; the last one has parts that the others lack."""
    for step in STEPS:
        tensors = weights(step) | {"v": torch.full((2,), float(step))}
        here = write_checkpoint(root / f"checkpoint-{step}", tensors, shards=main)
        put(here / "value_head.safetensors", weights(3 * step))
        put(here / "optimizer.safetensors", weights(step, "state"))
        put(here / "adam.safetensors", {"0.exp_avg": torch.ones(4) * step})
    for name in dropped:
        put(root / f"checkpoint-{STEPS[-1]}/{name}", weights(1, "x"))
    return root


@pytest.mark.parametrize("main", [1, 2])
@pytest.mark.parametrize(
    "dropped", [(), ("critic.safetensors",), ("merged/model.safetensors", "critic.safetensors"), ("a/b.safetensors",)]
)
def test_what_is_averaged_without_some_parts_is_verified_without_them(
    tmp_path: Path, main: int, dropped: tuple[str, ...]
) -> None:
    run = ckavg.open_run(write_sharded(tmp_path / "run", *dropped, main=main))
    assert set(run.tensors) == {"w", "v", "value_head.safetensors/w"}
    for scheme in (ckavg.EMA(), ckavg.PEMA(scope="tensor")):
        result = ckavg.average(run, scheme)
        verified = ckavg.verify_result(result.directory, replay=True, sources=True)
        assert (verified.problems, verified.elements) == ((), 14)
    put(tmp_path / "run/checkpoint-30/value_head.safetensors", weights(91))
    problems = ckavg.verify_result(result.directory, sources=True).problems
    assert len(problems) == 1
    assert problems[0].startswith("step 30: the weights in ")


def test_a_part_of_other_tensors_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "value_head.safetensors")
    put(tmp_path / "run/checkpoint-30/value_head.safetensors", weights(1, "other"))
    with pytest.raises(MismatchError, match=r"value_head\.safetensors/"):
        ckavg.open_run(tmp_path / "run")


def test_constant_parts_are_copied_and_do_not_count(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    for step in STEPS:
        put(tmp_path / f"run/checkpoint-{step}/normalizer.safetensors", {"mean": torch.tensor([0.1, -0.0, 1e-3])})
    run = ckavg.open_run(tmp_path / "run")
    result = ckavg.average(run, ckavg.PEMA(), out=tmp_path / "out", dtype="bfloat16")
    assert result.copied == ("normalizer.safetensors/mean",)
    assert result.parameters_counted == 6
    copied = (tmp_path / "out/normalizer.safetensors").read_bytes()
    assert copied[-12:] == (tmp_path / "run/checkpoint-10/normalizer.safetensors").read_bytes()[-12:]
    assert ckavg.verify_result(tmp_path / "out", replay=True, sources=True).problems == ()


def test_of_a_base_model_only_what_the_run_trains(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    base = tmp_path / "base"
    put(base / MODEL, weights(0))
    put(base / "onnx/model.safetensors", weights(0, "x"))
    assert set(ckavg.open_run(tmp_path / "run", init=base).tensors) == {"w"}


def test_training_state_alone_is_no_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / f"run/checkpoint-30/{MODEL}").rename(tmp_path / "run/checkpoint-30/optimizer.safetensors")
    with pytest.raises(MissingShardError, match=r"holds no weights of a model, only optimizer.safetensors"):
        ckavg.open_run(tmp_path / "run")


# --- tied weights ---


def tied(root: Path, holders: tuple[int, ...], *, ties: bool | None = True, equal: bool = True) -> Path:
    for step in STEPS:
        tensors = {
            "embed.weight": torch.randn(8, 4, generator=torch.Generator().manual_seed(step)),
            "norm": torch.ones(4) * step,
        }
        if step in holders:
            tensors["head.weight"] = tensors["embed.weight"].clone() if equal else torch.ones(8, 4)
        put(root / f"checkpoint-{step}/{MODEL}", tensors, {"format": "pt"})
        config = {"model_type": "llama"} | ({} if ties is None else {"text_config": {"tie_word_embeddings": ties}})
        note(root / f"checkpoint-{step}/config.json", config)
    return root


@pytest.mark.parametrize("holders", [(10,), (20,), (30,), (10, 30)])
@pytest.mark.parametrize("ties", [True, None])
def test_heads_that_some_store_are_tied(tmp_path: Path, holders: tuple[int, ...], ties: bool | None) -> None:
    run = ckavg.open_run(tied(tmp_path, holders, ties=ties))
    assert set(run.tensors) == {"embed.weight", "norm"}
    assert any(f"only at step {', '.join(map(str, holders))}, where" in each for each in run.warnings)


@pytest.mark.parametrize(("ties", "equal"), [(False, True), (True, False)])
def test_heads_that_are_not_the_embedding_are_refused(tmp_path: Path, ties: bool, equal: bool) -> None:
    with pytest.raises(MismatchError, match=r"head\.weight"):
        ckavg.open_run(tied(tmp_path, (30,), ties=ties, equal=equal))


def test_a_base_that_stores_a_head_or_does_not(tmp_path: Path) -> None:
    run, base = tied(tmp_path / "run", ()), tied(tmp_path / "base", STEPS) / "checkpoint-10"
    assert set(ckavg.open_run(run, init=base).tensors) == {"embed.weight", "norm"}
    run, base = tied(tmp_path / "run2", STEPS), tied(tmp_path / "base2", ()) / "checkpoint-10"
    assert set(ckavg.open_run(run, init=base).tensors) == {"embed.weight", "norm"}


# --- quantized weights without a word in the config ---

CODES: dict[str, dict[str, torch.dtype | None]] = {
    "int8 of bitsandbytes": {"q.weight": torch.int8, "q.SCB": None},
    "GPTQ": {"q.qweight": torch.int32, "q.qzeros": torch.int32, "q.scales": None},
    "inverse scales": {"q.weight": torch.int8, "q.weight_scale_inv": None},
    "packed": {"q.weight_packed": torch.int32, "q.weight_scale": None},
    "int8 and scale": {"q.weight": torch.int8, "q.scale": None},
    "HQQ": {"q.W_q": torch.uint8, "q.scale": None, "q.zero": None},
    "AQLM": {"q.codes": torch.int8, "q.codebooks": None, "q.scales": None},
    "QuIP#": {"q.Qidxs": torch.int64, "q.SU": None},
    "quanto": {"q.weight._data": torch.int8, "q.weight._scale": None},
    "torchao": {"q._weight_qdata": torch.int8, "q._weight_scale": None, "q._weight_zero_point": None},
    "zero points": {"q.weight": torch.uint8, "q.weight_zero_point": None},
    "absmax": {"q.weight": torch.uint8, "q.absmax": None},
    "VPTQ": {"q.indices": torch.int16, "q.centroids.weight": None, "q.weight_scale": None},
    "fp8 and scale": {"q.weight": torch.float8_e4m3fn, "q.weight_scale": None},
    "scaled fp8": {"q.weight": torch.float8_e4m3fn, "q.scale_weight": None},
    "EXL3": {"q.trellis": torch.int16, "q.suh": None, "q.svh": None},
    "SpQR": {"q.dense_weights": torch.int64, "q.row_offsets": torch.int32},
    "no modules": {"layer0_weight": torch.int8, "layer0_scale": None},
}


@pytest.mark.parametrize("case", CODES)
def test_codes_beside_scales_are_refused(tmp_path: Path, case: str) -> None:
    for step in STEPS:
        tensors = {
            name: torch.ones(4) * step if dtype is None else torch.ones(4, 4).to(dtype)
            for name, dtype in CODES[case].items()
        }
        put(tmp_path / f"step_{step}.safetensors", tensors | {"norm.weight": torch.ones(4)})
    with pytest.raises(UnsupportedFormatError, match=r"is quantized \(tensor .* codes\), and so are 2 more"):
        ckavg.open_run(tmp_path)


def inspected(root: Path) -> Inspection:
    return inspect_run(root, Selection())


def test_integers_that_are_no_codes(tmp_path: Path) -> None:
    for step in STEPS:
        put(
            tmp_path / f"step_{step}.safetensors",
            {
                "q.weight": torch.ones(4, 4),
                "q.weight_scale": torch.ones(4),
                "num_blocks": torch.tensor(4),
                "bn.num_batches_tracked": torch.tensor(step),
                "attn.logit_scale": torch.ones(4),
                "attn.relative_position_index": torch.arange(16),
                "attn.bias": torch.ones(4, 4, dtype=torch.uint8),
                "qat.scale": torch.ones(4),
                "qat.zero_point": torch.zeros(4, dtype=torch.int32),
                "qat.fake_quant_enabled": torch.ones(1, dtype=torch.uint8),
                "embeddings.position_ids": torch.arange(8)[None],
            },
        )
    assert inspected(tmp_path).problems == ()


def test_8_bit_floats_that_never_change_are_copied(tmp_path: Path) -> None:
    for step in STEPS:
        table = torch.ones(16).to(torch.float8_e5m2)
        put(tmp_path / f"step_{step}.safetensors", weights(step) | {"table": table})
    assert inspected(tmp_path).problems == ()
    put(tmp_path / "step_20.safetensors", weights(20) | {"table": torch.zeros(16).to(torch.float8_e5m2)})
    (problem,) = inspected(tmp_path).problems
    assert "'table' has dtype 'F8_E5M2', which cannot be averaged, and differs between step 20 and step 30" in str(
        problem
    )
