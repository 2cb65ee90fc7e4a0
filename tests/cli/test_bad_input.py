"""What cannot be averaged is refused: one message, status 1, nothing written, nothing touched."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.cli.runner import run_cli, snapshot
from tests.runs import write_checkpoint, write_run

Damage = Callable[[Path], None]
STEPS = (0, 10, 20)
MODEL = "model.safetensors"


def weights(shift: float = 0.0) -> dict[str, Tensor]:
    return {"w": torch.arange(12.0).view(3, 4) + shift, "b": torch.tensor([0.5, shift])}


def _empty(run: Path) -> None:
    for path in list(run.iterdir()):
        path.rename(path.parent.parent / f"away-{path.name}")


def _only_one(run: Path) -> None:
    for step in STEPS[1:]:
        (run / f"checkpoint-{step}").rename(run.parent / f"away-{step}")


def _missing_shard(run: Path) -> None:
    write_checkpoint(run / "checkpoint-30", weights(3), step=30, shards=2)
    (run / "checkpoint-30" / "model-00002-of-00002.safetensors").unlink()


def _missing_unindexed_shard(run: Path) -> None:
    _missing_shard(run)
    (run / "checkpoint-30" / "model.safetensors.index.json").unlink()


def _truncated(run: Path) -> None:
    path = run / "checkpoint-20" / MODEL
    path.write_bytes(path.read_bytes()[:-3])


def _cut_in_header(run: Path) -> None:
    path = run / "checkpoint-20" / MODEL
    path.write_bytes(path.read_bytes()[:30])


def _zero_bytes(run: Path) -> None:
    (run / "checkpoint-20" / MODEL).write_bytes(b"")


def _overwrite_header(run: Path, header: object) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (run / "checkpoint-20" / MODEL).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 56)


def _corrupt_json(run: Path) -> None:
    _overwrite_header(run, b'{"w": {"dtype": "F32", "shape": [')


def _header_is_a_list(run: Path) -> None:
    _overwrite_header(run, ["w"])


def _huge_header(run: Path) -> None:
    (run / "checkpoint-20" / MODEL).write_bytes(struct.pack("<Q", 2**62) + b"x" * 100)


def _overlap(run: Path) -> None:
    entry = {"dtype": "F32", "shape": [7], "data_offsets": [0, 28]}
    _overwrite_header(run, {"b": entry, "w": entry})


def _negative_shape(run: Path) -> None:
    _overwrite_header(run, {"w": {"dtype": "F32", "shape": [-1, -14], "data_offsets": [0, 56]}})


def _wrong_size(run: Path) -> None:
    _overwrite_header(run, {"w": {"dtype": "F32", "shape": [15], "data_offsets": [0, 56]}})


def _float8(run: Path) -> None:
    _overwrite_header(run, {"w": {"dtype": "F8_E4M3", "shape": [56], "data_offsets": [0, 56]}})
    for other in run.glob(f"*/{MODEL}"):
        other.write_bytes((run / "checkpoint-20" / MODEL).read_bytes())


def _trailing_bytes(run: Path) -> None:
    path = run / "checkpoint-20" / MODEL
    path.write_bytes(path.read_bytes() + b"more")


def _names(run: Path) -> None:
    save_file({"w": weights()["w"], "other": weights()["b"]}, run / "checkpoint-20" / MODEL)


def _shapes(run: Path) -> None:
    save_file({"w": torch.zeros(4, 3), "b": weights()["b"]}, run / "checkpoint-20" / MODEL)


def _dtypes(run: Path) -> None:
    save_file({name: tensor.half() for name, tensor in weights().items()}, run / "checkpoint-20" / MODEL)


def _nan(run: Path) -> None:
    spoilt = weights(2)
    spoilt["w"][1, 2] = float("nan")
    save_file(spoilt, run / "checkpoint-20" / MODEL)


def _infinity_in_the_middle(run: Path) -> None:
    spoilt = weights(1)
    spoilt["b"][0] = float("-inf")
    save_file(spoilt, run / "checkpoint-10" / MODEL)


def _same_step(run: Path) -> None:
    write_checkpoint(run / "checkpoint-20-copy", weights(), step=20)
    (run / "checkpoint-20-copy").rename(run / "step_20")


def _pickles(run: Path) -> None:
    for step in STEPS:
        (run / f"checkpoint-{step}" / MODEL).rename(run / f"checkpoint-{step}" / "pytorch_model.bin")


def _no_weights(run: Path) -> None:
    (run / "checkpoint-20" / MODEL).unlink()


def _bad_index(run: Path) -> None:
    (run / "checkpoint-20" / MODEL).unlink()
    (run / "checkpoint-20" / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def _escaping_index(run: Path) -> None:
    (run / "checkpoint-20" / MODEL).unlink()
    index = {"weight_map": {"w": "../checkpoint-10/model.safetensors"}}
    (run / "checkpoint-20" / "model.safetensors.index.json").write_text(json.dumps(index))


def _mixed_clocks(run: Path) -> None:
    write_checkpoint(run / "epoch_3", weights())


def _mixed_stages(run: Path) -> None:
    write_checkpoint(run / "stage1-step30", weights())


CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no checkpoints": (_empty, ("holds no checkpoints", "checkpoint-500/")),
    "one checkpoint": (_only_one, ("holds one checkpoint (step 0)", "--init")),
    "missing shard": (_missing_shard, ("model-00002-of-00002.safetensors does not exist", "still being written")),
    "missing shard without index": (_missing_unindexed_shard, ("model-00002-of-00002.safetensors does not exist",)),
    "truncated shard": (_truncated, ("checkpoint-20/model.safetensors is", "but its header says")),
    "cut in the header": (_cut_in_header, ("checkpoint-20/model.safetensors is 30 bytes long",)),
    "zero bytes": (_zero_bytes, ("checkpoint-20/model.safetensors is 0 bytes long",)),
    "corrupt JSON": (_corrupt_json, ("checkpoint-20/model.safetensors has a corrupt header",)),
    "header is a list": (_header_is_a_list, ("checkpoint-20/model.safetensors has a corrupt header",)),
    "huge header": (_huge_header, ("checkpoint-20/model.safetensors is not safetensors",)),
    "overlapping tensors": (_overlap, ("tensor 'w' begins at byte 0, expected 28",)),
    "negative shape": (_negative_shape, ("must be whole numbers",)),
    "wrong size": (_wrong_size, ("tensor 'w' (F32, (15,)) needs 60 bytes, but has 56",)),
    "8-bit floats": (_float8, ("dtype 'F8_E4M3', which cannot be averaged", "before quantizing")),
    "trailing bytes": (_trailing_bytes, ("but its header accounts for",)),
    "names": (_names, ("step 20: tensor 'b' is missing", "tensor 'other' is new", "--to-step 10")),
    "shapes": (_shapes, ("step 20: tensor 'w' is (4, 3), but (3, 4) at step 10", "--to-step 10")),
    "dtypes": (_dtypes, ("step 20: tensor 'w' is F16, but F32 at step 10", "'b' is F16")),
    "NaN": (_nan, ("step 20: tensor 'w' holds NaN or infinity", "--to-step 19")),
    "infinity": (_infinity_in_the_middle, ("step 10: tensor 'b' holds NaN or infinity",)),
    "same step twice": (_same_step, ("step 20 is there 2 times: checkpoint-20, step_20",)),
    "pickles": (_pickles, ("pytorch_model.bin, not safetensors", "never unpickles", "weights_only=True")),
    "no weights": (_no_weights, ("checkpoint-20 holds no weights",)),
    "bad index": (_bad_index, ("is not a shard index",)),
    "escaping index": (_escaping_index, ("shards must be safetensors files beside their index",)),
    "mixed clocks": (_mixed_clocks, ("count different things", "epoch_3")),
    "mixed stages": (_mixed_stages, ("of 2 runs, stages or experiments", "; stage1-step30.", "--match")),
}


@pytest.mark.parametrize("verb", ["pema", "bema"])
@pytest.mark.parametrize("case", CASES)
def test_refused_with_one_message(tmp_path: Path, case: str, verb: str) -> None:
    damage, expected = CASES[case]
    run = write_run(tmp_path / "run", [weights(step) for step in range(3)], STEPS)
    damage(run)
    before = snapshot(tmp_path)

    result = run_cli(verb, run, "--quiet")

    assert result.exit_code == 1, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for part in expected:
        assert part in result.stderr
    assert snapshot(tmp_path) == before
    assert not (run / "averaged").exists()


def test_all_problems_at_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [weights(step) for step in range(3)], STEPS)
    _truncated(run)
    _same_step(run)
    (run / "checkpoint-10" / MODEL).write_bytes(b"")
    result = run_cli("pema", run)
    assert result.exit_code == 1
    assert "error: 3 problems:" in result.stderr
    assert "step 20 is there 2 times" in result.stderr
    assert "checkpoint-10/model.safetensors is 0 bytes long" in result.stderr
    assert "checkpoint-20/model.safetensors is" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nowhere",), "nowhere does not exist"),
        (("run/checkpoint-10",), "is one checkpoint, not a directory of checkpoints"),
        (("run/checkpoint-10/model.safetensors",), "is a file, not a directory"),
        (("run", "--init", "nowhere"), "--init nowhere does not exist"),
        (("run", "--init", "run/checkpoint-10", "--init-step", "0"), "but the run begins at step 0"),
        (("run", "--last", "1"), "leaves 1 of the 3 checkpoints"),
        (("run", "--every", "7"), "leaves 1 of the 3 checkpoints"),
        (("run", "--out", "run/checkpoint-10/averaged"), "lies inside the checkpoint"),
        (("run", "--out", "run"), "holds the run itself"),
        (("run", "--out", "run", "--force"), "holds the run itself"),
        (("run", "--out", ".", "--force"), "holds the run itself"),
        (("run", "--out", "run/checkpoint-10/config.json", "--force"), "lies inside the checkpoint"),
        (("run", "--out", "file"), "file exists and is not a result of ckavg"),
        (("x" * 300,), "File name too long"),
        (("run", "--out", "x" * 300), "File name too long"),
        (("run", "--out", "file/below"), "cannot be written"),
    ],
)
def test_wrong_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], expected: str
) -> None:
    write_run(tmp_path / "run", [weights(step) for step in range(3)], STEPS)
    (tmp_path / "file").write_text("something of the user's")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    result = run_cli("ema", *arguments)
    assert result.exit_code == 1
    assert expected in result.stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("--gamma", "-1"),
        ("--gamma", "nan"),
        ("--gamma", "much"),
        ("--dtype", "int8"),
        ("--device", "tpu"),
        ("--device", "cuda:x"),
        ("--zero-sigma", "maybe"),
        ("--last", "0"),
        ("--every", "0"),
        ("--nonsense",),
    ],
)
def test_wrong_usage_exits_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    run = write_run(tmp_path / "run", [weights(step) for step in range(3)], STEPS)
    before = snapshot(tmp_path)
    result = run_cli("pema", run, *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.strip()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("ema", "--tau", "-30"), "tau must be at least -9"),
        (("ema", "--momentum", "1"), "must be at least 0 and less than 1"),
        (("ema", "--momentum", "0.9", "--gamma", "0.2"), "gamma must not go with momentum"),
        (("ema", "--batch-scale", "2"), "batch-scale must go with momentum"),
        (("ema", "--momentum", "0.9", "--batch-scale", "0"), "must be more than 0"),
        (("ouema", "--eta", "0"), "must be more than 0"),
        (("ouema", "--lag", "1", "--multiplier", "0"), "it must be more, for α = 1"),
        (("dema", "--kappa", "-1"), "must be 0 (no averaging) or more"),
        (("bema", "--lag", "0", "--multiplier", "0.01"), "must be at least 1"),
        (("bema", "--burn-in", "21"), "the last checkpoint is at step 20"),
    ],
)
def test_settings_that_do_not_fit_the_run(tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    run = write_run(tmp_path / "run", [weights(step) for step in range(3)], STEPS)
    verb, *options = arguments
    result = run_cli(verb, run, *options)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    big = [{"w": torch.tensor([float(value)])} for value in (0, 40_000, 80_000)]
    run = write_run(tmp_path / "run", big, STEPS)
    result = run_cli("ema", run, "--gamma", "0", "--dtype", "float16")
    assert result.exit_code == 1
    assert "tensor 'w': a value of the average does not fit F16 (largest 6.55e+04)" in result.stderr


def test_verbose_adds_the_traceback(tmp_path: Path) -> None:
    result = run_cli("pema", tmp_path, "--verbose")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "error: " in result.stderr
