"""The average as it stood on the way: the right weights, complete checkpoints, and the result as if they were not."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ckavg
from ckavg.output.output_path import LOCAL
from ckavg.schemes import Scheme
from tests import reference
from tests.cli.runner import placeless, run_cli, snapshot, visible
from tests.reference import Array, Arrays
from tests.runs import random_run, write_checkpoint, write_run

STEPS = (0, 30, 60, 100, 120, 150)
WRITTEN = (60, 120)
AsItStood = Callable[[Sequence[Arrays], int], dict[str, Array]]
"""From all checkpoints of the run, and how many of them were visited by then."""


def _pema(run: Sequence[Arrays], visited: int, gamma: float = 0.15) -> dict[str, Array]:
    lengths, _, _ = reference.path_length(run)
    betas = [(1 + STEPS[-1] * lengths[-1] * length) ** -gamma for length in lengths[1:visited]]
    return reference.weighted(run[:visited], betas)


def _pema_by_tensor(run: Sequence[Arrays], visited: int) -> dict[str, Array]:
    whole, _, _ = reference.path_length(run)
    average: dict[str, Array] = {}
    for name in run[0]:
        only = [{name: weights[name]} for weights in run]
        own, _, counted = reference.path_length(only)
        shape = [each / own[-1] for each in own] if counted else [each / whole[-1] for each in whole]
        betas = [(1 + STEPS[-1] * whole[-1] ** 2 * each) ** -0.15 for each in shape[1:visited]]
        average |= reference.weighted(only[:visited], betas)
    return average


def _minus_sqrt(run: Sequence[Arrays], visited: int) -> dict[str, Array]:
    """The weights of the whole run's decay, over the checkpoints visited by then."""
    rates = 1 - np.sqrt(np.arange(len(run)) / len(run))
    weights = -np.diff([*rates, 0.0])[:visited]
    weights /= weights.sum()
    return {name: np.tensordot(weights, np.stack([each[name] for each in run[:visited]]), axes=1) for name in run[0]}


SCHEMES: Mapping[str, tuple[Scheme, AsItStood]] = {
    "pema": (ckavg.PEMA(), _pema),
    "pema-strong": (ckavg.PEMA(gamma=0.5), lambda run, visited: _pema(run, visited, 0.5)),
    "pema-tensor": (ckavg.PEMA(scope="tensor"), _pema_by_tensor),
    "ema": (ckavg.EMA(), lambda run, visited: reference.ema(run[:visited], STEPS[:visited])),
    "bema": (ckavg.BEMA(), lambda run, visited: reference.bema(run[:visited], STEPS[:visited])),
    "bema-burn-in": (
        ckavg.BEMA(burn_in=20),
        lambda run, visited: reference.bema(run[:visited], STEPS[:visited], burn_in=20),
    ),
    "ouema": (ckavg.OUEMA(), lambda run, visited: reference.ouema(run[:visited], STEPS[:visited])),
    "dema": (ckavg.DEMA(), lambda run, visited: reference.dema(run[:visited], STEPS[:visited])),
    "mean": (ckavg.Mean(), lambda run, visited: reference.mean(run[:visited])),
    "mean-minus-sqrt": (ckavg.Mean(decay="minus-sqrt"), _minus_sqrt),
}


