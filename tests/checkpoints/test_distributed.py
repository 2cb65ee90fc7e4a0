"""Checkpoints that torch.distributed.checkpoint saved, in every way it shards: the same bytes as of the same run in
safetensors. And `.metadata` that says anything else than what is there: one error, and nothing is executed.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckavg
from ckavg.checkpoints.checkpoint import read_checkpoint
from ckavg.checkpoints.model_names import choose_model
from ckavg.errors import CkavgError, MissingShardError, SettingError, TruncatedShardError, UnsupportedFormatError
from ckavg.output import weight_files
from tests.checkpoints.distributed_job import STEPS, weights
from tests.cli.runner import run_cli
from tests.exhaustive import all_but
from tests.ranks.launch import environment, torchrun

pytestmark = pytest.mark.filterwarnings("ignore")

JOB = Path(__file__).with_name("distributed_job.py")
FIRST = ("fsdp2", "tensor-parallel", "grid", "two-dimensional", "hf")
REST = ("replicated", "uneven", "last dimension", "whole", "hf, two files", "async", "a file each")
OF_TWO = ("grid", "two-dimensional")
CASES = [f"{world} of {kind}" for world in (1, 2, 4) for kind in FIRST + REST if world > 1 or kind not in OF_TWO]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run that a job saved, by the number of its processes and the kind: `2 of fsdp2`. A job saves several."""
    done: dict[tuple[str, bool], Path] = {}

    def run(case: str) -> Path:
        world, _, kind = case.partition(" of ")
        key = world, kind in FIRST
        if key not in done:
            done[key] = tmp_path_factory.mktemp(f"{world} processes")
            kinds = [each for each in (FIRST if key[1] else REST) if f"{world} of {each}" in CASES]
            there = environment() | {"PYTHONPATH": str(JOB.parents[2])}
            command = torchrun(int(world), JOB, done[key], *kinds)
            job = subprocess.run(command, capture_output=True, text=True, env=there, check=False)
            assert job.returncode == 0, job.stderr
        return done[key] / kind

    return run


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that comes of the same run as safetensors."""
    return averaged(write_safetensors(tmp_path_factory.mktemp("safetensors")))


def write_safetensors(run: Path, of: Callable[[int], dict[str, Tensor]] = weights) -> Path:
    for step in STEPS:
        (run / f"step-{step}").mkdir(parents=True)
        save_file(of(step), run / f"step-{step}/model.safetensors", {"format": "pt"})
    return run


def averaged(run: Path, **chosen: Any) -> bytes:
    result = ckavg.average(ckavg.open_run(run, **chosen), ckavg.PEMA(), force=True)
    return (result.directory / "model.safetensors").read_bytes()


def dcp_save(state: Mapping[str, Any], target: Path) -> None:
    save = importlib.import_module("torch.distributed.checkpoint.state_dict_saver").save
    with warnings.catch_warnings(action="ignore"):
        save(dict(state), checkpoint_id=target, no_dist=True)


@pytest.mark.parametrize("case", all_but(("2 of fsdp2", "2 of grid", "2 of hf", "2 of tensor-parallel"), CASES))
def test_what_torch_saves_gives_the_bytes_of_safetensors(
    jobs: Callable[[str], Path], expected: bytes, case: str
) -> None:
    assert averaged(jobs(case)) == expected


def test_every_verb_reads_such_a_run(jobs: Callable[[str], Path], expected: bytes, tmp_path: Path) -> None:
    run = Path(
        shutil.copytree(jobs("2 of two-dimensional"), tmp_path / "run", ignore=shutil.ignore_patterns("averaged"))
    )
    found = json.loads(run_cli("inspect", run, "--json", "--deep").stdout)
    assert [each["files"] for each in found["checkpoints"]] == [["__0_0.distcp", "__1_0.distcp"]] * 3
    assert found["problems"] == []
    of_sample = [
        run_cli("path", each, "--sample", "0.2", "--json") for each in (run, write_safetensors(tmp_path / "st"))
    ]
    sampled = [json.loads(each.stdout)["path_length"] for each in of_sample]
    assert sampled[0] == sampled[1]
    (run / "config.json").write_text('{"hidden_size": 8}')
    result = run / "averaged/pema-gamma0.15"
    told = run_cli("pema", run, "-q")
    assert told.exit_code == 0, told.stderr
    assert (result / "model.safetensors").read_bytes() == expected
    assert json.loads((result / "config.json").read_text()) == {"hidden_size": 8}
    verified = run_cli("verify", result, "--replay", "--sources")
    assert verified.exit_code == 0, verified.stdout + verified.stderr
    assert run_cli("pema", run, "-q").exit_code == 0, "it is known from before"
    base = tmp_path / "base.safetensors"
    save_file(weights(0), base)
    with_base = run_cli("bema", run, "--init", base, "-q", "--out", tmp_path / "out")
    assert with_base.exit_code == 0, with_base.stderr
    changed = run / "step-20/__1_0.distcp"
    changed.write_bytes(changed.read_bytes()[:-1])
    assert "step 20" in run_cli("verify", result, "--sources").stdout


# --- what is found in it ---

MODEL = {"layers.0.w": torch.ones(4, 3), "norm": torch.ones(3)}
EXTRA = {"state": {"w": {"exp_avg": torch.ones(3)}}}
SAVED: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Any]], str | None]] = {
    "a script": ("step-{}", lambda model: {"model": model, "optimizer": EXTRA, "epoch": 3}, None),
    "torchtitan": (
        "step-{}",
        lambda model: {
            **model,
            "optimizer": {"state.norm.exp_avg": torch.ones(3)},
            "train_state": {"step": torch.tensor(3)},
        },
        None,
    ),
    "a Stateful of an application": ("step_{}", lambda model: {"app": {"model": model, "optim": EXTRA}}, None),
    "Composer": ("ep0-ba{}", lambda model: {"state": {"model": model, "optimizers": EXTRA}}, None),
    "OLMo-core": ("step{}/model_and_optim", lambda model: {"model": model, "optim": EXTRA}, None),
    "accelerate": ("checkpoint-{}/pytorch_model_fsdp_0", lambda model: {"model": model}, None),
    "NeMo-RL": ("step_{}/policy/weights", lambda model: {"model": model}, None),
    "NeMo 2": (
        "llama--val_loss=0.5-step={}-consumed_samples=80.0/weights",
        lambda model: {**model, "optimizer.state.exp_avg.norm": torch.ones(3)},
        None,
    ),
    "Lightning": ("epoch=0-step={}.ckpt", lambda model: {"state_dict": model, "optimizer_0": EXTRA}, None),
    "an average beside it": ("step-{}", lambda model: {"model": model, "ema": model}, None),
    "a prefix": ("step-{}", lambda model: {f"_orig.{name}": each for name, each in model.items()}, "_orig"),
    "the average, by its prefix": ("step-{}", lambda model: {"model": {"x": torch.ones(2)}, "ema": model}, "ema."),
    "modules of one name": ("step-{}", lambda model: {f"model.{name}": each for name, each in model.items()}, "model."),
}


@pytest.mark.parametrize("case", SAVED)
def test_the_model_is_found_in_what_trainers_save(tmp_path: Path, case: str) -> None:
    directory, state, prefix = SAVED[case]
    run = tmp_path / "run"
    for step in STEPS:
        dcp_save(state({name: each * step for name, each in MODEL.items()}), run / directory.format(step))
    (run / directory.format(10) / "../optimizer_0").resolve().mkdir(exist_ok=True)
    result = ckavg.average(ckavg.open_run(run, prefix=prefix), ckavg.Mean())
    found = load_file(result.directory / "model.safetensors")
    assert found.keys() == MODEL.keys()
    assert all(torch.equal(found[name], each * 20) for name, each in MODEL.items())
    assert [each.step for each in result.inputs] == list(STEPS)


def test_a_wrapper_is_told_from_a_module_by_its_nesting() -> None:
    flat = {"model.embed": ("model.embed",), "model.norm": ("model.norm",)}
    assert choose_model(flat)[0] == {"model.embed": "model.embed", "model.norm": "model.norm"}
    nested = {"model.embed": ("model", "embed"), "x.w": ("x", "w"), "ema.w": ("ema", "w")}
    assert choose_model(nested) == ({"model.embed": "embed"}, [("average", "ema"), ("second model", "x")])
    parts = {"encoder.w": ("encoder", "w"), "decoder.w": ("decoder", "w")}
    assert choose_model(parts)[0] == {"encoder.w": "encoder.w", "decoder.w": "decoder.w"}
    counted = {"w": ("w",), "num_batches_tracked": ("num_batches_tracked",)}
    assert choose_model(counted, scalars=["num_batches_tracked"])[0].keys() == counted.keys()
    megatron = ("decoder.layers.mlp.linear_fc1.weight", "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight")
    assert list(choose_model({name: (name,) for name in megatron})[0]) == [megatron[0]]


def test_safetensors_beside_it_are_read_instead(tmp_path: Path) -> None:
    run = write_safetensors(tmp_path / "run")
    for step in STEPS:
        dcp_save({"model": weights(0)}, run / f"step-{step}/pytorch_model_fsdp_0")
    assert ckavg.open_run(run).last.names == ("model.safetensors",)


def test_a_prefix_that_is_not_there_is_told(tmp_path: Path) -> None:
    for step in STEPS:
        dcp_save({"model": MODEL}, tmp_path / f"run/step-{step}")
    with pytest.raises(SettingError, match=r"`prefix` app.: no tensor in .* begins so") as told:
        ckavg.open_run(tmp_path / "run", prefix="app.")
    assert "model.layers.0.w" in str(told.value.hint)
    with pytest.raises(SettingError, match="is not one"):
        ckavg.open_run(write_safetensors(tmp_path / "other"), prefix="model.")


def test_the_names_of_a_trainer_are_told(tmp_path: Path) -> None:
    for step in STEPS:
        dcp_save({"tok_embeddings.weight": torch.ones(3, 2) * step}, tmp_path / f"run/step-{step}")
    assert any("convert_to_hf.py" in each for each in ckavg.open_run(tmp_path / "run").warnings)


def test_a_large_result_is_in_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "LARGEST_SHARD", 100)
    for step in STEPS:
        state = {f"w{number}": torch.full((4, 4), float(step)) for number in range(3)}
        dcp_save({"model": state}, tmp_path / f"run/step-{step}")
    result = ckavg.average(ckavg.open_run(tmp_path / "run"), ckavg.Mean()).directory
    index = json.loads((result / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 3 * 64
    assert index["weight_map"] == {f"w{number}": f"model-0000{number + 1}-of-00003.safetensors" for number in range(3)}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(result / file)[name], torch.full((4, 4), 20.0))
    assert run_cli("verify", result, "--replay").exit_code == 0


# --- what is not what it says ---


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in STEPS:
        dcp_save({"model": MODEL, "lr": 0.1}, tmp_path / f"run/step-{step}")
    return tmp_path / "run"


class Payload:
    """Makes a file when a pickle with it is executed."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def changed(run: Path, change: Callable[[Any], object]) -> None:
    """Rewrite what `.metadata` of the second checkpoint says."""
    path = run / "step-20/.metadata"
    metadata = pickle.loads(path.read_bytes())
    found = change(metadata)
    path.write_bytes(pickle.dumps(metadata if found is None else found))


