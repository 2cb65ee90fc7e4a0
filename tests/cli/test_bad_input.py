"""What cannot be averaged is refused: one message, status 1, nothing written, nothing touched."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckavg
from tests.cli.runner import run_cli, snapshot
from tests.runs import OLD_PICKLE, random_run, write_checkpoint, write_run

STEPS = (0, 10, 20)
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAST = f"checkpoint-20/{MODEL}"
SHARD = "checkpoint-30/model-00002-of-00002.safetensors"
ALLOW = "--allow-nonfinite"


def weights(shift: float = 0.0) -> dict[str, Tensor]:
    return {"w": torch.arange(12.0).view(3, 4) + shift, "b": torch.tensor([0.5, shift])}


def spoilt(step: int, name: str, place: tuple[int, ...], value: float) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        tensors = weights(STEPS.index(step))
        tensors[name][place] = value
        save_file(tensors, run / f"checkpoint-{step}" / MODEL)

    return damage


def header(content: object) -> Callable[[Path], None]:
    """The last checkpoint with another header."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda run: write(run / LAST, struct.pack("<Q", len(text)) + text + b"\0" * 56)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def away(run: Path, pattern: str, count: int = 0) -> None:
    for path in sorted(run.glob(pattern))[count:]:
        path.rename(run.parent / f"away-{path.name}")


def two_shards(run: Path, *, index: bool) -> None:
    write_checkpoint(run / "checkpoint-30", weights(3), step=30, shards=2)
    (run / SHARD).unlink()
    if not index:
        (run / "checkpoint-30" / INDEX).unlink()


def with_index(index: object) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / LAST).unlink()
        (run / "checkpoint-20" / INDEX).write_text(json.dumps(index))

    return damage


def same_step(run: Path) -> None:
    write_checkpoint(run / "checkpoint-20-copy", weights(), step=20)
    (run / "checkpoint-20-copy").rename(run / "step_20")


def float8(run: Path) -> None:
    header({"w": {"dtype": "F8_E4M3", "shape": [56], "data_offsets": [0, 56]}})(run)
    for other in run.glob(f"*/{MODEL}"):
        other.write_bytes((run / LAST).read_bytes())


def pickles(run: Path) -> None:
    for path in run.glob(f"*/{MODEL}"):
        path.unlink()
        path.with_name("pytorch_model.bin").write_bytes(OLD_PICKLE)


