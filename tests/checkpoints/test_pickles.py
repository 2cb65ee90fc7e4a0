"""Runs that `torch.save` wrote give the same bytes as the same runs saved as safetensors."""

from __future__ import annotations

import json
import shutil
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ckavg
from ckavg.checkpoints.pickles import read_pickle
from ckavg.errors import CorruptFileError, TruncatedShardError
from tests.cli.runner import run_cli, snapshot
from tests.runs import write_checkpoint, write_run

STEPS = (10, 20, 30)
Weights = dict[str, Tensor]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weights(step: int) -> Weights:
    """Tensors of all dtypes that are averaged, and others; their names are not in order."""
    walk, start = torch.Generator().manual_seed(step), torch.Generator().manual_seed(0)
    found = {
        f"{name}.of_{str(dtype)[6:]}": (
            torch.randn(shape, generator=start) + 0.01 * torch.randn(shape, generator=walk)
        ).to(dtype)
        for name, shape in {"z": (300, 70), "b": (1, 5, 1), "a": (33,), "s": ()}.items()
        for dtype in DTYPES
    }
    kept = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    found |= {f"kept.of_{str(dtype)[6:]}": torch.tensor([0, 1, step]).to(dtype) for dtype in kept}
    constant = {"complex": torch.ones(2, dtype=torch.complex64), "unsigned": torch.ones(2).to(torch.uint16)}
    return found | constant | {"empty": torch.empty(0, 4)}


class Colour(Enum):
    RED = 1


class Settings:
    def __init__(self) -> None:
        self.me = self
        self.dtype = torch.bfloat16


def with_much_beside(tensors: Weights, step: int) -> dict[str, Any]:
    """What trainers save beside a model, with classes that need not be installed to read it."""
    return {
        "config": Settings(),
        "model": tensors,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]},
        "global_step": step,
        "colour": Colour.RED,
        "path": Path("/a/b"),
        "counts": Counter("abba"),
        "lists": defaultdict(list, a=[1]),
        "sets": ({1, 2}, frozenset({3})),
        "partial": partial(int, base=2),
        "scalar": np.float32(1.5),
        "array": np.arange(3),
        "rng": (torch.get_rng_state(), np.random.default_rng(0).bit_generator.state),
        "torch": (torch.float32, torch.device("cpu"), torch.Size([1, 2])),
        "keys": {(1, 2): 3, Colour.RED: 4, None: 5, 1.5: 6, ((1,), (2,)): 7, 2**70: 8},
    }


def in_modules(tensors: Weights, step: int) -> nn.Module:
    """A module by itself, which is named by what it is in."""
    made = nn.Module()
    for name, tensor in tensors.items():
        place, _, last = name.rpartition(".")
        if place and place not in made._modules:
            made.add_module(place, nn.Module())
        made.get_submodule(place).register_buffer(last, tensor)
    made.register_buffer("left out", torch.ones(1), persistent=False)
    return made


SAVED: Mapping[str, Callable[[Weights, int], object]] = {
    "a state dict": lambda tensors, step: tensors,
    "in order": lambda tensors, step: OrderedDict(tensors),
    "parameters": lambda tensors, step: {
        name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()
    },
    "with much beside": with_much_beside,
    "nested": lambda tensors, step: {"state": {"model": tensors, "optimizers": {"m": torch.ones(1)}}, "step": step},
    "one storage": lambda tensors, step: {"model": in_one_storage(tensors)},
    "a module": in_modules,
    "a dict of its own": lambda tensors, step: {"model": Own(tensors), "version": 3},
}


class Own(OrderedDict[str, Tensor]):
    pass


def in_one_storage(tensors: Weights) -> Weights:
    """The tensors of each dtype as parts of one, as where parameters are flat."""
    flat = {dtype: torch.cat([each.flatten() for each in tensors.values() if each.dtype == dtype]) for dtype in
            {each.dtype for each in tensors.values()}}  # fmt: skip
    starts: dict[torch.dtype, int] = defaultdict(int)
    found = {}
    for name, tensor in tensors.items():
        start = starts[tensor.dtype]
        starts[tensor.dtype] += tensor.numel()
        found[name] = flat[tensor.dtype][start : starts[tensor.dtype]].view(tensor.shape)
    return found


