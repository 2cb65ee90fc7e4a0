"""The model of large runs: its arithmetic, and that its program measures and plans what it says it does."""

from __future__ import annotations

import doctest
import importlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

import ckavg
from benchmarks.costs import Costs, PassCosts, Planned
from benchmarks.measure import Measured
from benchmarks.scale import MACHINES, pass_terms, seconds_of
from benchmarks.sparse import RECORD, Built, build, experts
from ckavg.averaging.reading import readings

NVME, LUSTRE, *OBJECTS = MACHINES
SMALL = experts("small", layers=3, of_layer=4, hidden=64, intermediate=32, shards=5)
COSTS = PassCosts(byte=1e-9, tile=5e-5, block=2e-4)


@pytest.mark.parametrize("name", ["sparse", "scale"])
def test_the_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert results.attempted > results.failed == 0


def test_a_sparse_run_is_what_its_headers_say_and_takes_no_disk(tmp_path: Path) -> None:
    built = build(tmp_path / "run", SMALL, checkpoints=3)
    run = ckavg.open_run(tmp_path / "run")
    assert (len(run.checkpoints), len(run.last.shards), len(run.tensors)) == (3, built.files, built.tensors)
    assert {name: entry.shape for name, entry in run.tensors.items()} == dict(SMALL.tensors)
    (reading,) = readings([ckavg.plan_average(run, ckavg.Mean())])
    assert reading.replay_bytes == 3 * built.nbytes
    files = [path for path in (tmp_path / "run").glob("*/*.safetensors") if path.stat().st_size > 1 << 20]
    assert files
    assert all(path.stat().st_blocks * 512 < path.stat().st_size / 8 for path in files)
    for path in files:
        with safe_open(path, "pt") as file:  # by those who define the format
            assert set(file.keys()) <= set(dict(SMALL.tensors))


def test_a_filled_run_can_be_averaged(tmp_path: Path) -> None:
    build(tmp_path / "run", SMALL, checkpoints=2, filled=True)
    lengths = ckavg.path_length(ckavg.open_run(tmp_path / "run")).lengths
    assert lengths[1] == pytest.approx(2 / 3**0.5, rel=0.02)  # E|x − y| = w/3 of a uniform width w, σ = w/√12


def test_nothing_else_is_replaced_by_a_sparse_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(FileExistsError, match="not a sparse run"):
        build(tmp_path / "run", SMALL, checkpoints=2)
    (tmp_path / "run" / RECORD).touch()
    build(tmp_path / "run", SMALL, checkpoints=2)


def test_the_term_that_dominates() -> None:
    large = Built("", 40, files=30, tensors=723, tiles=270_000, blocks=17_000, nbytes=141_000_000_000, header_bytes=0)
    assert pass_terms(NVME, large, COSTS)["storage"] == pytest.approx(40 * 141 / 25)
    assert pass_terms(NVME, large, COSTS)["cores"] == pytest.approx(40 * 141 / 64, rel=0.05)
    assert pass_terms(LUSTRE, large, COSTS)["storage"] == pytest.approx(40 * 141 / 100)
    piece = (384 << 20) / 160
    of_one = 40 * 141e9 / piece * (0.05 + piece / 80e6) / (16 * 8)
    assert pass_terms(OBJECTS[0], large, COSTS)["requests"] == pytest.approx(of_one)
    many = replace(large, tiles=10_000_000, blocks=10_000_000, nbytes=1_000_000_000)
    planned = Planned(many, Measured(1, 1, 1, ""), Measured(9, 1, 1, "", cpu_seconds=3.0), 10**9)
    costs = Costs(COSTS, dict.fromkeys(("pema", "bema", "mean"), COSTS), 1e-9)
    one, two = (seconds_of(NVME, planned, scheme, costs) for scheme in ("mean", "pema"))
    assert (one[1], two[1]) == ("interpreter", "interpreter")
    interpreter = (40 * 10_000_000 * 5e-5 + 10_000_000 * 2e-4) / 8
    assert two[0] - one[0] == pytest.approx(interpreter)
    assert one[0] == pytest.approx(3 + 1200 * 1e-5 + interpreter + 1e9 / 12e9)


@pytest.mark.exhaustive
def test_the_program(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 20e9:
        pytest.skip("too little room for a result of 16 GB, which is planned and not written")
    small = ("--models", "8B", "--megabytes", "16", "--tensors", "50", "--repeats", "1")
    command = [sys.executable, "-m", "benchmarks.scale", *small, "--directory", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for machine in MACHINES:
        assert machine.name in printed
    assert "8B × 40 pema" in printed
    assert not any(tmp_path.iterdir())


def test_what_measures_is_small() -> None:
    program = "import sys, benchmarks.scale; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
