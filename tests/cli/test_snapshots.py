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
from ckavg.output.owned import LOCAL
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
        got, want = reference.load_floats(output.directory), as_it_stood(checkpoints, visited)
        reference.assert_rounded_once(got, want, checkpoints[:visited], dtype, accumulated=torch.float32)


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "pema-tensor"])
def test_weights_of_its_record_are_those_of_its_tensors(tmp_path: Path, run: Path, name: str) -> None:
    result = ckavg.average(ckavg.open_run(run), SCHEMES[name][0], out=tmp_path / "out", snapshot_every=60)
    checkpoints = [reference.load_floats(run / f"checkpoint-{step}") for step in STEPS]
    for output in result.outputs:
        visited = STEPS.index(output.step) + 1
        weights = record_of(output.directory)["weights"]
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        assert weights[visited:] == [0.0] * (len(STEPS) - visited)
        assert weights[visited - 1] != 0
        want = {
            tensor: np.tensordot(weights, np.stack([each[tensor] for each in checkpoints]), axes=1)
            for tensor in checkpoints[0]
        }
        got = reference.load_floats(output.directory)
        reference.assert_rounded_once(got, want, checkpoints[:visited], torch.bfloat16, accumulated=torch.float32)


@pytest.mark.parametrize("verb", ["pema", "bema", "dema", "mean"])
def test_the_result_is_the_same_to_the_byte(run: Path, tmp_path: Path, verb: str) -> None:
    for out, options in (("with", ("--snapshot-every", "60")), ("without", ())):
        assert run_cli(verb, run, "--out", tmp_path / out, *options, "-q").exit_code == 0
    assert weight_files(tmp_path / "with") == weight_files(tmp_path / "without")
    assert len(weight_files(tmp_path / "with")) == 2
    assert files_of(tmp_path / "with") == files_of(tmp_path / "without")
    card = "README.md"
    assert (tmp_path / "with" / card).read_text() == (tmp_path / "without" / card).read_text().replace(
        "# without", "# with"
    )