def info(metadata: Any, name: str = "model.norm") -> Any:
    return next(each for index, each in metadata.storage_data.items() if index.fqn == name)


def chunk(metadata: Any, name: str = "model.norm") -> Any:
    return metadata.state_dict_metadata[name].chunks[0]


def set_dtype(metadata: Any, dtype: torch.dtype) -> None:
    metadata.state_dict_metadata["model.norm"].properties.dtype = dtype


def second_chunk(metadata: Any, start: int, size: int) -> None:
    """Another piece, with the place of the first."""
    made = copy.copy(chunk(metadata))
    made.offsets, made.sizes = torch.Size([start]), torch.Size([size])
    metadata.state_dict_metadata["model.norm"].chunks.append(made)
    index = next(each for each in metadata.storage_data if each.fqn == "model.norm")
    metadata.storage_data[type(index)("model.norm", [start])] = info(metadata)


def share_chunks(metadata: Any, count: int) -> None:
    """One list of pieces for all tensors."""
    chunks = [chunk(metadata)] * count
    for each in metadata.state_dict_metadata.values():
        if hasattr(each, "chunks"):
            each.chunks = chunks


HOSTILE: dict[str, tuple[Callable[[Any], object], str]] = {
    "no metadata": (lambda metadata: {"a": 1}, "expected Metadata"),
    "no tensors": (lambda metadata: metadata.state_dict_metadata.clear(), "no tensors of a model"),
    "tensors that are none": (lambda metadata: setattr(metadata, "state_dict_metadata", [1]), "is not expected"),
    "a way out": (
        lambda metadata: setattr(info(metadata), "relative_path", "../step-10/__0_0.distcp"),
        "not a file beside",
    ),
    "an absolute path": (
        lambda metadata: setattr(info(metadata), "relative_path", "/etc/passwd"),
        "not a file beside it",
    ),
    "no name": (lambda metadata: setattr(info(metadata), "relative_path", "."), "not a file beside it"),
    "a zero byte": (lambda metadata: setattr(info(metadata), "relative_path", "a\0b"), "not a file beside it"),
    "bytes for a name": (lambda metadata: setattr(info(metadata), "relative_path", b"x"), "is not expected"),
    "a missing piece": (lambda metadata: metadata.state_dict_metadata["model.norm"].chunks.clear(), "no piece holds"),
    "no place": (lambda metadata: metadata.storage_data.clear(), "does not say where"),
    "an overlap": (lambda metadata: second_chunk(metadata, 1, 2), "two pieces hold"),
    "out of the tensor": (lambda metadata: second_chunk(metadata, 3, 2), "exceeds"),
    "a negative offset": (lambda metadata: setattr(info(metadata), "offset", -1), "no place in a file"),
    "an offset of another kind": (lambda metadata: setattr(info(metadata), "offset", 1.5), "no place in a file"),
    "a short piece": (lambda metadata: setattr(info(metadata), "length", 600), "is damaged"),
    "an empty piece": (lambda metadata: setattr(info(metadata), "length", 0), "is damaged"),
    "another piece": (lambda metadata: setattr(info(metadata), "offset", 7), "is damaged"),
    "another dtype": (lambda metadata: set_dtype(metadata, torch.int32), "it is F32"),
    "another shape": (lambda metadata: setattr(chunk(metadata), "sizes", torch.Size([2])), "no piece holds|it is F32"),
    "huge sizes": (
        lambda metadata: setattr(metadata.state_dict_metadata["model.norm"], "size", torch.Size([2**62, 2**62])),
        "too many elements",
    ),
    "huge counts": (
        lambda metadata: setattr(metadata.state_dict_metadata["model.norm"], "chunks", [chunk(metadata)] * 100_000),
        "",
    ),
    "huge counts, shared": (lambda metadata: share_chunks(metadata, 2_500_000), "more than 4,000,000 pieces"),
    "compressed": (lambda metadata: setattr(info(metadata), "transform_descriptors", ["zstd"]), "compressed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_metadata_that_is_wrong_is_one_error(run: Path, case: str) -> None:
    change, told = HOSTILE[case]
    changed(run, change)
    if not told:  # the same again and again: it is there once
        assert len(ckavg.open_run(run).checkpoints) == 3
        return
    with pytest.raises(CkavgError, match=told) as error:
        ckavg.open_run(run)
    assert "step-20" in str(error.value)
    assert "step-10" not in str(error.value).replace("../step-10", "")


@pytest.mark.parametrize("place", ["instead of it", "as a key", "as a state", "in a place that is not read"])
def test_nothing_in_metadata_is_executed(run: Path, tmp_path: Path, place: str) -> None:
    canary = tmp_path / "canary"

    def change(metadata: Any) -> object:
        if place == "instead of it":
            return Payload(canary)
        if place == "as a key":
            metadata.storage_data[Payload(canary)] = info(metadata)
        elif place == "as a state":
            metadata.state_dict_metadata["model.norm"].properties = Payload(canary)
        else:
            metadata.storage_meta = Payload(canary)
        return None

    changed(run, change)
    if place == "in a place that is not read":
        assert len(ckavg.open_run(run).checkpoints) == 3
    else:
        with pytest.raises(CkavgError, match="step-20"):
            ckavg.open_run(run)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda canary: torch.ones(3, dtype=torch.float64), "it is F64"),
        (lambda canary: torch.ones(4), r"\(4,\), not F32 \(3,\)"),
        (lambda canary: [torch.ones(3)], "not a plain tensor"),
        (lambda canary: torch.ones(6)[::2], "transposed"),
        (lambda canary: Payload(canary), "not a plain tensor"),
        (lambda canary: torch.ones(3).to_sparse(), "not a plain tensor"),
        (lambda canary: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), "not a plain tensor"),
    ],
)
def test_pieces_that_hold_something_else_are_refused(
    run: Path, tmp_path: Path, write: Callable[[Path], object], told: str
) -> None:
    path, canary = run / "step-20/__0_0.distcp", tmp_path / "canary"
    start = path.stat().st_size
    with path.open("ab") as file:
        torch.save(write(canary), file)

    def change(metadata: Any) -> None:
        info(metadata).offset, info(metadata).length = start, path.stat().st_size - start

    changed(run, change)
    with pytest.raises(CkavgError, match=told):
        ckavg.open_run(run)
    assert not canary.exists()


