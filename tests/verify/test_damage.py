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
from ckavg.output.output_path import LOCAL
from ckavg.output.weight_files import sha256
from tests.cli.runner import run_cli
from tests.runs import random_run, write_run

STEPS = (0, 10, 20, 30)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Change = Callable[[Path], object]
RESULTS = {"bema": ckavg.BEMA(), "pema": ckavg.PEMA(scope="tensor"), "ema": ckavg.EMA()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and three averages of it, one of them with snapshots."""
    root = tmp_path_factory.mktemp("made") / "run"
    run = ckavg.open_run(write_run(root, random_run(3, 4, torch.bfloat16), STEPS, shards=(1, 2)))
    for name, scheme in RESULTS.items():
        ckavg.average(run, scheme, out=root / "averaged" / name, snapshot_every=10 if name == "ema" else None)
        (root / "averaged" / name / LOCAL).unlink()  # which names this very place
    return root


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def result(source: Path) -> Path:
    return source / "averaged" / "bema"


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x55
    path.write_bytes(data)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def replace(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def edited(name: str, **values: Any) -> Change:
    return lambda result: edit(result / name, lambda value: value.update(values))


def removed(name: str) -> Change:
    return lambda result: (result / name).unlink()


def truncated(left: int) -> Change:
    return lambda result: (result / FIRST).write_bytes((result / FIRST).read_bytes()[:left])


def piped(name: str) -> Change:
    def change(result: Path) -> None:
        (result / name).unlink(missing_ok=True)
        os.mkfifo(result / name)

    return change


def swapped(result: Path) -> None:
    for old, new in ((FIRST, "x"), (SECOND, FIRST), ("x", SECOND)):
        (result / old).rename(result / new)


def linked_out(result: Path) -> None:
    shutil.move(result / "config.json", result.parent / "config.json")
    (result / "config.json").symlink_to(result.parent / "config.json")


def rehashed(tensor: str, change: Callable[[torch.Tensor], torch.Tensor], **values: Any) -> Change:
    """Another tensor, of which the record has the SHA-256, and further values."""

    def changed(result: Path) -> None:
        name = next(name for name in (FIRST, SECOND) if tensor in load_file(result / name))
        replace(result / name, lambda weights: weights.update({tensor: change(weights[tensor])}))
        digest = sha256((result / name).read_bytes())
        edit(
            result / "ckavg.json",
            lambda record: record["outputs"][-1]["sha256"].update({name: digest}) or record.update(values),
        )

    return changed


def one_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[7] = torch.nan
    return tensor


LOADED, CHANGED, GONE = "the weights cannot be loaded: ", " was changed: its SHA-256 is ", " is missing."
NOTHING = "No element was computed again: the result cannot be read."
CASES: dict[str, tuple[Any, ...]] = {
    "header": (lambda result: flip(result / SECOND, 12), SECOND + CHANGED, LOADED, NOTHING),
    "no bytes": (truncated(0), FIRST + CHANGED, LOADED, NOTHING),
    "in the length": (truncated(5), FIRST + CHANGED, LOADED, NOTHING),
    "in the header": (truncated(100), FIRST + CHANGED, LOADED, NOTHING),
    "one byte less": (truncated(-1), FIRST + CHANGED, LOADED, NOTHING),
    "swapped": (swapped, FIRST + CHANGED, SECOND + CHANGED, LOADED, NOTHING),
    "no shard": (removed(FIRST), FIRST + GONE, NOTHING),
    "no card": (removed("README.md"), "README.md" + GONE),
    "no index": (removed(INDEX), INDEX + GONE),
    "config": (edited("config.json", hidden_size=3), "config.json" + CHANGED),
    "dtype": (
        edited("config.json", text_config={"dtype": "float16"}),
        "config.json" + CHANGED,
        "config.json states the dtype float16, but the weights are bfloat16.",
    ),
    "size": (
        edited(INDEX, metadata={"total_size": 7}),
        INDEX + CHANGED,
        f"{INDEX} states a total_size of 7; the tensors take ",
    ),
    "link out": (linked_out, "config.json is a link that leaves the result."),
    "pipe": (piped("config.json"), "config.json is not a plain file."),
    "pipe for weights": (piped(FIRST), f"{FIRST} is not a plain file.", NOTHING),
    "pipe beside": (piped("model.safetensors"), f"{LOADED}model.safetensors is not a plain file.", NOTHING),
    "NaN": (rehashed("tiles", one_nan), "tensor 'tiles' holds NaN or infinity: 1 of its elements.", "1 of 106,"),
    "NaN that may be": (rehashed("tiles", one_nan, allow_nonfinite=True), "1 of 106,"),  # the sources hold none
    "copied": (rehashed("position_ids", lambda each: each + 1), "10 of 106,"),
    "anchor": (
        edited("ckavg.json", anchor_step=10, span=20),
        "anchor_step and span are 10 and 20; by the steps they are 0 and 30.",
    ),
}
"""What is done to a result, and how each of its problems begins."""


def assert_told(problems: tuple[str, ...], expected: list[str]) -> None:
    assert len(problems) == len(expected), problems
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start), problem


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_result(result: Path, name: str) -> None:
    change, *expected = CASES[name]
    change(result)
    assert_told(ckavg.verify_result(result, replay=True, elements=1_000_000).problems, expected)


def test_weights_that_would_be_loaded_instead(result: Path) -> None:
    save_file({"w": torch.ones(3)}, result / "model.safetensors")
    problem = ckavg.verify_result(result).problems[0]
    assert problem.startswith("a loader would take other weights than those recorded: model")


def test_a_changed_byte_anywhere_in_the_weights(result: Path) -> None:
    shard = result / FIRST
    sound, generator = shard.read_bytes(), random.Random(0)
    for _ in range(20):
        flip(shard, generator.randrange(data_start(shard), len(sound)))
        first, *more = ckavg.verify_result(result).problems
        assert first.startswith(FIRST + CHANGED)
        assert all("holds NaN or infinity" in each for each in more)
        shard.write_bytes(sound)
    assert ckavg.verify_result(result).problems == ()


def test_an_edited_card_and_other_files_are_warnings(result: Path) -> None:
    (result / "README.md").write_text("my model")
    for name in ("eval/scores.json", ".git/config"):
        (result / name).parent.mkdir()
        (result / name).write_text("{}")
    verified = ckavg.verify_result(result)
    assert verified.problems == ()
    assert verified.warnings[0] == "Not in the record, and not checked: eval/scores.json."
    assert verified.warnings[1].startswith("README.md was changed: ")
    assert run_cli("verify", result).exit_code == 0


@pytest.mark.parametrize("name", ["betas", "alphas", "weights"])
@pytest.mark.parametrize("factor", [1.0001, -1.0, 1e3])
def test_a_changed_number(result: Path, name: str, factor: float) -> None:
    values = json.loads((result / "ckavg.json").read_bytes())[name]
    values[2] *= factor
    edited("ckavg.json", **{name: values})(result)
    first, *more = ckavg.verify_result(result).problems
    assert first.startswith(f"{name}: 1 of 4 do not follow from the steps, the path and the parameters; at step 20 ")
    assert len(more) == (name == "weights")


def test_numbers_that_fit_each_other_but_not_the_weights(result: Path, source: Path) -> None:
    """All of the record is that of another average, consistently: only the sources tell."""
    other = ckavg.average(ckavg.open_run(source), ckavg.BEMA(eta=0.21), out=source / "other").directory
    record = json.loads((other / "ckavg.json").read_bytes())
    numbers = ("parameters", "betas", "alphas", "weights", "effective_count", "mean_age", "anchor_weight")
    edited("ckavg.json", **{name: record[name] for name in numbers})(result)
    assert ckavg.verify_result(result, sources=True).problems == ()
    (problem,) = ckavg.verify_result(result, replay=True, seed=0).problems
    assert " differ from what the sources give: '" in problem
    assert ", expected " in problem


def test_a_path_of_its_own_making(source: Path) -> None:
    result = source / "averaged" / "pema"
    edited("ckavg.json", path_length=[0.0, 1.0, 0.5, 2.0])(result)
    problems = ckavg.verify_result(result, replay=True, seed=0).problems
    assert problems[0].startswith("betas: 3 of 4 do not follow")
    assert "path_length decreases from one checkpoint to the next; a path length only grows." in problems
    assert any(each.startswith("path_length is 1.0 at step 10; the path of the sources is ") for each in problems)


def test_snapshots(source: Path, tmp_path: Path) -> None:
    result = source / "averaged" / "ema"
    one, two = (result / f"checkpoint-{step}" / "ckavg.json" for step in (10, 20))
    one.write_bytes(two.read_bytes())
    other = "checkpoint-10/ckavg.json is of another average than the result."
    assert ckavg.verify_result(result).problems == (other,)
    one.write_text("{}")
    assert_told(ckavg.verify_result(result).problems, [f"checkpoint-10/ckavg.json: {one}: "])
    shutil.rmtree(one.parent)
    assert "checkpoint-10/config.json is missing." in ckavg.verify_result(result).problems
    one.parent.symlink_to(tmp_path)  # what lies behind the link is not looked at, let alone listed
    verified = ckavg.verify_result(result)
    assert (verified.problems, verified.warnings) == (("checkpoint-10 is a link that leaves the result.",), ())


def test_another_version(result: Path) -> None:
    edited("ckavg.json", ckavg_version="0.0.1")(result)
    verified = ckavg.verify_result(result)
    assert (verified.problems, verified.ckavg_version) == ((), "0.0.1")
    assert verified.warnings == (f"It was made by ckavg 0.0.1, and is checked by {ckavg.__version__}.",)
    edit(result / "ckavg.json", lambda record: record.pop("inputs"))
    done = run_cli("verify", result)
    assert done.exit_code == 1
    assert "inputs is missing." in done.stderr
    assert "It was made by ckavg 0.0.1; this is " in done.stderr


# --- the sources ---


def test_a_changed_byte_in_a_source(result: Path, source: Path) -> None:
    shard = source / "checkpoint-20" / "model.safetensors"
    sound, generator = shard.read_bytes(), random.Random(1)
    start, stop = json.loads(sound[8 : data_start(shard)])["tiles"]["data_offsets"]
    for _ in range(10):
        flip(shard, data_start(shard) + generator.randrange(start, stop))
        assert ckavg.verify_result(result).problems == ()
        assert_told(ckavg.verify_result(result, sources=True).problems, ["step 20: the weights in "])
        shard.write_bytes(sound)
    assert ckavg.verify_result(result, sources=True, replay=True).problems == ()


def test_a_replaced_checkpoint(result: Path, source: Path) -> None:
    shard = source / "checkpoint-20" / "model.safetensors"
    replace(shard, lambda weights: weights.update(tiles=weights["tiles"] + 1))
    one, two = ckavg.verify_result(result, replay=True, sources=True, seed=0).problems
    assert one.startswith("step 20: ")
    assert "differ from what the sources give" in two
    shard.write_bytes(shard.read_bytes().replace(b'"odd"', b'"ode"'))
    problem = ckavg.verify_result(result, sources=True).problems[0]
    assert problem.startswith("step 20: ")
    assert "tensor 'odd' is missing, as the result would have it." in problem
    replace(shard, lambda weights: weights.update(odd=torch.zeros(3, 5, 8, dtype=torch.bfloat16)))
    one, two = ckavg.verify_result(result, replay=True).problems
    assert "bytes long; it was" in one
    assert two.startswith("No element was computed again: some of the checkpoints cannot be read.")


def test_a_run_that_was_moved(result: Path, source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(result, tmp_path / "copy")
    shutil.move(source, tmp_path / "moved")
    problems = ckavg.verify_result(copy, sources=True).problems
    assert [each.split(":")[0] for each in problems] == [f"step {step}" for step in STEPS]
    assert ckavg.verify_result(copy, sources=True, replay=True, source=tmp_path / "moved").problems == ()
    done = run_cli("verify", copy, "--replay")
    assert done.exit_code == 1
    assert "name their directory with --source." in " ".join(done.stdout.split())


def test_the_command_lists_every_problem(result: Path, source: Path) -> None:
    (result / "config.json").unlink()
    for shard in (result / FIRST, source / "checkpoint-20" / "model.safetensors"):
        flip(shard, data_start(shard) + 90)
    done = run_cli("verify", result, "--sources")
    assert done.exit_code == 1
    assert "files    WRONG  see below" in done.stdout
    assert "3 problems: this result is not what its record says." in done.stdout
    problems = json.loads(run_cli("verify", result, "--sources", "--json").stdout)["problems"]
    assert len(problems) == 3
    quiet = " ".join(run_cli("verify", result, "--sources", "-q").stdout.split())
    assert quiet == " ".join(f"problem: {each}" for each in problems)
    assert all(each in " ".join(done.stdout.split()) for each in problems)