def test_outputs_are_listed_in_the_order_of_their_steps(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_cli("bema", run, "--snapshot-every", "60", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    outputs = json.loads(result.stdout)["outputs"]
    assert [(each["name"], each["step"], each["directory"]) for each in outputs] == [
        ("checkpoint-60", 60, str(out / "checkpoint-60")),
        ("checkpoint-120", 120, str(out / "checkpoint-120")),
        ("out", 150, str(out)),
    ]
    for each in outputs:
        assert each["files"] == files_of(Path(each["directory"]))
    assert placeless(record_of(out)) == placeless(json.loads(result.stdout))
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["checkpoint-120", "checkpoint-60"]


def test_each_is_a_checkpoint_of_its_own(run: Path) -> None:
    out = Path(json.loads(run_cli("pema", run, "--snapshot-every", "60", "--json").stdout)["outputs"][-1]["directory"])
    whole = record_of(out)
    for step in WRITTEN:
        directory = out / f"checkpoint-{step}"
        assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "bfloat16"
        placed = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        assert all(name in load_file(directory / file) for name, file in placed.items())
        assert placed.keys() == weights_of(step).keys()
        record = record_of(directory)
        (output,) = record.pop("outputs")
        assert (output["step"], output["directory"], record.pop("source")) == (step, ".", "../../..")
        assert record.pop("weights") != whole["weights"]
        assert record == {key: value for key, value in whole.items() if key not in ("outputs", "weights", "source")}


def test_what_is_not_floating_comes_from_the_checkpoint_of_that_step(run: Path, tmp_path: Path) -> None:
    result = ckavg.average(ckavg.open_run(run), ckavg.EMA(), out=tmp_path / "out", snapshot_every=60)
    for output in result.outputs:
        stored: dict[str, torch.Tensor] = {}
        for file in output.directory.glob("*.safetensors"):
            stored |= load_file(file)
        for name in ("position_ids", "mask"):
            assert torch.equal(stored[name], weights_of(output.step)[name])


@pytest.mark.parametrize("verb", ["pema", "bema"])
def test_the_command_of_its_card_makes_it_again(run: Path, tmp_path: Path, verb: str) -> None:
    run_cli(verb, run, "--snapshot-every", "30", "--out", tmp_path / "out", "-q")
    card = (tmp_path / "out" / "checkpoint-120" / "README.md").read_text()
    assert "# checkpoint-120\n" in card
    assert "The average of 5 checkpoints of one training run, from step 0 to step\n120, as it stood" in card
    command = next(line for line in card.splitlines() if line.startswith(f"    ckavg {verb} "))
    _, *words = shlex.split(command)
    again = json.loads(run_cli(*words[:1], run, *words[1:], "--out", tmp_path / "again", "--json").stdout)
    assert [each["step"] for each in again["outputs"]] == [120, 150]
    assert weight_files(tmp_path / "again" / "checkpoint-120") == weight_files(tmp_path / "out" / "checkpoint-120")


def test_dtype_is_that_of_the_result(run: Path, tmp_path: Path) -> None:
    run_cli("mean", run, "--snapshot-every", "60", "--dtype", "float32", "--out", tmp_path / "out", "-q")
    directory = tmp_path / "out" / "checkpoint-60"
    tensors = [tensor for file in directory.glob("*.safetensors") for tensor in load_file(file).values()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("words", "every", "written"),
    [
        (("ema",), 100, [100, 200]),
        (("ema",), 50, [100, 150, 200]),
        (("ema", "--every", "100"), 150, [150]),
        (("ema", "--last", "3"), 200, [200]),
        (("bema", "--burn-in", "100"), 50, [150, 200]),
        (("mean",), 100, [100, 200]),
    ],
)
def test_multiples_are_of_the_optimizer_step(
    tmp_path: Path, words: Sequence[str], every: int, written: list[int]
) -> None:
    """Of the trainer's count of them, not of the distance from the anchor at step 50."""
    steps = (50, 100, 150, 200, 250)
    source = write_run(tmp_path / "run", random_run(seed=2, count=5, dtype=torch.float32), steps)
    record = json.loads(run_cli(words[0], source, *words[1:], "--snapshot-every", str(every), "--json").stdout)
    assert [each["step"] for each in record["outputs"]] == [*written, 250]


@pytest.mark.parametrize(("verb", "written"), [("ema", [50, 100]), ("mean", [100])])
def test_with_a_base_model(tmp_path: Path, verb: str, written: list[int]) -> None:
    """The mean begins with the first checkpoint of the run, which is no average yet."""
    weights = random_run(seed=3, count=4, dtype=torch.float32)
    base = write_checkpoint(tmp_path / "base", weights[0])
    source = write_run(tmp_path / "run", weights[1:], (50, 100, 150))
    record = json.loads(run_cli(verb, source, "--init", base, "--snapshot-every", "50", "--json").stdout)
    assert [each["step"] for each in record["outputs"]] == [*written, 150]


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
@pytest.mark.parametrize("words", [("mean",), ("sweep", "mean", "ema")], ids=lambda words: words[0])
def test_nothing_to_write_exits_2(run: Path, words: tuple[str, ...], every: str, told: str) -> None:
    result = run_cli(words[0], run, *words[1:], "--snapshot-every", every)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (run / "averaged").exists()


def test_snapshots_of_a_sweep_are_those_of_the_single_commands(run: Path, tmp_path: Path) -> None:
    verbs = {"pema": "pema-gamma0.15", "bema": "bema-eta0.2", "dema": "dema-kappa0.5", "mean": "mean"}
    result = run_cli("sweep", run, *verbs, "--snapshot-every", "60", "--json")
    assert result.exit_code == 0, result.stderr
    for verb, record in zip(verbs, json.loads(result.stdout)["averages"], strict=True):
        swept, alone = run / "averaged" / verbs[verb], tmp_path / verb
        assert [each["directory"] for each in record["outputs"]] == [
            *(str(swept / f"checkpoint-{step}") for step in WRITTEN),
            str(swept),
        ]
        run_cli(verb, run, "--snapshot-every", "60", "--out", alone, "-q")
        for place in (*(f"checkpoint-{step}" for step in WRITTEN), "."):
            assert weight_files(swept / place) == weight_files(alone / place)
            assert record_of(swept / place)["weights"] == record_of(alone / place)["weights"]


def test_last_beside_other_averages_of_a_sweep_is_no_obstacle(run: Path) -> None:
    """The last checkpoint has no way to be seen on; the averages it is compared with have."""
    result = run_cli("sweep", run, "ema", "last", "--snapshot-every", "60", "-q")
    assert result.exit_code == 0, result.stderr
    assert (run / "averaged" / "ema-gamma0.15" / "checkpoint-60").is_dir()


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


def test_dry_run_lists_them_and_counts_their_bytes(run: Path, tmp_path: Path) -> None:
    words = ("mean", run, "--snapshot-every", "60", "--out", tmp_path / "out")
    before = snapshot(tmp_path)
    shown = run_cli(*words, "--dry-run").stdout
    planned = json.loads(run_cli(*words, "--dry-run", "--json").stdout)
    assert snapshot(tmp_path) == before
    assert "             checkpoint-60/\n             checkpoint-120/\n" in shown
    done = json.loads(run_cli(*words, "--json").stdout)
    done["outputs"][-1]["files"].remove("ckavg.svg")  # of the card, and only where matplotlib is installed
    assert planned["outputs"] == [
        {key: value for key, value in output.items() if key != "sha256"} for output in done["outputs"]
    ]
    assert planned["bytes_to_read"] == done["bytes_read"]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert planned["bytes_to_write"] == sum(
        path.stat().st_size for path in written if path.name not in ("README.md", "ckavg.json", "ckavg.svg", LOCAL)
    )


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


@pytest.mark.parametrize("verb", ["pema", "bema"])
def test_a_failure_leaves_nothing(run: Path, verb: str) -> None:
    weights = weights_of(150)
    weights["odd"][0, 0, 0] = float("nan")
    write_run(run, [weights], (180,))
    result = run_cli(verb, run, "--snapshot-every", "60")
    assert result.exit_code == 1
    assert "step 180: tensor 'odd' holds NaN" in result.stderr
    assert not (run / "averaged").exists()


def test_a_snapshot_that_does_not_fit_its_dtype_is_refused(tmp_path: Path) -> None:
    values = (0.0, 1e6, -1e6, 0.0)
    run = write_run(tmp_path / "run", [{"w": torch.tensor([value, 1.0])} for value in values], range(4))
    assert run_cli("mean", run, "--dtype", "float16", "--dry-run").exit_code == 0
    result = run_cli("mean", run, "--dtype", "float16", "--snapshot-every", "1")
    assert result.exit_code == 1
    assert "a value of the average does not fit F16" in result.stderr
    assert not (run / "averaged").exists()
    assert run_cli("mean", run, "--dtype", "float16").exit_code == 0


def test_summary_names_their_steps(run: Path) -> None:
    shown = run_cli("ema", run, "--snapshot-every", "60").stdout
    assert "also     checkpoint-STEP in it, the average as of step 60, 120\n" in shown
    assert "also" not in run_cli("ema", run, "--force").stdout