F32 = {"dtype": "F32", "shape": [7], "data_offsets": [0, 28]}
CASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no checkpoints": (lambda run: away(run, "*"), ("holds no checkpoints", "checkpoint-500/")),
    "one checkpoint": (lambda run: away(run, "*", 1), ("holds one checkpoint (step 0)", "--init")),
    "missing shard": (lambda run: two_shards(run, index=True), (f"{SHARD} does not exist", "still being written")),
    "missing shard without index": (lambda run: two_shards(run, index=False), (f"{SHARD} does not exist",)),
    "truncated shard": (lambda run: write(run / LAST, (run / LAST).read_bytes()[:-3]), (f"{LAST} is", "header says")),
    "cut in the header": (lambda run: write(run / LAST, (run / LAST).read_bytes()[:30]), (f"{LAST} is 30 bytes long",)),
    "zero bytes": (lambda run: write(run / LAST, b""), (f"{LAST} is 0 bytes long",)),
    "corrupt JSON": (header(b'{"w": {"dtype": "F32", "shape": ['), (f"{LAST} has a corrupt header",)),
    "header is a list": (header(["w"]), (f"{LAST} has a corrupt header",)),
    "huge header": (lambda run: write(run / LAST, struct.pack("<Q", 2**62) + b"x" * 100), (f"{LAST} is not safetens",)),
    "overlapping tensors": (header({"b": F32, "w": F32}), ("tensor 'w' begins at byte 0, expected 28",)),
    "negative shape": (header({"w": F32 | {"shape": [-1, -14], "data_offsets": [0, 56]}}), ("must be whole numbers",)),
    "wrong size": (
        header({"w": F32 | {"shape": [15], "data_offsets": [0, 56]}}),
        ("tensor 'w' (F32, (15,)) needs 60 bytes, but has 56",),
    ),
    "8-bit floats": (float8, ("dtype 'F8_E4M3', which cannot be averaged", "before quantizing")),
    "trailing bytes": (
        lambda run: write(run / LAST, (run / LAST).read_bytes() + b"more"),
        ("its header accounts for",),
    ),
    "names": (
        lambda run: save_file({"w": weights()["w"], "other": weights()["b"]}, run / LAST),
        ("step 20: tensor 'b' is missing", "tensor 'other' is new", "--to-step 10"),
    ),
    "shapes": (
        lambda run: save_file({"w": torch.zeros(4, 3), "b": weights()["b"]}, run / LAST),
        ("step 20: tensor 'w' is (4, 3), but (3, 4) at step 10", "--to-step 10"),
    ),
    "dtypes": (
        lambda run: save_file({name: tensor.half() for name, tensor in weights().items()}, run / LAST),
        ("step 20: tensor 'w' is F16, but F32 at step 10", "'b' is F16"),
    ),
    "NaN": (spoilt(20, "w", (1, 2), float("nan")), ("step 20: tensor 'w' holds NaN or infinity", "--to-step 19")),
    "infinity": (spoilt(10, "b", (0,), float("-inf")), ("step 10: tensor 'b' holds NaN or infinity",)),
    "same step twice": (same_step, ("step 20 appears 2 times: checkpoint-20, step_20",)),
    "pickles": (pickles, ("pytorch_model.bin, not safetensors", "This command converts them", "weights_only=True")),
    "no weights": (lambda run: (run / LAST).unlink(), ("checkpoint-20 holds no weights",)),
    "bad index": (with_index({"weight_map": 3}), ("is not a shard index",)),
    "escaping index": (
        with_index({"weight_map": {"w": "../checkpoint-10/model.safetensors"}}),
        ("shards must be safetensors files beside their index",),
    ),
    "mixed clocks": (lambda run: write_checkpoint(run / "epoch_3", weights()), ("count different things", "epoch_3")),
    "mixed stages": (
        lambda run: write_checkpoint(run / "stage1-step30", weights()),
        ("to 2 runs, stages or experiments", "; stage1-step30.", "--match"),
    ),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [weights(step) for step in range(3)], STEPS)


@pytest.mark.parametrize(("case", "verb"), [*((case, "pema") for case in CASES), ("NaN", "bema"), ("infinity", "bema")])
def test_refused_with_one_message(run: Path, case: str, verb: str) -> None:
    damage, expected = CASES[case]
    damage(run)
    before = snapshot(run.parent)
    result = run_cli(verb, run, "--quiet")
    assert (result.exit_code, result.stdout) == (1, ""), result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for part in expected:
        assert part in result.stderr
    assert snapshot(run.parent) == before
    assert not (run / "averaged").exists()