def written(run: Path, out: Path, scheme: ckavg.Scheme | None = None) -> dict[str, bytes]:
    """The weights and indexes of an average, verified to be one of the run."""
    directory = ckavg.average(ckavg.open_run(run), scheme or ckavg.PEMA(), out=out).directory
    names = (name for name in directory.rglob("*") if name.suffix == ".safetensors" or "index" in name.name)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in names}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("case", SAVED)
def test_single_files(tmp_path: Path, case: str, protocol: int) -> None:
    for name in ("safetensors", "pickles"):
        (tmp_path / name).mkdir()
    for step in STEPS:
        save_file(weights(step), tmp_path / "safetensors" / f"step_{step}.safetensors", {"format": "pt"})
        torch.save(SAVED[case](weights(step), step), tmp_path / "pickles" / f"step_{step}.pt", pickle_protocol=protocol)
    expected = written(tmp_path / "safetensors", tmp_path / "expected")
    assert written(tmp_path / "pickles", tmp_path / "out") == expected
    last = weights(STEPS[-1])
    averaged = load_file(tmp_path / "out" / "model.safetensors")
    assert averaged.keys() == last.keys()
    assert not torch.equal(averaged["z.of_float32"], last["z.of_float32"])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["pytorch_model", "adapter_model", "diffusion_pytorch_model"])
def test_directories(tmp_path: Path, name: str, shards: int) -> None:
    as_saved = {"pytorch_model": "model"}.get(name, name)
    for step in STEPS:
        for kind, ending, stem in (("safetensors", "safetensors", as_saved), ("pickles", "bin", name)):
            write_shards(tmp_path / kind / f"checkpoint-{step}", weights(step), stem, ending, shards)
    expected = written(tmp_path / "safetensors", tmp_path / "expected")
    before = snapshot(tmp_path / "pickles")
    assert written(tmp_path / "pickles", tmp_path / "out") == expected
    assert len(expected) == (shards + 1 if shards > 1 else 1)
    after = snapshot(tmp_path / "pickles")
    assert {name: state for name, state in after.items() if not name.startswith("averaged")} == before


def write_shards(directory: Path, tensors: Weights, stem: str, ending: str, shards: int) -> None:
    directory.mkdir(parents=True)
    names = list(tensors)
    files = [f"{stem}-{place:05d}-of-{shards:05d}.{ending}" for place in range(1, shards + 1)]
    files = files if shards > 1 else [f"{stem}.{ending}"]
    for place, file in enumerate(files):
        held = {name: tensors[name] for name in names[place::shards]}
        if ending == "bin":
            torch.save(held, directory / file)
        else:
            save_file(held, directory / file, {"format": "pt"})
    if shards > 1:
        placed = {name: files[place % shards] for place, name in enumerate(names)}
        index = {"metadata": {"total_size": 1}, "weight_map": placed}
        (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))


