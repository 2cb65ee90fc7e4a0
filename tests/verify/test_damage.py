"""Whatever becomes of a result or of its sources is found, and named."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckavg
from ckavg.output.hashing import sha256
from tests.cli.runner import run_cli
from tests.runs import random_run, write_run

STEPS = (0, 10, 20, 30)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(3, 4, torch.bfloat16), STEPS, shards=(1, 2))


@pytest.fixture
def result(source: Path) -> Path:
    return ckavg.average(ckavg.open_run(source), ckavg.BEMA()).directory


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x55
    path.write_bytes(data)


def edit(result: Path, change: Callable[[Any], object]) -> None:
    record = json.loads((result / "ckavg.json").read_bytes())
    change(record)
    (result / "ckavg.json").write_text(json.dumps(record))


def problems(result: Path, **options: Any) -> tuple[str, ...]:
    return ckavg.verify_result(result, **options).problems


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


# --- files of the result ---


def test_a_changed_byte_anywhere_in_the_weights(result: Path) -> None:
    shard = result / "model-00001-of-00002.safetensors"
    sound, generator = shard.read_bytes(), random.Random(0)
    for _ in range(20):
        flip(shard, generator.randrange(data_start(shard), len(sound)))
        (told, *more) = problems(result)
        assert told.startswith("model-00001-of-00002.safetensors was changed: its SHA-256 is ")
        assert all("holds NaN or infinity" in each for each in more)
        shard.write_bytes(sound)
    assert problems(result) == ()


def test_a_changed_byte_in_a_header(result: Path) -> None:
    shard = result / "model-00002-of-00002.safetensors"
    flip(shard, 12)
    told = problems(result)
    assert told[0].startswith("model-00002-of-00002.safetensors was changed: ")
    assert told[1].startswith("the weights cannot be loaded: ")


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_file(result: Path, left: int) -> None:
    shard = result / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:left])
    told = problems(result, replay=True)
    assert told[0].startswith("model-00001-of-00002.safetensors was changed: ")
    assert told[1].startswith(f"the weights cannot be loaded: {shard} ")
    assert told[2:] == ("No element was computed again: the result cannot be read.",)


def test_two_files_that_changed_places(result: Path) -> None:
    one, two = (result / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    one.rename(result / "x")
    two.rename(one)
    (result / "x").rename(two)
    told = problems(result)
    assert [each.split(" ")[0] for each in told[:2]] == [one.name, two.name]
    assert "the index and its shards disagree" in told[2] or "disagree about" in told[2]


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "README.md"]
)
def test_a_missing_file(result: Path, name: str) -> None:
    (result / name).unlink()
    assert problems(result)[0] == f"{name} is not there."


def test_an_edited_config(result: Path) -> None:
    config = json.loads((result / "config.json").read_bytes())
    (result / "config.json").write_text(json.dumps(config | {"hidden_size": 3}))
    (told,) = problems(result)
    assert told.startswith("config.json was changed: ")
    (result / "config.json").write_text(json.dumps(config | {"text_config": {"dtype": "float16"}}))
    assert problems(result)[1] == "config.json states the dtype float16, but the weights are bfloat16."


def test_an_index_of_another_size(result: Path) -> None:
    path = result / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))
    assert problems(result)[1].startswith("model.safetensors.index.json states a total_size of ")


def test_an_edited_card_and_other_files_are_warnings(result: Path) -> None:
    (result / "README.md").write_text("my model")
    (result / "eval").mkdir()
    (result / "eval" / "scores.json").write_text("{}")
    (result / ".git").mkdir()
    (result / ".git" / "config").write_text("")
    verified = ckavg.verify_result(result)
    assert verified.problems == ()
    assert verified.warnings[0] == "Not in the record, and not checked: eval/scores.json."
    assert verified.warnings[1].startswith("README.md was changed: ")
    assert run_cli("verify", result).exit_code == 0


def test_weights_that_would_be_loaded_instead(result: Path) -> None:
    save_file({"w": torch.ones(3)}, result / "model.safetensors")
    told = problems(result)
    assert told[0].startswith("the weights that would be loaded are not those recorded: model")


def test_a_link_out_of_the_result(result: Path, tmp_path: Path) -> None:
    shutil.move(result / "config.json", tmp_path / "config.json")
    (result / "config.json").symlink_to(tmp_path / "config.json")
    assert problems(result) == ("config.json is a link that leads out of the result.",)


def test_a_pipe_in_the_place_of_a_file(result: Path) -> None:
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (result / name).unlink()
        os.mkfifo(result / name)
    assert {f"{name} is not a plain file." for name in ("config.json", "model-00001-of-00002.safetensors")} <= set(
        problems(result)
    )


def test_a_snapshot_that_leads_elsewhere(source: Path, tmp_path: Path) -> None:
    """What lies behind the link is not looked at, let alone listed."""
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA(), snapshot_every=20).directory
    shutil.move(result / "checkpoint-20", tmp_path / "away")
    (result / "checkpoint-20").symlink_to(tmp_path)
    verified = ckavg.verify_result(result)
    assert verified.problems == ("checkpoint-20 is a link that leads out of the result.",)
    assert verified.warnings == ()


def test_a_pipe_that_would_be_loaded(result: Path) -> None:
    os.mkfifo(result / "model.safetensors")
    assert problems(result) == ("the weights cannot be loaded: model.safetensors is not a plain file.",)


def test_nan_with_the_checksum_to_it(result: Path) -> None:
    path = result / "model-00001-of-00002.safetensors"
    weights = load_file(path)
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point() and tensor.numel() > 100)
    weights[name].view(-1)[7] = float("nan")
    save_file(weights, path, {"format": "pt"})

    def change(record: Any) -> None:
        record["outputs"][0]["sha256"][path.name] = sha256(path.read_bytes())

    edit(result, change)
    told = problems(result, replay=True, elements=1_000_000)
    assert told[0] == f"tensor {name!r} holds NaN or infinity: 1 of its elements."
    assert told[1].startswith("1 of 106,5") or "1 of " in told[1]
    edit(result, lambda record: record.update(allow_nonfinite=True))
    assert len(problems(result, replay=True, elements=1_000_000)) == 1  # the sources hold none


# --- numbers of the record ---


@pytest.mark.parametrize("name", ["betas", "alphas", "weights"])
@pytest.mark.parametrize("factor", [1.0001, -1.0, 1e3])
def test_a_changed_number(result: Path, name: str, factor: float) -> None:
    def change(record: Any) -> None:
        record[name][2] *= factor

    edit(result, change)
    told = problems(result)
    assert told[0].startswith(f"{name}: 1 of 4 do not follow from the steps, the path and the parameters; at step 20 ")
    assert len(told) == (2 if name == "weights" else 1)


def test_numbers_that_fit_each_other_but_not_the_weights(result: Path, source: Path, tmp_path: Path) -> None:
    """All of the record is that of another average, consistently: only the sources tell."""
    other = ckavg.average(ckavg.open_run(source), ckavg.BEMA(eta=0.21), out=tmp_path / "other").directory
    foreign = json.loads((other / "ckavg.json").read_bytes())

    def change(record: Any) -> None:
        record.update({name: foreign[name] for name in ("parameters", "betas", "alphas", "weights")})

    edit(result, change)
    assert problems(result, sources=True) == ()
    (told,) = problems(result, replay=True, seed=0)
    assert " are not what the sources give: '" in told
    assert ", expected " in told


def test_a_path_of_its_own_making(source: Path) -> None:
    result = ckavg.average(ckavg.open_run(source), ckavg.PEMA(scope="tensor")).directory
    edit(result, lambda record: record.update(path_length=[0.0, 1.0, 0.5, 2.0]))
    told = problems(result, replay=True, seed=0)
    assert told[0].startswith("betas: 3 of 4 do not follow")
    assert "path_length falls from one checkpoint to the next; a path only grows." in told
    assert any(each.startswith("path_length is 1.0 at step 10; the path of the sources is ") for each in told)


def test_anchor_and_span(result: Path) -> None:
    edit(result, lambda record: record.update(anchor_step=10, span=20))
    assert problems(result) == ("anchor_step and span are 10 and 20; by the steps they are 0 and 30.",)


def test_a_changed_checksum_of_a_file(result: Path) -> None:
    edit(result, lambda record: record["outputs"][0]["sha256"].update({"config.json": "0" * 64}))
    (told,) = problems(result)
    assert told.startswith("config.json was changed: ")


def test_a_snapshot_with_the_record_of_another(source: Path) -> None:
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA(), snapshot_every=10).directory
    one, two = (result / f"checkpoint-{step}" / "ckavg.json" for step in (10, 20))
    one.write_bytes(two.read_bytes())
    assert problems(result) == ("checkpoint-10/ckavg.json is not of the same average as that of the result.",)
    one.write_text("{}")
    (told,) = problems(result)
    assert told.startswith(f"checkpoint-10/ckavg.json: {one}: ")
    shutil.rmtree(one.parent)
    assert "checkpoint-10/config.json is not there." in problems(result)


def test_another_version(result: Path) -> None:
    edit(result, lambda record: record.update(ckavg_version="0.0.1"))
    verified = ckavg.verify_result(result)
    assert (verified.problems, verified.ckavg_version) == ((), "0.0.1")
    assert verified.warnings == (f"It was made with ckavg 0.0.1, and is checked with {ckavg.__version__}.",)
    edit(result, lambda record: record.pop("inputs"))
    done = run_cli("verify", result)
    assert done.exit_code == 1
    assert "inputs is not there." in done.stderr
    assert "It was made with ckavg 0.0.1; this is " in done.stderr


# --- the sources ---


def test_a_changed_byte_in_a_source(result: Path, source: Path) -> None:
    shard = source / "checkpoint-20" / "model.safetensors"
    sound, generator = shard.read_bytes(), random.Random(1)
    header = json.loads(sound[8 : data_start(shard)])
    start, stop = header["tiles"]["data_offsets"]
    for _ in range(10):
        flip(shard, data_start(shard) + generator.randrange(start, stop))
        assert problems(result) == ()
        (told,) = problems(result, sources=True)
        assert told.startswith(f"step 20: the weights in {shard.parent} are not those that were averaged: ")
        shard.write_bytes(sound)
    assert problems(result, sources=True, replay=True) == ()


def test_a_replaced_checkpoint(result: Path, source: Path) -> None:
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in _weights(source).items()}
    save_file(other, source / "checkpoint-20" / "model.safetensors", {"format": "pt"})
    assert problems(result) == ()
    checked = problems(result, replay=True, sources=True, seed=0)
    assert [each.split(":")[0] for each in checked[:1]] == ["step 20"]
    assert "are not what the sources give" in checked[1]
    other["odd"] = torch.zeros(3, 5, 8, dtype=torch.bfloat16)
    save_file(other, source / "checkpoint-20" / "model.safetensors", {"format": "pt"})
    (told, nothing) = problems(result, replay=True)
    assert "bytes long; it was" in told
    assert nothing.startswith("No element was computed again: some of the checkpoints cannot be read.")


def _weights(source: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(source / "checkpoint-20" / "model.safetensors")
    return weights


def test_other_tensors_in_files_of_the_same_size(result: Path, source: Path) -> None:
    shard = source / "checkpoint-20" / "model.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"odd"', b'"ode"'))
    told = problems(result, sources=True)
    assert told[0].startswith("step 20: ")
    assert "tensor 'odd' is missing, as the result would have it." in told[0]


def test_a_copied_integer(result: Path) -> None:
    (path,) = (each for each in result.glob("*.safetensors") if "position_ids" in load_file(each))
    weights = load_file(path)
    weights["position_ids"] += 1
    save_file(weights, path, {"format": "pt"})
    told = problems(result, replay=True, elements=1_000_000)
    assert "10 of " in told[1]
    assert "'position_ids'[0] is 4, expected 3" in told[1]


def test_a_run_that_was_moved(result: Path, source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(result, tmp_path / "copy")
    shutil.move(source, tmp_path / "moved")
    told = problems(copy, sources=True)
    assert [each.split(":")[0] for each in told] == [f"step {step}" for step in STEPS]
    assert problems(copy, sources=True, replay=True, source=tmp_path / "moved") == ()
    done = run_cli("verify", copy, "--replay")
    assert done.exit_code == 1
    assert "name their directory with --source." in done.stdout


def test_the_command_lists_every_problem(result: Path, source: Path) -> None:
    (result / "config.json").unlink()
    flip(result / "model-00001-of-00002.safetensors", data_start(result / "model-00001-of-00002.safetensors") + 3)
    flip(
        source / "checkpoint-20" / "model.safetensors", data_start(source / "checkpoint-20" / "model.safetensors") + 90
    )
    done = run_cli("verify", result, "--sources")
    assert done.exit_code == 1
    found = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert len(found) == 3
    assert "files    WRONG  see below" in done.stdout
    assert "3 problems: this result is not what its record says." in done.stdout
    quiet = run_cli("verify", result, "--sources", "-q")
    assert quiet.stdout.splitlines() == found
    told = json.loads(run_cli("verify", result, "--sources", "--json").stdout)
    assert [f"problem: {each}" for each in told["problems"]] == found