def test_all_problems_at_once(run: Path) -> None:
    CASES["truncated shard"][0](run)
    same_step(run)
    write(run / "checkpoint-10" / MODEL, b"")
    result = run_cli("pema", run)
    assert result.exit_code == 1
    for part in ("error: 3 problems:", "step 20 appears 2 times", f"checkpoint-10/{MODEL} is 0 bytes", f"{LAST} is"):
        assert part in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("nowhere", "nowhere does not exist"),
        ("run/checkpoint-10", "is one checkpoint, not a directory of checkpoints"),
        ("run/checkpoint-10/model.safetensors", "is a file, not a directory"),
        ("run --init nowhere", "--init nowhere does not exist"),
        ("run --init run/checkpoint-10 --init-step 0", "but the run begins at step 0"),
        ("run --last 1", "leaves 1 of the 3 checkpoints"),
        ("run --every 7", "leaves 1 of the 3 checkpoints"),
        ("run --out run/checkpoint-10/averaged", "lies inside the checkpoint"),
        ("run --out run", "holds the run itself"),
        ("run --out run --force", "holds the run itself"),
        ("run --out . --force", "holds the run itself"),
        ("run --out run/checkpoint-10/config.json --force", "lies inside the checkpoint"),
        ("run --out file", "file exists and is not a result of ckavg"),
        ("x" * 300, "File name too long"),
        (f"run --out {'x' * 300}", "File name too long"),
        ("run --out file/below", "cannot be written"),
    ],
)
def test_wrong_places(run: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, expected: str) -> None:
    (run.parent / "file").write_text("something of the user's")
    monkeypatch.chdir(run.parent)
    before = snapshot(run.parent)
    result = run_cli("ema", *arguments.split())
    assert result.exit_code == 1
    assert expected in result.stderr
    assert snapshot(run.parent) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pema --gamma -1", "gamma is -1; it must be 0 or more"),
        ("pema --gamma nan", "gamma is nan; it must be a finite number"),
        ("pema --gamma much", "--gamma is 'much'; it must be a number. hint: See: ckavg pema --help"),
        ("pema --dtype int8", "--dtype is 'int8'; it must be source or float32 or bfloat16 or float16"),
        ("pema --device tpu", "tpu"),
        ("pema --device cuda:x", "cuda:x"),
        ("pema --zero-sigma maybe", "--zero-sigma is 'maybe'; it must be exclude or eps"),
        ("pema --last 0", "--last is '0'; it must be 1 or more"),
        ("pema --every half", "--every is 'half'; it must be a whole number"),
        ("pema --steps 1,x", "--steps is '1,x'; it must be whole numbers"),
        ("pema --gama 1", "error: ckavg pema has no option --gama. hint: Did you mean --gamma"),
        ("pema --force=1", "--force takes no value"),
        ("pema --gamma", "--gamma needs a value: --gamma X"),
        ("pema twice", "ckavg pema: too many arguments, twice. hint: Type: ckavg pema [SOURCE] [OPTIONS]"),
        ("eval", "ckavg eval: --text is missing. hint: Type: ckavg eval DIR --text FILE [OPTIONS]"),
        ("diff", "ckavg diff: B is missing. hint: Type: ckavg diff A B [OPTIONS]"),
        ("pemma", "ckavg has no verb pemma. hint: Did you mean pema or ema? See: ckavg --help"),
        ("ema --tau -30", "tau must be at least -9"),
        ("ema --momentum 1", "must be at least 0 and less than 1"),
        ("ema --momentum 0.9 --gamma 0.2", "gamma cannot be used with momentum"),
        ("ema --batch-scale 2", "batch-scale requires momentum"),
        ("ema --momentum 0.9 --batch-scale 0", "must be more than 0"),
        ("ouema --eta 0", "must be more than 0"),
        ("ouema --lag 1 --multiplier 0", "it must be more: with α = 1"),
        ("dema --kappa -1", "must be 0 (no averaging) or more"),
        ("bema --lag 0 --multiplier 0.01", "must be at least 1"),
        ("bema --burn-in 21", "the last checkpoint is at step 20"),
    ],
)
def test_wrong_usage_exits_2(run: Path, words: str, expected: str) -> None:
    verb, *options = words.split()
    before = snapshot(run)
    result = run_cli(verb, run, *options)
    assert result.exit_code == 2
    assert expected in " ".join(result.stderr.split())
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr
    assert snapshot(run) == before


def test_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    values = ((0.0, 1.0), (40_000.0, torch.nan), (80_000.0, torch.nan))
    run = write_run(tmp_path / "run", [{"w": torch.tensor([value[0]])} for value in values], STEPS)
    result = run_cli("ema", run, "--gamma", "0", "--dtype", "float16")
    assert result.exit_code == 1
    assert "tensor 'w': a value of the average does not fit F16 (largest 6.55e+04)" in result.stderr
    run = write_run(tmp_path / "nan", [{"w": torch.tensor(value)} for value in values], STEPS)
    result = run_cli("ema", run, "--gamma", "0", "--dtype", "float16", ALLOW)
    assert result.exit_code == 1, "where NaN is allowed, too"
    assert "a value of the average does not fit F16" in result.stderr