def weights_of(step: int) -> dict[str, torch.Tensor]:
    return random_run(seed=1, count=len(STEPS), dtype=torch.bfloat16)[STEPS.index(step)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    weights = random_run(seed=1, count=len(STEPS), dtype=torch.bfloat16)
    return write_run(tmp_path / "checkpoints", weights, STEPS, shards=(3, 1, 2))


def record_of(directory: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((directory / "ckavg.json").read_text())
    return record


def files_of(directory: Path) -> list[str]:
    return sorted(name for name in visible(directory) if (directory / name).is_file())


def weight_files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_average_as_it_stood_rounded_once(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    scheme, as_it_stood = SCHEMES[name]
    weights = random_run(seed=len(name), count=len(STEPS), dtype=dtype)
    source = write_run(tmp_path / "run", weights, STEPS, shards=(3, 1, 2))
    checkpoints = [reference.load_floats(source / f"checkpoint-{step}") for step in STEPS]

    result = ckavg.average(ckavg.open_run(source), scheme, out=tmp_path / "out", snapshot_every=60)

    assert [output.step for output in result.outputs] == [*WRITTEN, 150]
    for output in result.outputs:
        visited = STEPS.index(output.step) + 1
        got, stood = reference.load_floats(output.directory), as_it_stood(checkpoints, visited)
        reference.assert_rounded_once(got, stood, checkpoints[:visited], dtype, accumulated=torch.float32)
        stored: dict[str, torch.Tensor] = {}
        for file in output.directory.glob("*.safetensors"):
            stored |= load_file(file)
        for copied in ("position_ids", "mask"):
            assert torch.equal(stored[copied], weights[visited - 1][copied]), "what is not floating is of that step"
        effective = record_of(output.directory)["weights"]
        assert sum(effective) == pytest.approx(1, abs=1e-12)
        assert effective[visited:] == [0.0] * (len(STEPS) - visited)
        assert effective[visited - 1] != 0
        if name != "pema-tensor":  # whose weights are those of the whole model
            told = {
                tensor: np.tensordot(effective, np.stack([each[tensor] for each in checkpoints]), axes=1)
                for tensor in checkpoints[0]
            }
            reference.assert_rounded_once(got, told, checkpoints[:visited], dtype, accumulated=torch.float32)


def test_outputs_are_complete_and_listed_in_order(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("bema", run, "--snapshot-every", "60", "--out", out)
    before = snapshot(tmp_path)
    assert "             checkpoint-60/\n             checkpoint-120/\n" in run_cli(*words, "--dry-run").stdout
    planned = json.loads(run_cli(*words, "--dry-run", "--json").stdout)
    assert snapshot(tmp_path) == before
    result = run_cli(*words, "--json")
    assert result.exit_code == 0, result.stderr
    done = json.loads(result.stdout)
    assert [(each["name"], each["step"], each["directory"]) for each in done["outputs"]] == [
        ("checkpoint-60", 60, str(out / "checkpoint-60")),
        ("checkpoint-120", 120, str(out / "checkpoint-120")),
        ("out", 150, str(out)),
    ]
    for each in done["outputs"]:
        assert each["files"] == files_of(Path(each["directory"]))
    assert placeless(record_of(out)) == placeless(done)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["checkpoint-120", "checkpoint-60"]
    assert planned["outputs"] == [
        {key: value for key, value in output.items() if key not in ("sha256", "discarded_energy")}
        for output in done["outputs"]
    ]
    assert planned["bytes_to_read"] == done["bytes_read"]
    written = [path for path in out.rglob("*") if path.is_file()]
    uncounted = ("README.md", "ckavg.json", LOCAL)
    assert planned["bytes_to_write"] == sum(path.stat().st_size for path in written if path.name not in uncounted)
    shown = run_cli(*words, "--force").stdout
    assert "also     checkpoint-STEP in it, the average as of step 60, 120\n" in shown


@pytest.mark.parametrize("verb", ["pema", "bema", "dema", "mean"])
def test_the_result_is_the_same_to_the_byte(run: Path, tmp_path: Path, verb: str) -> None:
    for out, options in (("with", ("--snapshot-every", "60")), ("without", ())):
        assert run_cli(verb, run, "--out", tmp_path / out, *options, "-q").exit_code == 0
    assert weight_files(tmp_path / "with") == weight_files(tmp_path / "without")
    assert len(weight_files(tmp_path / "with")) == 2
    assert files_of(tmp_path / "with") == files_of(tmp_path / "without")
    cards = [(tmp_path / out / "README.md").read_text() for out in ("with", "without")]
    assert cards[0] == cards[1].replace("# without", "# with")


def test_each_is_a_checkpoint_of_its_own(run: Path) -> None:
    words = ("pema", run, "--snapshot-every", "60", "--dtype", "float32", "--json")
    out = Path(json.loads(run_cli(*words).stdout)["outputs"][-1]["directory"])
    whole = record_of(out)
    for step in WRITTEN:
        directory = out / f"checkpoint-{step}"
        assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "float32"
        placed = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = {name: load_file(directory / file)[name] for name, file in placed.items()}
        assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
        assert placed.keys() == weights_of(step).keys()
        record = record_of(directory)
        (output,) = record.pop("outputs")
        assert (output["step"], output["directory"], record.pop("source")) == (step, ".", "../../..")
        of_weights = ("weights", "effective_count", "mean_age", "anchor_weight")
        assert all(record.pop(key) != whole[key] for key in of_weights)
        assert record == {key: value for key, value in whole.items() if key not in ("outputs", "source", *of_weights)}


@pytest.mark.parametrize("verb", ["pema", "bema"])
def test_the_command_of_its_card_makes_it_again(run: Path, tmp_path: Path, verb: str) -> None:
    run_cli(verb, run, "--snapshot-every", "30", "--out", tmp_path / "out", "-q")
    card = (tmp_path / "out" / "checkpoint-120" / "README.md").read_text()
    assert "# checkpoint-120\n" in card
    what = "The weighted average of 5 checkpoints of one training run, from step 0 to step\n120, a snapshot on the way"
    assert what in card
    command = next(line for line in card.splitlines() if line.startswith(f"    ckavg {verb} "))
    _, *words = shlex.split(command)
    again = json.loads(run_cli(*words[:1], run, *words[1:], "--out", tmp_path / "again", "--json").stdout)
    assert [each["step"] for each in again["outputs"]] == [120, 150]
    assert weight_files(tmp_path / "again" / "checkpoint-120") == weight_files(tmp_path / "out" / "checkpoint-120")


@pytest.mark.parametrize(
    ("words", "every", "written"),
    [
        ("ema", 100, [100, 200]),
        ("ema", 50, [100, 150, 200]),
        ("ema --every 100", 150, [150]),
        ("ema --last 3", 200, [200]),
        ("bema --burn-in 100", 50, [150, 200]),
        ("mean", 100, [100, 200]),
        ("ema --init base", 50, [50, 100, 150, 200]),
        ("mean --init base", 50, [100, 150, 200]),  # it begins with the first checkpoint of the run: no average yet
    ],
)
def test_multiples_are_of_the_optimizer_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, every: int, written: list[int]
) -> None:
    """Of the trainer's count of them, not of the distance from the anchor at step 50."""
    monkeypatch.chdir(tmp_path)
    weights = random_run(seed=2, count=6, dtype=torch.float32)
    write_checkpoint(tmp_path / "base", weights[5])
    write_run(tmp_path / "run", weights[:5], (50, 100, 150, 200, 250))
    verb, *options = words.split()
    record = json.loads(run_cli(verb, "run", *options, "--snapshot-every", str(every), "--json").stdout)
    assert [each["step"] for each in record["outputs"]] == [*written, 250]


@pytest.mark.parametrize(
    ("every", "told"),
    [
        (
            "1000",
            "no checkpoint between step 0, where the average begins, and step 150, where it ends, is at a multiple",
        ),
        ("7", "is at a multiple of 7"),
        ("150", "is at a multiple of 150"),
        ("0", "snapshot-every"),
        ("-60", "snapshot-every"),
        ("1.5", "snapshot-every"),
    ],
)
@pytest.mark.parametrize("words", ["mean", "sweep mean ema"])
def test_nothing_to_write_exits_2(run: Path, words: str, every: str, told: str) -> None:
    verb, *schemes = words.split()
    result = run_cli(verb, run, *schemes, "--snapshot-every", every)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (run / "averaged").exists()


def test_snapshots_of_a_sweep_are_those_of_the_single_commands(run: Path, tmp_path: Path) -> None:
    verbs = {"pema": "pema-gamma0.15", "bema": "bema-eta0.2", "dema": "dema-kappa0.5", "mean": "mean"}
    result = run_cli("sweep", run, *verbs, "last", "--snapshot-every", "60", "--json")  # of the last one there is none
    assert result.exit_code == 0, result.stderr
    for verb, record in zip(verbs, json.loads(result.stdout)["averages"], strict=False):
        swept, alone = run / "averaged" / verbs[verb], tmp_path / verb
        places = [*(f"checkpoint-{step}" for step in WRITTEN), "."]
        assert [each["directory"] for each in record["outputs"]] == [str(swept / place) for place in places]
        run_cli(verb, run, "--snapshot-every", "60", "--out", alone, "-q")
        for place in places:
            assert weight_files(swept / place) == weight_files(alone / place)
            assert record_of(swept / place)["weights"] == record_of(alone / place)["weights"]


def test_a_result_with_snapshots_is_never_a_run(run: Path, tmp_path: Path) -> None:
    run_cli("ema", run, "--snapshot-every", "60", "--out", run / "checkpoint-999", "-q")
    run_cli("ema", run, "--snapshot-every", "60", "--out", tmp_path / "out", "-q")
    for result in (run / "checkpoint-999", tmp_path / "out"):
        for verb in ("inspect", "pema"):
            refused = run_cli(verb, result)
            assert refused.exit_code == 1
            assert "is one checkpoint, not a directory of checkpoints" in refused.stderr
    inspected = json.loads(run_cli("inspect", run, "--json").stdout)
    assert [each["step"] for each in inspected["checkpoints"]] == list(STEPS)


def test_force_replaces_them_too(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_cli("mean", run, "--snapshot-every", "60", "--out", out, "-q")
    before = snapshot(out)
    assert run_cli("mean", run, "--out", out, "-q").exit_code == 1
    assert snapshot(out) == before
    assert run_cli("mean", run, "--out", out, "--force", "-q").exit_code == 0
    assert sorted(visible(out)) == files_of(out)
    assert run_cli("mean", run, "--snapshot-every", "100", "--out", out, "--force", "-q").exit_code == 0
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["checkpoint-100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "out"]


@pytest.mark.parametrize("words", ["pema --snapshot-every 60", "bema --snapshot-every 60", "sweep bema mean dema"])
def test_a_failure_leaves_nothing(run: Path, words: str) -> None:
    weights = weights_of(150)
    weights["odd"][0, 0, 0] = float("nan")
    write_run(run, [weights], (180,))
    verb, *more = words.split()
    result = run_cli(verb, run, *more)
    assert result.exit_code == 1
    assert "step 180: tensor 'odd' holds NaN" in result.stderr
    assert not (run / "averaged").exists()


def test_a_snapshot_that_does_not_fit_its_dtype_is_refused(tmp_path: Path) -> None:
    values = (0.0, 1e6, -1e6, 0.0)
    run = write_run(tmp_path / "run", [{"w": torch.tensor([value, 1.0])} for value in values], range(4))
    result = run_cli("mean", run, "--dtype", "float16", "--snapshot-every", "1")
    assert result.exit_code == 1
    assert "a value of the average does not fit F16" in result.stderr
    assert not (run / "averaged").exists()
    assert run_cli("mean", run, "--dtype", "float16").exit_code == 0