# --- tied tensors ---


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GPT2", "T5", "Bert", "Llama"])
def test_tied_tensors_are_written_as_transformers_does(tmp_path: Path, kind: str) -> None:
    """Once, under the name that it keeps; twice where the config denies that they are tied."""
    import transformers

    sizes = {"vocab_size": 24, "hidden_size": 16, "n_embd": 16, "d_model": 16, "num_hidden_layers": 1, "n_layer": 1}
    sizes |= {"num_layers": 1, "num_attention_heads": 2, "n_head": 2, "num_heads": 2, "intermediate_size": 16}
    names = {"GPT2": "GPT2LMHeadModel", "T5": "T5ForConditionalGeneration", "Bert": "BertForMaskedLM"}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    for step in STEPS:
        torch.manual_seed(step)
        model = getattr(transformers, names.get(kind, "LlamaForCausalLM"))(config)
        model.save_pretrained(tmp_path / "safetensors" / f"checkpoint-{step}")
        here = tmp_path / "pickles" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "safetensors" / f"checkpoint-{step}", here)
        (here / "model.safetensors").unlink()
        torch.save(model.state_dict(), here / "pytorch_model.bin")
    expected = written(tmp_path / "safetensors", tmp_path / "expected")
    assert written(tmp_path / "pickles", tmp_path / "out") == expected
    for path in (tmp_path / "pickles").glob("*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    written(tmp_path / "pickles", tmp_path / "untied")
    assert load_file(tmp_path / "untied" / "model.safetensors").keys() == model.state_dict().keys()


def test_without_a_config_tied_tensors_are_written_twice(tmp_path: Path) -> None:
    for step in STEPS:
        tensor = torch.full((2, 2), float(step))
        torch.save({"a": tensor, "b": tensor, "c": tensor[1]}, tmp_path / f"step_{step}.pt")
    found = load_file(
        ckavg.average(ckavg.open_run(tmp_path), ckavg.Mean(), out=tmp_path / "out").directory / "model.safetensors"
    )
    assert {name: tensor.flatten()[0] for name, tensor in found.items()} == {"a": 20, "b": 20, "c": 20}


# --- runs ---


def test_the_step_is_what_the_pickle_says(tmp_path: Path) -> None:
    for place, step in enumerate(STEPS):
        torch.save({"model": {"w": torch.ones(2) * step}, "iter_num": step}, tmp_path / f"ckpt_{place}.pt")
    assert ckavg.open_run(tmp_path).steps == STEPS


def test_safetensors_beside_come_first(tmp_path: Path) -> None:
    write_run(tmp_path, [{"w": torch.ones(2) * step} for step in STEPS], STEPS)
    for step in STEPS:
        torch.save({"w": torch.zeros(2)}, tmp_path / f"checkpoint-{step}" / "pytorch_model.bin")
        torch.save({"w": torch.zeros(2)}, tmp_path / f"step_{step}.pt")
    run = ckavg.open_run(tmp_path)
    assert {shard.path.name for each in run.checkpoints for shard in each.shards} == {"model.safetensors"}
    assert "Pickles outside the model are neither averaged nor copied: pytorch_model.bin." in run.warnings


def test_what_torch_did_not_save_is_left_out_beside_a_model(tmp_path: Path) -> None:
    for step in STEPS:
        here = tmp_path / f"checkpoint-{step}"
        here.mkdir()
        torch.save({"w": torch.ones(2) * step}, here / "pytorch_model.bin")
        torch.save({"v": torch.ones(2) * step}, here / "value_head.bin")
        torch.save({"epoch": step}, here / "info.pt")
        (here / "spm.bin").write_bytes(b"words")
        (here / "data_state.pt").write_bytes(b"\x80\x04N.")
    run = ckavg.open_run(tmp_path)
    assert set(run.tensors) == {"w", "value_head.safetensors/v"}
    told = "Pickles outside the model are neither averaged nor copied: data_state.pt, info.pt, spm.bin."
    assert told in run.warnings


def test_averages_and_states_alone_are_no_model(tmp_path: Path) -> None:
    for step in STEPS:
        torch.save({"ema": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(2)}}, tmp_path / f"step_{step}.pt")
    told = run_cli("mean", tmp_path).stderr
    assert "step_10.pt holds no weights of a model, only ema (average), optimizer (training state)." in told


def test_one_that_is_still_written_is_left_out(tmp_path: Path) -> None:
    for step in STEPS:
        torch.save({"w": torch.ones(2) * step}, tmp_path / f"step_{step}.pt")
    last = tmp_path / "step_30.pt"
    last.write_bytes(last.read_bytes()[:-30])
    with pytest.raises(TruncatedShardError, match=r"step_30\.pt is cut off"):
        ckavg.open_run(tmp_path)
    assert ckavg.open_run(tmp_path, skip_incomplete=True).steps == (10, 20)


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    for step in STEPS:
        write_shards(tmp_path / f"checkpoint-{step}", weights(step), "pytorch_model", "bin", 3)
    (tmp_path / "checkpoint-30" / "pytorch_model-00002-of-00003.bin").unlink()
    told = run_cli("mean", tmp_path).stderr
    assert "checkpoint-30/pytorch_model-00002-of-00003.bin does not exist" in told
    index = tmp_path / "checkpoint-20" / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00001-of-00003.bin", "../pytorch_model.bin"))
    with pytest.raises(CorruptFileError, match="shards must be pickles beside their index"):
        ckavg.open_run(tmp_path, to_step=20)


