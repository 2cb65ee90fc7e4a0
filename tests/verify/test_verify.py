"""A sound result passes, whatever it was made of and wherever it was put since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckavg
from ckavg.output.output_path import LOCAL
from ckavg.schemes import SCHEMES, Last, Scheme
from tests.cli.runner import run_cli, snapshot
from tests.exhaustive import all_but, thinned
from tests.runs import random_run, write_checkpoint, write_run

STEPS = (0, 10, 20, 30, 40, 50)
AVERAGES: list[Scheme] = [
    ckavg.EMA(),
    ckavg.EMA(gamma=0.0),
    ckavg.EMA(gamma=2.0, tau=30.0),
    ckavg.MomentumEMA(momentum=0.9),
    ckavg.MomentumEMA(momentum=0.99, momentum_per="update", batch_scale=3.0),
    ckavg.PEMA(),
    ckavg.PEMA(scope="tensor"),
    ckavg.PEMA(scope="tensor", pairing="next", clock="updates", gamma=0.4),
    ckavg.BEMA(),
    ckavg.BEMA(eta=0.0, kappa=0.0),
    ckavg.BEMA(eta=float("inf")),
    ckavg.BEMA(burn_in=15, form="author"),
    ckavg.BEMA(burn_in=50),
    ckavg.OUEMA(),
    ckavg.OUEMA(eta=0.01),
    ckavg.OUEMA(eta=float("inf")),
    ckavg.DEMA(),
    ckavg.DEMA(kappa=0.0),
    ckavg.DEMA(burn_in=15),
    ckavg.PowerEMA(),
    ckavg.PowerExponentEMA(exponent=0.5),
    ckavg.MomentumEMA(momentum=0.9, batch_scale="1,25:4"),
    ckavg.Weights(weights=(0.0, 0.5, 0.0, 0.25, 0.25, 0.0)),
    ckavg.Weights(weights={10: -0.5, 20: 2.25, 50: -0.75}),
    ckavg.Mean(),
    ckavg.Mean(decay="cosine"),
    ckavg.Mean(decay="minus-sqrt"),
    Last(),
]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}


def source_of(root: Path, dtype: torch.dtype, *, seed: int = 0) -> Path:
    return write_run(root / "run", random_run(seed, len(STEPS), dtype), STEPS, shards=(1, 2, 3))


def assert_sound(directory: Path, **options: Any) -> ckavg.Verified:
    verified = ckavg.verify_result(directory, replay=True, sources=True, **options)
    assert verified.problems == ()
    assert verified.checks == ("record", "files", "weights", "sources", "replay")
    return verified


def test_every_scheme_is_tried() -> None:
    assert {type(scheme) for scheme in AVERAGES} == set(SCHEMES)


@pytest.mark.parametrize(("dtype", "accumulate"), thinned(DTYPES.values(), ["float32", "float64"], every=2))
def test_every_scheme_in_every_dtype(tmp_path: Path, dtype: torch.dtype, accumulate: str) -> None:
    run = ckavg.open_run(source_of(tmp_path, dtype))
    for number, scheme in enumerate(AVERAGES):
        result = ckavg.average(run, scheme, out=tmp_path / str(number), accumulate=accumulate, allow_anchor=True)
        verified = assert_sound(result.directory, seed=number)
        assert verified.elements == 10_000
        assert verified.warnings == () or result.inputs[0].checksum is None
        unit = verified.largest_deviation
        assert unit is not None
        # A 16-bit result is rounded once, from something much more exact: half a unit, and next to nothing.
        assert 0 <= unit < (0.51 if dtype.itemsize == 2 and not isinstance(scheme, ckavg.OUEMA) else 64)


@pytest.mark.parametrize("asked", all_but(("bfloat16",), ["float32", "bfloat16", "float16"]))
def test_output_dtypes(tmp_path: Path, asked: str) -> None:
    for name, dtype in DTYPES.items():
        run = ckavg.open_run(source_of(tmp_path / name, dtype))
        for scheme in (ckavg.PEMA(), ckavg.BEMA(), ckavg.OUEMA()):
            assert_sound(ckavg.average(run, scheme, dtype=asked).directory, seed=1)


def test_the_tensors_of_a_mixed_run(tmp_path: Path) -> None:
    checkpoints = random_run(4, len(STEPS), torch.float32)
    for weights in checkpoints:
        weights["odd"] = weights["odd"].double()
        weights["bias"] = weights["bias"].bfloat16()
    run = ckavg.open_run(write_run(tmp_path / "run", checkpoints, STEPS))
    for scheme in (ckavg.EMA(), ckavg.DEMA(), ckavg.BEMA()):
        assert_sound(ckavg.average(run, scheme).directory, elements=1_000_000, seed=0)


def test_an_anchor_apart_and_flat_files(tmp_path: Path) -> None:
    weights = random_run(5, 5, torch.float32)
    base = write_checkpoint(tmp_path / "base", weights[0])
    source = tmp_path / "flat"
    source.mkdir()
    for step, each in zip((10, 20, 30, 40), weights[1:], strict=True):
        save_file(each, source / f"step_{step}.safetensors")
    run = ckavg.open_run(source, init=base)
    for scheme in (ckavg.PEMA(), ckavg.Mean(), ckavg.BEMA(burn_in=15)):
        assert_sound(ckavg.average(run, scheme).directory)
    as_file = ckavg.open_run(source, init=base / "model.safetensors")
    result = ckavg.average(as_file, ckavg.BEMA())
    assert_sound(result.directory)
    (base / "model.safetensors").rename(tmp_path / "base.safetensors")
    assert "step 0: " in ckavg.verify_result(result.directory, replay=True).problems[0]
    assert_sound(result.directory, init=tmp_path / "base.safetensors")


@pytest.mark.parametrize("scheme", [ckavg.PEMA(scope="tensor"), ckavg.BEMA(burn_in=10), ckavg.DEMA()])
def test_snapshots(tmp_path: Path, scheme: Scheme) -> None:
    run = ckavg.open_run(source_of(tmp_path, torch.float32))
    result = ckavg.average(run, scheme, snapshot_every=20)
    verified = assert_sound(result.directory)
    assert verified.elements == 30_000
    assert verified.warnings == () or "took no part" in verified.warnings[0]
    assert_sound(result.directory / "checkpoint-20")
    shutil.move(result.directory / "checkpoint-40", tmp_path / "elsewhere")
    assert_sound(tmp_path / "elsewhere", source=run.source)
    assert "checkpoint-40/model.safetensors is missing." not in verified.problems
    problems = ckavg.verify_result(result.directory).problems
    assert any(each.startswith("checkpoint-40/model-0") and each.endswith("is missing.") for each in problems)


def test_a_sweep_of_a_choice(tmp_path: Path) -> None:
    source = source_of(tmp_path, torch.bfloat16)
    words = ("--from-step", "10", "--to-step", "40", "-q", "--eval", "echo {dir} 1", "--eval-goal", "min")
    run_cli("sweep", source, "pema:gamma=0.1,0.3", "bema:burn-in=0,30", "last", "mean", *words)
    results = [place for place in (source / "averaged").iterdir() if place.is_dir()]
    assert len(results) == 6
    for place in results:
        begins_late = place.name.startswith(("last-", "bema-eta0.2-burn-in30"))
        assert len(assert_sound(place).warnings) == begins_late  # what it does not read has no checksum


def test_moved_renamed_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path, torch.bfloat16)
    monkeypatch.chdir(source)
    result = run_cli("ema", "--json", "-q")
    assert json.loads(result.stdout)["inputs"][0]["directory"] == "checkpoint-0"
    assert_sound(Path("averaged/ema-gamma0.15"))
    monkeypatch.chdir(tmp_path)
    assert_sound(Path("run/averaged/ema-gamma0.15"))  # relative names in the record, and another directory
    shutil.move(source, tmp_path / "deep")
    moved = tmp_path / "deep" / "averaged" / "ema-gamma0.15"
    assert_sound(moved)  # a run that takes its results along
    (tmp_path / "link").symlink_to(moved)
    assert_sound(tmp_path / "link", source=tmp_path / "deep")
    copy = shutil.copytree(moved, tmp_path / "other" / "name")
    assert any("If they were moved" in each for each in ckavg.verify_result(copy, replay=True).problems)
    assert ckavg.verify_result(copy).problems == ()
    assert_sound(copy, source=tmp_path / "deep")


def test_nothing_is_written(tmp_path: Path) -> None:
    source = source_of(tmp_path, torch.float32)
    result = ckavg.average(ckavg.open_run(source), ckavg.PEMA(scope="tensor"))
    (source / "averaged" / "path.json").unlink()
    before = snapshot(tmp_path)
    assert_sound(result.directory)
    assert snapshot(tmp_path) == before


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    result = ckavg.average(ckavg.open_run(source_of(tmp_path, torch.float32)), ckavg.EMA()).directory
    one, other, drawn = (ckavg.verify_result(result, replay=True, seed=seed, elements=500) for seed in (7, 8, None))
    assert (one.elements, one.seed) == (500, 7)
    assert one.largest_deviation != other.largest_deviation
    for each in (one, drawn):
        again = ckavg.verify_result(result, replay=True, elements=500, seed=each.seed)
        assert again.largest_deviation == each.largest_deviation


def test_what_the_command_prints(tmp_path: Path) -> None:
    source = source_of(tmp_path, torch.bfloat16)
    result = ckavg.average(ckavg.open_run(source), ckavg.BEMA(burn_in=10)).directory
    done = run_cli("verify", result, "--replay", "--sources", "--seed", "3")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[1] == "Bias-corrected EMA (BEMA): eta 0.2, burn-in 10; 6 checkpoints, steps 0 to 50"
    assert lines[3:8] == [
        "record   ok  its numbers follow from each other",
        "files    ok  nothing is missing or changed (8 files)",
        "weights  ok  they load, and none is NaN",
        "sources  ok  the checkpoints are those that were averaged",
        "replay   ok  computed again from the checkpoints (10,000 elements, at most 0.50 units in the last place "
        "apart, seed 3)",
    ]
    assert lines[9] == "warning: Not read, then and now: step 0 took no part in the average."
    assert lines[-1].startswith("All as recorded. Read ")
    assert run_cli("verify", result, "-q").stdout == ""
    told = json.loads(run_cli("verify", result, "--json").stdout)
    assert told["checks"] == ["record", "files", "weights"]
    assert (told["elements"], told["seed"], told["largest_deviation"]) == (None, None, None)


def test_bytes_read(tmp_path: Path) -> None:
    """The result twice, the elements of it and of every checkpoint once, and the averaged tensors of all of them."""
    source = source_of(tmp_path, torch.float32)
    run = ckavg.open_run(source)
    result = ckavg.average(run, ckavg.EMA())
    hashed = sum(
        place.stat().st_size for place in result.directory.iterdir() if place.name not in ("ckavg.json", LOCAL)
    )
    weights = sum(place.stat().st_size for place in result.directory.glob("*.safetensors"))
    plain = ckavg.verify_result(result.directory)
    assert plain.bytes_read == hashed + weights
    replayed = ckavg.verify_result(result.directory, replay=True, elements=50, seed=0)
    one_page = sum(each.nbytes for each in run.tensors.values() if each.nbytes <= 4096)
    assert 7 * one_page < replayed.bytes_read - plain.bytes_read <= 7 * 50 * 4096
    averaged = sum(each.nbytes for each in run.tensors.values() if each.is_floating)
    assert ckavg.verify_result(result.directory, sources=True).bytes_read == plain.bytes_read + 6 * averaged


@pytest.mark.parametrize(
    "words", [("--elements", "0"), ("--seed", "-1"), ("--source", "."), ("--init", "."), ("--elements", "x")]
)
def test_wrong_usage(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert run_cli("verify", tmp_path, *words).exit_code == 2


def test_what_is_no_result(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        done = run_cli("verify", place)
        assert done.exit_code == 1
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 2


# --- other runs: pipelines, tensors that not all checkpoints have, NaN that was let through ---


def pipeline(root: Path) -> Path:
    for step, weights in zip(STEPS, random_run(3, len(STEPS), torch.float32), strict=True):
        for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
            path = root / f"checkpoint-{step}" / file
            path.parent.mkdir(parents=True)
            save_file({f"{file[0]}.{name}": each for name, each in weights.items()}, path)
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


@pytest.mark.parametrize("scheme", [ckavg.PEMA(), ckavg.PEMA(scope="tensor"), ckavg.BEMA()], ids=str)
@pytest.mark.parametrize(
    ("make", "chosen", "options"),
    [
        (pipeline, {}, {}),
        (partly_frozen, {"common_only": True}, {}),
        (diverged, {}, {"allow_nonfinite": True}),
    ],
)
def test_other_runs(
    tmp_path: Path,
    make: Callable[[Path], Path],
    chosen: Mapping[str, Any],
    options: Mapping[str, Any],
    scheme: Scheme,
) -> None:
    result = ckavg.average(ckavg.open_run(make(tmp_path / "run"), **chosen), scheme, **options).directory
    verified = assert_sound(result, elements=1_000_000)
    assert verified.elements is not None
    assert verified.elements > 100_000
    (file, *_) = sorted(result.rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 64
    file.write_bytes(data)
    damaged = run_cli("verify", result, "--replay", "--elements", "1000000")
    assert damaged.exit_code == 1
    assert file.name in damaged.output
    assert "Traceback" not in damaged.output


@pytest.mark.parametrize(
    ("field", "name"), [("copied", "nowhere"), ("copied", "position_ids"), ("infinite", ""), ("uncorrected", "nowhere")]
)
def test_what_a_record_names_are_tensors_of_the_result(tmp_path: Path, field: str, name: str) -> None:
    result = ckavg.average(ckavg.open_run(partly_frozen(tmp_path / "run"), common_only=True), ckavg.EMA()).directory
    record = json.loads((result / "ckavg.json").read_text())
    assert record["copied"] == ["bias", "odd"]
    (result / "ckavg.json").write_text(json.dumps(record | {field: [*record[field], name]}))
    problems = ckavg.verify_result(result).problems
    assert f"{field} names {name!r}, which is not a floating tensor of the result." in problems


@pytest.mark.parametrize("dtype", all_but((torch.bfloat16, torch.float32), DTYPES.values()), ids=DTYPES)
def test_the_tolerance_holds_for_numbers_of_every_size(tmp_path: Path, dtype: torch.dtype) -> None:
    """Tiny and huge numbers, changes of sign, terms that cancel, and forty updates."""
    generator = torch.Generator().manual_seed(6)
    most = 4 if dtype == torch.float16 else 30
    checkpoints = []
    for _ in range(41):
        powers = torch.randint(-2 * most if dtype == torch.float16 else -most - 12, most, (3000,), generator=generator)
        wild = torch.randn(3000, generator=generator, dtype=torch.float64) * 10.0**powers
        calm = 1 + 1e-3 * torch.randn(3000, generator=generator, dtype=torch.float64)
        checkpoints.append({"wild": wild.to(dtype), "calm": calm.to(dtype), "still": torch.ones(5, dtype=dtype)})
    steps = tuple(range(1, 42))
    run = ckavg.open_run(write_run(tmp_path / "run", checkpoints, steps))
    for number, scheme in enumerate(AVERAGES):
        if isinstance(scheme, ckavg.BEMA) and scheme.burn_in > steps[-1]:
            continue
        if isinstance(scheme, ckavg.Weights):
            scheme = ckavg.Weights(weights=[(-1) ** step * step for step in steps], normalize=True)
        overflows = isinstance(scheme, ckavg.OUEMA | ckavg.BEMA | ckavg.DEMA | ckavg.Weights)
        wide = dtype == torch.float16 and overflows
        out = tmp_path / str(number)
        result = ckavg.average(run, scheme, out=out, dtype="float32" if wide else "source", allow_anchor=True)
        assert ckavg.verify_result(result.directory, replay=True, seed=number, elements=10_000).problems == ()


def test_nan_that_was_let_through(tmp_path: Path) -> None:
    """It is as it should be where the sources have it, and nowhere else."""
    source = diverged(tmp_path / "run")
    result = ckavg.average(ckavg.open_run(source), ckavg.EMA(), allow_nonfinite=True).directory
    shard = source / "checkpoint-20" / "model.safetensors"
    save_file(load_file(shard) | {"tiles": random_run(3, 3, torch.float32)[2]["tiles"]}, shard, {"format": "pt"})
    (problem,) = ckavg.verify_result(result, replay=True, elements=1_000_000).problems
    assert "'tiles'[0, 5] is nan, expected " in problem