def test_verbose_adds_the_traceback(tmp_path: Path) -> None:
    result = run_cli("pema", tmp_path, "--verbose")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "error: " in result.stderr


def test_names_cannot_reach_the_terminal_as_control_characters(tmp_path: Path) -> None:
    tensors = [{"\x1b[31mred[bold]": torch.ones(3) * step} for step in (0, float("nan"))]
    result = run_cli("ema", write_run(tmp_path, tensors, (0, 1)))
    assert result.exit_code == 1
    assert "\x1b" not in result.stderr
    assert "\\x1b[31mred[bold]" in result.stderr


# --- NaN and infinity that the user has allowed: they reach what they belong to, and nothing else ---


def nonfinite() -> list[dict[str, Tensor]]:
    tensors = random_run(5, 4, torch.float32)
    tensors[0]["tiles"][1, 7] = torch.inf
    tensors[2]["odd"][0, 0, 0] = torch.nan
    tensors[2]["odd"][0, 0, 1] = -torch.inf
    return tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "nonfinite", nonfinite(), (0, 10, 20, 30))


def told(*words: object) -> dict[str, Any]:
    done = run_cli(*map(str, words), "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("verb", ["pema", "bema", "ema", "ouema", "dema", "mean"])
def test_refused_unless_allowed(source: Path, verb: str) -> None:
    refused = run_cli(verb, source)
    assert refused.exit_code == 1
    assert "holds NaN or infinity" in refused.stderr
    record = told(verb, source, ALLOW)
    assert record["allow_nonfinite"] is True
    assert "3 numbers of the result are NaN or infinite, as some of the checkpoints are." in record["warnings"]
    result = load_file(Path(record["outputs"][0]["directory"]) / MODEL)
    effective = torch.tensor(record["weights"], dtype=torch.float64)
    for name in (name for name, tensor in result.items() if tensor.is_floating_point()):
        stacked = torch.stack([each[name].double() for each in nonfinite()])
        expected = torch.tensordot(effective, stacked, dims=1)
        finite = torch.isfinite(stacked).all(dim=0)
        assert torch.equal(torch.isfinite(result[name]), finite)
        torch.testing.assert_close(result[name][finite].double(), expected[finite], rtol=1e-6, atol=1e-6)


def test_what_is_forgotten_is_not_in_the_result(source: Path) -> None:
    record = told("ema", source, "--gamma", 0, ALLOW)
    assert record["weights"] == [0, 0, 0, 1]
    assert not any("NaN" in each for each in record["warnings"])
    assert torch.isfinite(load_file(source / "averaged/ema-gamma0/model.safetensors")["odd"]).all()


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_such_tensors_do_not_count_in_the_path(source: Path, tmp_path: Path, scope: str) -> None:
    record = told("pema", source, "--scope", scope, ALLOW)
    assert record["excluded_from_path"] == ["norm", "odd", "scalar", "single", "tiles"]
    assert "NaN or infinity, so not counted in the path length: 2 tensors (odd, tiles)." in record["warnings"]
    sound = write_run(tmp_path / "sound", random_run(5, 4, torch.float32), (0, 10, 20, 30))
    without = ckavg.path_length(ckavg.open_run(sound), path_exclude=["odd", "tiles"])
    assert record["path_length"] == list(without.lengths)
    assert run_cli("path", source).exit_code == 1, "what is cached of the path does not let them through"
    again = told("path", source, ALLOW)
    assert again["path_length"] == record["path_length"]
    assert again["tensors"]["odd"]["sigma"] is None
    assert again["tensors"]["bias"]["sigma"] > 0


def test_in_a_sample(source: Path) -> None:
    assert run_cli("path", source, "--sample", "0.9").exit_code == 1
    sampled = told("path", source, "--sample", 0.9, ALLOW)
    assert {"odd", "tiles"} <= set(sampled["excluded_from_path"])
    assert sampled["path_length"][-1] > 0