def test_a_result_is_verified_against_pickles(tmp_path: Path) -> None:
    """By checksums of the sources and by computing it anew; a weight that changes is noticed, and so is a file."""
    run = tmp_path / "run"
    for step in STEPS:
        write_shards(run / f"checkpoint-{step}", weights(step), "pytorch_model", "bin", 2)
    ckavg.average(ckavg.open_run(run), ckavg.PEMA(), out=tmp_path / "out")
    for option in ("--sources", "--replay"):
        assert run_cli("verify", tmp_path / "out", option).exit_code == 0
    path = run / "checkpoint-20" / "pytorch_model-00001-of-00002.bin"
    entry = read_pickle(path).entries["z.of_float64"]
    data = bytearray(path.read_bytes())
    data[entry.offset + 6] ^= 1
    path.write_bytes(data)
    done = run_cli("verify", tmp_path / "out", "--sources")
    assert done.exit_code == 1
    assert "the weights in" in done.stdout + done.stderr
    path.write_bytes(b"MZ" + bytes(data[2:]))
    assert run_cli("verify", tmp_path / "out", "--sources").exit_code == 1


def test_other_verbs(tmp_path: Path) -> None:
    for step in STEPS:
        torch.save({"model": weights(step), "optimizer": {"m": torch.ones(2)}}, tmp_path / f"step_{step}.pt")
    for words in (("inspect",), ("path",), ("inspect", "--json")):
        assert run_cli(*words, tmp_path).exit_code == 0
    base = write_checkpoint(tmp_path / "base", weights(1))
    result = ckavg.average(ckavg.open_run(tmp_path, init=base / "model.safetensors"), ckavg.EMA(), out=tmp_path / "out")
    assert result.steps == (0, *STEPS)
    torch.save(weights(1), tmp_path / "base" / "base.pt")
    other = ckavg.average(ckavg.open_run(tmp_path, init=tmp_path / "base/base.pt"), ckavg.EMA(), out=tmp_path / "again")
    names = [each.directory / "model.safetensors" for each in (result, other)]
    assert names[0].read_bytes() == names[1].read_bytes()


# --- savers of trainers ---


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Path) -> None:
    """A Trainer of Lightning saves epochs; the average is that of what was in memory."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    states: list[Weights] = []

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
            self.save_hyperparameters({"lr": 0.1, "path": Path("/a")})

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            loss: Tensor = self.net(batch[0]).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.1)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            states.append({name: each.clone() for name, each in checkpoint["state_dict"].items()})

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(24, 4)), batch_size=8)
    saver = ModelCheckpoint(tmp_path / "run", every_n_epochs=1, save_top_k=-1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    lightning.Trainer(max_epochs=3, callbacks=[saver], default_root_dir=tmp_path, **quiet).fit(Module(), data)
    run = ckavg.open_run(tmp_path / "run")
    assert run.steps == (3, 6, 9)
    found = load_file(ckavg.average(run, ckavg.Mean(), out=tmp_path / "out").directory / "model.safetensors")
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        values = torch.stack([each[name].double() for each in states[:3]])
        expected = values.mean(0) if tensor.is_floating_point() else values[-1]
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_accelerate(tmp_path: Path) -> None:
    """`save_state` without safetensors: a model, a second one, and state of the training."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    for kind, is_safe in (("safetensors", True), ("pickles", False)):
        torch.manual_seed(0)
        plan = ProjectConfiguration(tmp_path / kind, automatic_checkpoint_naming=True)
        accelerator = Accelerator(cpu=True, project_config=plan)
        model, other = nn.Linear(3, 4), nn.Linear(2, 2)
        prepared = accelerator.prepare(model, other, torch.optim.Adam(model.parameters()))
        for _ in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            accelerator.save_state(safe_serialization=is_safe)
        assert prepared
    expected = written(tmp_path / "safetensors" / "checkpoints", tmp_path / "expected")
    assert written(tmp_path / "pickles" / "checkpoints", tmp_path / "out") == expected
    told = " ".join(ckavg.open_run(tmp_path / "pickles" / "checkpoints").warnings)
    assert "pytorch_model_1.bin" in told