@pytest.mark.exhaustive
def test_transposed_tensors_come_with_the_command_that_orders_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in STEPS[:2]:
        dcp_save({"model": {"w": torch.arange(6.0).reshape(2, 3).t() + step}}, run / f"step-{step}")
        with pytest.raises(UnsupportedFormatError, match="stored transposed") as told:
            read_checkpoint(run / f"step-{step}", step)
        subprocess.run(["sh", "-c", told.value.command], check=True, capture_output=True)
    result = ckavg.average(ckavg.open_run(run), ckavg.Mean()).directory
    assert torch.equal(load_file(result / "model.safetensors")["w"], torch.arange(6.0).reshape(2, 3).t() + 15)


def test_what_is_not_written_in_full_can_be_left_out(run: Path) -> None:
    (run / "step-20/.metadata").unlink()
    with pytest.raises(MissingShardError, match="torch writes it last"):
        ckavg.open_run(run)
    assert ckavg.open_run(run, skip_incomplete=True).steps == (10, 30)
    file = run / "step-30/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(TruncatedShardError, match="900 bytes long"):
        ckavg.open_run(run, steps=[10, 30])
    file.unlink()
    with pytest.raises(MissingShardError, match=r"__0_0.distcp does not exist"):
        ckavg.open_run(run, steps=[10, 30])


def test_links_do_not_lead_out_of_the_run(run: Path, tmp_path: Path) -> None:
    outside = (run / "step-20/__0_0.distcp").rename(tmp_path / "outside")
    (run / "step-20/__0_0.distcp").symlink_to(outside)
    with pytest.raises(CkavgError, match=r"step-20/__0_0.distcp is a link"):
        ckavg.open_run(run)


def mutations(data: bytes) -> Iterator[bytes]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        place, byte = (int(torch.randint(0, most, (1,), generator=generator)) for most in (len(data), 256))
        yield data[:place] + bytes([byte]) + data[place + 1 :]
        yield data[:place]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_any_damage_is_an_error_or_changes_no_weight(run: Path, name: str) -> None:
    path = run / "step-20" / name
    sound = path.read_bytes()
    shapes = {name: each.shape for name, each in ckavg.open_run(run).tensors.items()}
    refused = 0
    for data in mutations(sound):
        path.write_bytes(data)
        try:
            opened = ckavg.open_run(run)
            assert {name: each.shape for name, each in opened.tensors.items()} == shapes
        except CkavgError:
            refused += 1
    assert refused > 300
