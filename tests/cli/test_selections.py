"""`sweep` over selections of checkpoints: each result is that of its own command, and all come from one reading."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import ckavg
from ckavg.averaging.pipeline import carry_out
from ckavg.averaging.plan import plan_averages
from ckavg.engine.context import Context, Progress
from tests import reference
from tests.cli.runner import placeless, run_cli, snapshot
from tests.exhaustive import all_but, unless
from tests.runs import random_run, write_run

STEPS = (10, 20, 30, 40, 50, 60, 80, 90)

SINGLE = {
    "pema-gamma0.1-every20": "pema --gamma 0.1 --every 20",
    "pema-gamma0.1-every30": "pema --gamma 0.1 --every 30",
    "pema-gamma0.3-every20": "pema --gamma 0.3 --every 20",
    "pema-gamma0.3-every30": "pema --gamma 0.3 --every 30",
    "pema-gamma0.15-scopetensor-last4": "pema --scope tensor --last 4",
    "bema-eta0.2-burn-in30-every20": "bema --burn-in 30 --every 20",
    "dema-kappa0.5-to-step50": "dema --to-step 50",
    "ema-gamma0.15-from-step40-last3": "ema --from-step 40 --last 3",
    "mean-last2": "mean --last 2",
    "ouema-eta0.2": "ouema",
}
"""By the name of the result: the command of its own."""

WORDS = (
    "pema:gamma=0.1,0.3,every=20,30", "pema:scope=tensor,last=4", "bema:burn-in=30,every=20", "dema:to-step=50",
    "ema:from-step=40,last=3", "mean:last=2", "ouema",
)  # fmt: skip


def make_run(root: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """A base model and the run that was trained from it."""
    first, *rest = random_run(7, len(STEPS) + 1, dtype)
    base = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in first.items()}
    return write_run(root / "base", [base], (0,)) / "checkpoint-0", write_run(root / "run", rest, STEPS, shards=(2, 1))


def contents(result: Path) -> dict[str, Any]:
    """Every file of a result, its record without what hangs on the place and on the reading."""
    files: dict[str, Any] = {name: data for name, (_, _, data) in snapshot(result).items()}
    for name in [name for name in files if name.endswith("ckavg.json")]:
        record = placeless(json.loads(files[name]))
        files[name] = {key: value for key, value in record.items() if key not in ("seconds", "bytes_read")}
    return {name: data for name, data in files.items() if not Path(name).name.startswith(".")}


def forget(run: Path) -> None:
    """Have the path measured anew."""
    (run / "averaged" / "path.json").unlink(missing_ok=True)


def swept(run: Path, *words: str | Path) -> list[dict[str, Any]]:
    """The records of a sweep."""
    forget(run)
    done = run_cli("sweep", run, *words, "--json")
    assert done.exit_code == 0, done.stderr
    records: list[dict[str, Any]] = json.loads(done.stdout)["averages"]
    return records


def directory(record: dict[str, Any]) -> Path:
    return Path(record["outputs"][-1]["directory"])


def assert_as_alone(run: Path, result: Path, *words: str | Path) -> None:
    """A result is to the byte that of a command of its own."""
    forget(run)
    (run.parent / "alone").mkdir(exist_ok=True)
    alone = run_cli(words[0], run, *words[1:], "--out", run.parent / "alone" / result.name, "-q", "--force")
    assert alone.exit_code == 0, alone.stderr
    assert contents(result) == contents(run.parent / "alone" / result.name), result.name


CASES = [
    pytest.param(torch.float32, False, [], id="float32"),
    pytest.param(torch.bfloat16, True, [], id="bfloat16, init"),
    *(
        pytest.param(*case, marks=unless(is_typical=False))
        for case in (
            (torch.float32, True, []),
            (torch.bfloat16, False, []),
            (torch.float64, True, ["--last", "6", "--zero-sigma", "eps"]),
            (torch.float32, False, ["--dtype", "bfloat16", "--accumulate", "float64", "--skip-step", "60"]),
        )
    ),
]


@pytest.mark.parametrize(("dtype", "with_init", "options"), CASES)
def test_results_are_those_of_their_own_commands(
    tmp_path: Path, dtype: torch.dtype, with_init: bool, options: list[str]
) -> None:
    base, run = make_run(tmp_path, dtype)
    more: list[str | Path] = [*options, "--allow-anchor"]
    more += ["--init", base] if with_init else []
    for name, record in zip(SINGLE, swept(run, *WORDS, *more), strict=True):
        assert set(name.split("-")) <= set(directory(record).name.split("-"))
        verb, *own = SINGLE[name].split()
        # What the word says takes the place of the option.
        assert_as_alone(run, directory(record), verb, *more, *own)


@pytest.mark.parametrize(
    "text", all_but(("--sample 0.2",), ("--sample 0.2", "--snapshot-every 20", "--allow-nonfinite"))
)
def test_samples_snapshots_and_nan(tmp_path: Path, text: str) -> None:
    options = text.split()
    steps = (0, 10, 20, 30, 40)
    generator = torch.Generator().manual_seed(0)
    theta, weights = torch.randn(300_000, generator=generator), []
    for _ in steps:
        theta = theta + 0.01 * torch.randn(theta.shape, generator=generator)
        weights.append({"large": theta, "small": theta[:100].clone()})
    if options == ["--allow-nonfinite"]:
        weights[1]["small"][7] = math.nan  # of the first alone, and the anchor of the second
    run = write_run(tmp_path / "run", weights, steps)
    first, second, third = swept(run, "pema", "pema:every=20", "ema:from-step=10,to-step=30", *options)
    assert_as_alone(run, directory(first), "pema", *options)
    assert_as_alone(run, directory(second), "pema", "--every", "20", *options)
    assert_as_alone(run, directory(third), "ema", "--from-step", "10", "--to-step", "30", *options)


def test_every_checkpoint_is_read_once_a_pass_and_no_other(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, torch.float32)
    size = json.loads(run_cli("mean", run, "--out", tmp_path / "mean", "--json").stdout)["bytes_read"] / len(STEPS)
    (read,) = {record["bytes_read"] for record in swept(run, "mean:last=2", "ema:last=3,to-step=80")}
    assert read == pytest.approx(4 * size, rel=0.01), "steps 50, 60, 80, 90"
    words = "pema:gamma=0.05,0.1,0.2,0.3,every=20,30,40"
    told = json.loads(run_cli("sweep", run, words, "--dry-run", "--json").stdout)
    records = swept(run, words, "--out", tmp_path / "many")
    (read,) = {record["bytes_read"] for record in records}
    assert read == told["bytes_to_read"]
    forget(run)
    alone = json.loads(run_cli("pema", run, "--steps", "10,30,40,50,90", "--dry-run", "--json").stdout)
    assert read == pytest.approx(alone["bytes_to_read"], rel=0.001), "both passes read what any interval visits"
    for record in records:
        visited = [reference.load_floats(run / f"checkpoint-{step}") for step in record["steps"]]
        assert record["path_length"] == pytest.approx(reference.path_length(visited)[0], rel=1e-6)


def test_what_one_selection_holds_is_not_said_of_another(tmp_path: Path) -> None:
    weights = random_run(1, len(STEPS), torch.float32)
    for place, checkpoint in enumerate(weights):
        checkpoint["odd"][0, 0, :3] = math.inf if place >= 4 else -0.0 if place < 2 else 1.0
    run = write_run(tmp_path / "run", weights, STEPS)
    records = swept(run, "pema:from-step=50", "pema:to-step=40", "bema:to-step=20", "mean:to-step=20")
    assert [any("same infinities" in warning for warning in each["warnings"]) for each in records] == [True] + [
        False
    ] * 3
    assert_as_alone(run, directory(records[0]), "pema", "--from-step", "50")
    assert_as_alone(run, directory(records[1]), "pema", "--to-step", "40")
    assert_as_alone(run, directory(records[2]), "bema", "--to-step", "20")
    assert_as_alone(run, directory(records[3]), "mean", "--to-step", "20")
    told = run_cli("sweep", run, "mean:to-step=60", "ema:to-step=30", "--out", tmp_path / "no")
    assert told.exit_code == 1
    assert "step 50: tensor 'odd' holds NaN or infinity" in told.stderr


def test_selections_of_a_run_that_changes_are_read_each_by_itself(tmp_path: Path) -> None:
    weights = random_run(1, 4, torch.float32)
    for checkpoint in weights[2:]:
        checkpoint["bias"] = checkpoint["bias"][:100].clone()
    run = write_run(tmp_path / "run", weights, (10, 20, 30, 40))
    after, before = swept(run, "pema:from-step=30", "pema:to-step=20")
    assert_as_alone(run, directory(after), "pema", "--from-step", "30")
    assert_as_alone(run, directory(before), "pema", "--to-step", "20")


def test_problems_and_warnings_name_the_word(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, torch.float32)
    before = snapshot(run)
    told = run_cli("sweep", run, "mean", "pema:gamma=0.1,last=1", "mean:last=99", "--from-step", "20")
    assert told.exit_code == 1
    assert "pema:gamma=0.1,last=1: The selection leaves 1 of the 8 checkpoints" in told.stderr
    assert told.stderr.count("The selection leaves") == 1
    assert snapshot(run) == before
    told = run_cli("sweep", run, "mean", "mean:last=99", "--dry-run")
    assert "mean-last99: --last 99 asks for more checkpoints than there are" in told.stderr
    (run / "checkpoint-90" / "config.json").write_text('{"model_type": "other"}')
    wrong = "step 90: config.json states model_type other"
    told = run_cli("sweep", run, "mean", "ema:last=4", "--dry-run")
    assert f"error: {wrong}" in told.stderr, "of both, and said once"
    told = run_cli("sweep", run, "mean:to-step=60", "mean", "ema:last=4", "--dry-run")
    assert f"error: mean, ema:last=4: {wrong}" in told.stderr


def test_names_of_results(tmp_path: Path) -> None:
    base, run = make_run(tmp_path, torch.float32)
    for words, name in {
        "mean --last 3": "mean-last3",
        "pema --every 20 --from-step 30": "pema-gamma0.15-every20-from-step30",
        f"ema --init {base}": "ema-gamma0.15-init",
        "mean --steps 20,60 ": "mean-steps20-60",
        "mean --skip-step 20 --skip-step 50": "mean-skip-step20-50",
    }.items():
        verb, *options = words.split()
        assert directory(json.loads(run_cli(verb, run, *options, "--dry-run", "--json").stdout)).name == name
    many = ",".join(map(str, STEPS))
    (one, other) = (
        directory(json.loads(run_cli("mean", run, *options, "--dry-run", "--json").stdout)).name
        for options in (["--steps", many], ["--match", "checkpoint-*0"])
    )
    assert re.fullmatch(r"mean-steps10-20-30-40-50-60-80-90", one)
    assert re.fullmatch(r"mean-match-checkpoint-0-[0-9a-f]{6}", other)


def test_table_is_grouped_by_the_selection(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, torch.float32)
    done = run_cli("sweep", run, "pema:gamma=0.1,0.2,every=20,40", "mean:last=3")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "5 averages of 6 checkpoints, steps 10 to 90"
    starts = [place for place, line in enumerate(lines) if line.startswith(("every 20", "every 40", "last 3"))]
    assert len(starts) == 3
    assert "4 checkpoints, path length ℓ(T) = " in lines[starts[0]]
    rows = {line.split()[0]: line.split()[1] for line in lines[starts[2] :] if line.startswith("  ")}
    assert rows == {"mean": "···███"}
    rows = {line.split()[0]: line.split()[1] for line in lines[starts[1] : starts[2]] if line.startswith("  ")}
    assert {name: re.sub("[^·]", "x", bars) for name, bars in rows.items()} == {
        "pema-gamma0.1": "x·x··x", "pema-gamma0.2": "x·x··x",
    }  # fmt: skip


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckavg.engine.stream.SECONDS_BETWEEN_NOTES", 0.0)
    monkeypatch.setattr("ckavg.engine.coalescing.SMALL", 0)  # a block for each tensor
    generator = torch.Generator().manual_seed(0)
    weights = [{name: torch.randn(500, generator=generator) for name in "abcdefgh"} for _ in STEPS]
    source = write_run(tmp_path / "run", weights, STEPS)
    runs = [ckavg.open_run(source, every=every) for every in (20, 30)]
    kept: dict[str, int] = {}

    def attempt(stage: str = "") -> None:
        def on_progress(progress: Progress) -> None:
            kept[progress.stage] = progress.kept
            if progress.stage == stage and progress.done > progress.total / 2:
                raise KeyboardInterrupt

        plans = plan_averages([(run, ckavg.PEMA(), tmp_path / "out" / str(len(run.steps))) for run in runs])
        carry_out(plans, Context(device="cpu", threads=1, on_progress=on_progress))

    for stage in ("path", "replay", ""):
        with pytest.raises(KeyboardInterrupt) if stage else nullcontext():
            attempt(stage)
    of_tensor = 5 * 500 * 4  # in the five checkpoints that either of them visits
    assert kept == {"path": 4 * of_tensor, "replay": 4 * of_tensor, "files": 0}
    for run in runs:
        forget(source)
        ckavg.average(run, ckavg.PEMA(), out=tmp_path / "alone" / str(len(run.steps)))
        alone, together = (tmp_path / place / str(len(run.steps)) for place in ("alone", "out"))
        for file in together.glob("*.safetensors"):
            assert file.read_bytes() == (alone / file.name).read_bytes()


def test_results_are_verified_as_others(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, torch.bfloat16)
    for record in swept(run, "pema:every=20,40", "mean:last=3", "bema:burn-in=30,every=20"):
        verified = run_cli("verify", directory(record), "--replay", "--sources")
        assert verified.exit_code == 0, verified.stdout + verified.stderr
