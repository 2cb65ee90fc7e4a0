"""`ckavg path`: the numbers are those of an independent computation, in the table, as JSON and as CSV alike."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import reference
from tests.cli.runner import run_cli, snapshot
from tests.reference import Arrays
from tests.runs import random_run, write_checkpoint, write_run

STEPS = (0, 50, 100, 150)
KEYS = {
    "steps", "anchor_step", "span", "path_length", "path_length_error", "sample", "zero_sigma", "excluded_from_path",
    "parameters_counted", "tensors", "warnings", "bytes_read", "seconds",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    weights = random_run(seed=1, count=4, dtype=torch.bfloat16)
    return write_run(tmp_path / "checkpoints", weights, STEPS, shards=(1, 2))


def told(*arguments: str | Path) -> dict[str, Any]:
    result = run_cli("path", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def floats(run: Path, steps: Sequence[int] = STEPS) -> list[dict[str, reference.Array]]:
    return [reference.load_floats(run / f"checkpoint-{step}") for step in steps]


def own_path(checkpoints: Sequence[Arrays], name: str, epsilon: float = 0.0) -> list[float]:
    """ℓ_{p,k} = (1/numel) Σ_j ‖θ_j,p − θ_{j−1},p‖₁ / σ_p of one tensor."""
    values = [weights[name] for weights in checkpoints]
    spread = float(values[0].std(ddof=1)) if values[0].size > 1 else 0.0
    moves = [np.abs(after - before).mean() / (spread + epsilon) for before, after in pairwise(values)]
    return [float(length) for length in accumulate(moves, initial=0.0)]


def table(file: Path) -> tuple[list[str], list[list[float]]]:
    with file.open(newline="") as opened:
        header, *rows = csv.reader(opened)
    return header, [[float(cell) for cell in row] for row in rows]


def test_json_is_the_reference(run: Path) -> None:
    before = snapshot(run)
    got = told(run)
    checkpoints = floats(run)
    lengths, without_spread, counted = reference.path_length(checkpoints)
    assert got.keys() == KEYS
    assert (got["steps"], got["anchor_step"], got["span"]) == (list(STEPS), 0, 150)
    assert got["path_length"] == pytest.approx(lengths, rel=1e-8)
    assert got["path_length"][0] == 0
    assert (got["path_length_error"], got["sample"], got["zero_sigma"]) == (None, 1.0, "exclude")
    assert (got["excluded_from_path"], got["parameters_counted"]) == (without_spread, counted)
    assert got["bytes_read"] >= sum(values.size * 2 for weights in checkpoints for values in weights.values())
    assert got["seconds"]["path"] > 0
    assert got["tensors"].keys() == {name for name, values in checkpoints[0].items() if values.size}
    for name, tensor in got["tensors"].items():
        assert tensor["numel"] == checkpoints[0][name].size
        if name in without_spread:
            assert (tensor["sigma"], tensor["path_length"]) == (0.0, None)
        else:
            assert tensor["sigma"] == pytest.approx(float(checkpoints[0][name].std(ddof=1)), rel=1e-12)
            assert tensor["path_length"] == pytest.approx(own_path(checkpoints, name), rel=1e-8)
            assert tensor["path_length"][-1] > 0
    (warning,) = got["warnings"]
    assert warning.startswith("No spread at the anchor (σ = 0), so not counted in the path length: 3 tensors (norm,")
    after = snapshot(run)
    assert after.keys() - before.keys() == {"averaged/path.json"}, "kept beside the run, and nothing else changes"
    assert {name: after[name] for name in before} == before
    again = told(run)
    assert again["bytes_read"] == 0
    assert {key: again[key] for key in KEYS - {"bytes_read", "seconds"}} == {
        key: got[key] for key in KEYS - {"bytes_read", "seconds"}
    }


def test_table(run: Path, tmp_path: Path) -> None:
    lengths, _, _ = reference.path_length(checkpoints := floats(run))
    result = run_cli("path", run)
    lines = result.stdout.splitlines()
    assert lines[0] == f"4 checkpoints, steps 0 to 150: 106.7k parameters travelled ℓ(T) = {lengths[-1]:.4f}"
    assert lines[3].split() == ["step", "ℓ"]
    assert [line.split()[:2] for line in lines[4:8]] == [
        [str(step), f"{length:.4f}"] for step, length in zip(STEPS, lengths, strict=True)
    ]
    assert lines[7].endswith("  " + "█" * 32)
    ends = {name: own_path(checkpoints, name)[-1] for name in ("bias", "chunk_and_a_bit", "odd", "tiles")}
    furthest_first = sorted(ends, key=lambda name: -ends[name])
    assert lines[9].split() == ["tensor", "ℓ"]
    assert [line.split()[:2] for line in lines[10:14]] == [[name, f"{ends[name]:.4f}"] for name in furthest_first]
    assert lines[15].startswith("read     ")
    assert "warning: No spread at the anchor (σ = 0)" in result.stderr
    assert run_cli("path", run).stdout.endswith(f"read     0 bytes, all of it cached\nnext     ckavg pema {run}\n")
    for words in (("pema", run), ("sweep", run, "pema", "mean", "--out", tmp_path / "many")):
        result = run_cli(*words)
        assert "pass 1" not in result.stderr
        assert ", cached" in result.stdout


def test_csv_holds_the_numbers_of_the_json(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "path.csv"
    file.write_text("an older table, and a longer one\n" * 100)
    got = told(run, "--csv", file)
    counted = sorted(name for name, tensor in got["tensors"].items() if tensor["path_length"])
    assert file.read_text().splitlines()[0] == ",".join(["step", "path_length", *counted])
    columns = [got["steps"], got["path_length"], *(got["tensors"][name]["path_length"] for name in counted)]
    assert table(file)[1] == [list(row) for row in zip(*columns, strict=True)]
    assert len(counted) == 4


def test_names_in_the_csv(tmp_path: Path) -> None:
    names = ["a,b", 'with "quotes"', "two\nlines", "plain.weight", "path_length"]
    weights = [{name: torch.arange(4.0) + k * place for place, name in enumerate(names)} for k in (1, 2, 3)]
    run = write_run(tmp_path / "run", weights, (0, 1, 2))
    got = told(run, "--csv", tmp_path / "path.csv")
    header, rows = table(tmp_path / "path.csv")
    assert header == ["step", "path_length", *sorted(names)], "whatever is called like a column hides nothing"
    assert [row[1] for row in rows] == got["path_length"]
    assert [row[header.index("a,b")] for row in rows] == got["tensors"]["a,b"]["path_length"]
    assert '"a,b",path_length,plain.weight,' in (tmp_path / "path.csv").read_text()


@pytest.mark.parametrize("place", ["nowhere/path.csv", "checkpoints", "file/path.csv"])
def test_a_csv_that_cannot_be_written(run: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    before = {path.name for path in tmp_path.iterdir()}
    result = run_cli("path", run, "--csv", tmp_path / place, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("error: ") == 1
    assert f"error: {tmp_path / place} cannot be written: " in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("flat", [False, True], ids=["directories", "files"])
def test_a_csv_is_never_put_into_a_checkpoint_or_over_one(tmp_path: Path, flat: bool) -> None:
    run = tmp_path / "run"
    weights = [{"w": torch.arange(4.0) + step} for step in range(3)]
    if flat:
        run.mkdir()
        for step in range(3):
            save_file(weights[step], run / f"step_{step}.safetensors")
    else:
        write_run(run, weights, range(3))
    before = snapshot(run)
    for place in ("step_1.safetensors",) if flat else ("checkpoint-1/path.csv", "checkpoint-1/model.safetensors"):
        result = run_cli("path", run, "--csv", run / place)
        assert (result.exit_code, result.stdout) == (1, "")
        after = snapshot(run)
        assert {name: after[name] for name in after if not name.startswith("averaged")} == before


def test_sample(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "path.csv"
    got = told(run, "--sample", "0.05", "--csv", file)
    exact, _, counted = reference.path_length(floats(run))
    errors = got["path_length_error"]
    assert (got["sample"], got["parameters_counted"]) == (0.05, counted)
    assert errors[0] == 0
    assert all(0 < error < 0.05 * length for error, length in zip(errors[1:], exact[1:], strict=True))
    off = [abs(got["path_length"][place] - exact[place]) for place in range(len(STEPS))]
    assert all(each <= 4 * error for each, error in zip(off, errors, strict=True))
    assert got["bytes_read"] < 0.2 * sum(values.size * 2 for weights in floats(run) for values in weights.values())
    header, rows = table(file)
    assert header[:3] == ["step", "path_length", "standard_error"]
    assert [row[1:3] for row in rows] == [list(pair) for pair in zip(got["path_length"], errors, strict=True)]
    assert not (run / "averaged").exists()
    shown = run_cli("path", run, "--sample", "0.05").stdout.splitlines()
    assert shown[3].split() == ["step", "ℓ", "±"]
    assert [line.split()[2] for line in shown[4:8]] == [f"{error:.4f}" for error in errors]
    assert "estimated from 5 % of each tensor; ± is one standard error" in shown


@pytest.mark.parametrize("fraction", ["0", "-0.1", "1.5", "nan", "inf", "all"])
def test_a_sample_that_is_no_fraction_exits_2(run: Path, fraction: str) -> None:
    result = run_cli("path", run, "--sample", fraction)
    assert result.exit_code == 2
    assert "sample" in result.stderr
    assert not (run / "averaged").exists()


def test_path_exclude(run: Path) -> None:
    got = told(run, "--path-exclude", "til*", "--path-exclude", "bias")
    checkpoints = [{n: v for n, v in each.items() if n not in ("tiles", "bias")} for each in floats(run)]
    lengths, without_spread, counted = reference.path_length(checkpoints)
    assert got["path_length"] == pytest.approx(lengths, rel=1e-8)
    assert got["parameters_counted"] == counted
    assert got["excluded_from_path"] == sorted([*without_spread, "bias", "tiles"])
    assert not {"bias", "tiles"} & got["tensors"].keys()
    assert any(line == "Left out of the path length: 2 tensors (bias, tiles)." for line in got["warnings"])


def test_zero_sigma_eps(run: Path, tmp_path: Path) -> None:
    got = told(run, "--zero-sigma", "eps", "--csv", tmp_path / "path.csv")
    checkpoints = [{name: values for name, values in each.items() if values.size} for each in floats(run)]
    sizes = {name: values.size for name, values in checkpoints[0].items()}
    own = {name: own_path(checkpoints, name, epsilon=1e-8) for name in sizes}
    lengths = [sum(sizes[name] * own[name][place] for name in own) / sum(sizes.values()) for place in range(len(STEPS))]
    assert got["path_length"] == pytest.approx(lengths, rel=1e-8)
    assert (got["zero_sigma"], got["excluded_from_path"]) == ("eps", [])
    assert got["parameters_counted"] == sum(sizes.values())
    for name, tensor in got["tensors"].items():
        assert tensor["path_length"] == pytest.approx(own[name], rel=1e-8)
    assert table(tmp_path / "path.csv")[0] == ["step", "path_length", *sorted(own)]


def test_choices_are_those_of_averaging(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_checkpoint(tmp_path / "base", random_run(seed=9, count=1, dtype=torch.bfloat16)[0])
    got = told(run, "--init", base, "--init-step", "10", "--from-step", "50", "--to-step", "100")
    want, _, _ = reference.path_length([reference.load_floats(base), *floats(run, (50, 100))])
    assert (got["steps"], got["anchor_step"], got["span"]) == ([10, 50, 100], 10, 90)
    assert got["path_length"] == pytest.approx(want, rel=1e-8)
    late = told(run, "--last", "2")
    assert late["path_length"] == pytest.approx(reference.path_length(floats(run, (100, 150)))[0], rel=1e-8)
    assert any(line.startswith("The run begins at step 100") for line in late["warnings"])
    monkeypatch.chdir(run)
    assert told("--every", "100")["steps"] == [0, 100], "of the current directory"


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"w": torch.arange(4.0) * (1 + k)} for k in range(3)], (0, 10, 20))
    result = run_cli("path", run, "--quiet", "--csv", tmp_path / "path.csv")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert (run / "averaged" / "path.json").exists()
    assert len(table(tmp_path / "path.csv")[1]) == 3
    assert told(run, "--quiet")["steps"] == [0, 10, 20]


@pytest.mark.parametrize(("count", "hidden"), [(40, 0), (41, 1), (57, 17)])
def test_more_than_40_checkpoints_are_elided(tmp_path: Path, count: int, hidden: int) -> None:
    weights = [{"w": torch.arange(4.0) + k} for k in range(count)]
    lines = run_cli("path", write_run(tmp_path / "run", weights, range(count))).stdout.splitlines()
    steps = [line.split()[0] for line in lines[4 : lines.index("", 4)]]
    shown = [str(step) for step in range(count)]
    assert steps == ([*shown[:10], "…", *shown[10 + hidden :]] if hidden else shown)
    elided = [line.split() for line in lines if line.split()[:1] == ["…"]]
    assert elided == ([["…", str(hidden), "more"]] if hidden else [])


@pytest.mark.parametrize("count", [17, 18, 30])
def test_many_tensors_are_elided(tmp_path: Path, count: int) -> None:
    weights = [{f"w{place:02}": torch.arange(4.0) + k * place for place in range(count)} for k in (1, 2)]
    lines = run_cli("path", write_run(tmp_path / "run", weights, (0, 1))).stdout.splitlines()
    rows = lines[lines.index("", 3) + 2 : -3]
    names = [f"w{place:02}" for place in reversed(range(count))]
    between = [f"… {count - 16} more between"] if count > 17 else []
    want = [*names[:8], *between, *names[-8:]] if between else names
    assert [row if row.startswith("…") else row.split()[0] for row in map(str.strip, rows)] == want


def test_names_from_files_do_not_command_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x9b31m[bold]w[/bold]"
    flat = "\x1b[2Jflat\r"
    weights = [{evil: torch.arange(4.0) + k, flat: torch.ones(4) + k, "": torch.arange(4.0) + 2 * k} for k in range(2)]
    run = write_run(tmp_path / "run", weights, (0, 1))
    result = run_cli("path", run)
    assert r"\x1b]0;owned\x07\x9b31m[bold]w[/bold]" in result.stdout
    assert r"\x1b[2Jflat\r" in result.stderr
    assert "more between" not in result.stdout, "a tensor without a name is a tensor"
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(result.stdout + result.stderr)
    assert not {"\x1b", "\x07", "\r"} & set(run_cli("path", run, "--json").stdout)


def test_a_name_that_is_no_text_is_no_traceback(tmp_path: Path) -> None:
    """Half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    for step in range(2):
        data = np.arange(4, dtype="<f4") + step
        header = json.dumps({"w\ud800": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
        directory = tmp_path / "run" / f"checkpoint-{step}"
        directory.mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data.tobytes())
    assert run_cli("path", tmp_path / "run", "--csv", tmp_path / "path.csv").exit_code in (0, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_diverged_is_refused_and_nothing_is_kept(run: Path, tmp_path: Path, value: float) -> None:
    weights = random_run(seed=1, count=5, dtype=torch.bfloat16)[-1]
    weights["odd"][0, 0, 0] = value
    write_run(run, [weights], (200,))
    result = run_cli("path", run, "--csv", tmp_path / "path.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "step 200: tensor 'odd' holds NaN or infinity" in result.stderr
    assert not (run / "averaged").exists()
    assert not (tmp_path / "path.csv").exists()


def test_a_run_that_stood_still(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"w": torch.arange(4.0), "b": torch.ones(2)}] * 3, (0, 1, 2))
    assert told(run)["path_length"] == [0.0, 0.0, 0.0]
    assert "travelled ℓ(T) = 0.0000" in run_cli("path", run).stdout
