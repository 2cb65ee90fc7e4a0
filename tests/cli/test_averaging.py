"""What the averaging verbs and `sweep` print and write: that of the library, however it is asked for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import ckavg
from ckavg.cli.app import app
from ckavg.cli.verbs import Verb
from ckavg.schemes import Scheme
from tests.cli.runner import placeless, run_cli, snapshot
from tests.runs import random_run, write_run

STEPS = (0, 50, 100, 150)
CONTRACT = {
    "scheme", "parameters", "ckavg_version", "steps", "anchor_step", "span", "path_length", "betas", "alphas",
    "weights", "excluded_from_path", "parameters_counted", "warnings", "outputs", "bytes_read", "seconds",
}  # fmt: skip
"""The keys that scripts may rely on."""

VOLATILE = {"outputs", "seconds", "bytes_read", "path_kernel"}
CASES: dict[str, tuple[str, str, Scheme]] = {
    "pema-gamma0.15": ("pema", "pema", ckavg.PEMA()),
    "pema-gamma0.3": ("pema --gamma 0.3", "pema:gamma=0.3", ckavg.PEMA(gamma=0.3)),
    "pema-gamma0.15-scopetensor-pairingnext-clockupdates": (
        "pema --scope tensor --pairing next --clock updates",
        "pema:scope=tensor,pairing=next,clock=updates",
        ckavg.PEMA(scope="tensor", pairing="next", clock="updates"),
    ),
    "ema-gamma0.15": ("ema", "ema", ckavg.EMA()),
    "ema-gamma1-tau5": ("ema --gamma 1 --tau 5", "ema:gamma=1,tau=5", ckavg.EMA(gamma=1.0, tau=5.0)),
    "ema-momentum0.99": ("ema --momentum 0.99", "ema:momentum=0.99", ckavg.MomentumEMA(momentum=0.99)),
    "ema-momentum0.9-momentum-perupdate-batch-scale2": (
        "ema --momentum 0.9 --momentum-per update --batch-scale 2",
        "ema:momentum=0.9,momentum-per=update,batch-scale=2",
        ckavg.MomentumEMA(momentum=0.9, momentum_per="update", batch_scale=2.0),
    ),
    "bema-eta0.2": ("bema", "bema", ckavg.BEMA()),
    "bema-eta0.4-kappa0.6-multiplier2-lag5-burn-in50": (
        "bema --eta 0.4 --kappa 0.6 --multiplier 2 --lag 5 --burn-in 50",
        "bema:eta=0.4,kappa=0.6,multiplier=2,lag=5,burn-in=50",
        ckavg.BEMA(eta=0.4, kappa=0.6, multiplier=2.0, lag=5.0, burn_in=50),
    ),
    "bema-eta0.2-formauthor": ("bema --form author", "bema:form=author", ckavg.BEMA(form="author")),
    "bema-etainf": ("bema --no-bias-correction", "bema:eta=inf", ckavg.BEMA(eta=math.inf)),
    "ouema-eta0.3": ("ouema --eta 0.3", "ouema:eta=0.3", ckavg.OUEMA(eta=0.3)),
    "dema-kappa0.5": ("dema", "dema", ckavg.DEMA()),
    "dema-kappa0.5-burn-in50": ("dema --burn-in 50", "dema:burn-in=50", ckavg.DEMA(burn_in=50)),
    "power-sigma-rel0.05": ("power --sigma-rel 0.05", "power:sigma-rel=0.05", ckavg.PowerEMA(sigma_rel=0.05)),
    "power-exponent2": ("power --exponent 2", "power:exponent=2", ckavg.PowerExponentEMA(exponent=2.0)),
    "mean": ("mean", "mean", ckavg.Mean()),
    "mean-decayminus-sqrt": ("mean --decay minus-sqrt", "mean:decay=minus-sqrt", ckavg.Mean(decay="minus-sqrt")),
}
"""By the name of the result: the command, the word of a sweep, the scheme."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "checkpoints", random_run(seed=1, count=4, dtype=torch.float32), STEPS, shards=(2,))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is only read, or written into once."""
    weights = random_run(seed=1, count=4, dtype=torch.bfloat16)
    return write_run(tmp_path_factory.mktemp("own") / "checkpoints", weights, STEPS, shards=(2,))


def of_library(own: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The result that the library makes, and its record."""
    out = own.parent / "library" / name
    if not out.exists():
        ckavg.average(ckavg.open_run(own), CASES[name][2], out=out)
    return out, json.loads((out / "ckavg.json").read_text())


def assert_same(record: dict[str, Any], name: str, own: Path) -> None:
    """What a command printed and wrote is what the library makes, to the byte."""
    (output,) = record["outputs"]
    directory, (expected, known) = Path(output["directory"]), of_library(own, name)
    assert placeless(json.loads((directory / "ckavg.json").read_text())) == placeless(record)
    volatile = VOLATILE | {"inputs", "source"}
    assert {key: value for key, value in record.items() if key not in volatile} == {
        key: value for key, value in known.items() if key not in volatile
    }
    assert {file.name for file in directory.iterdir()} == {file.name for file in expected.iterdir()}
    for file in expected.glob("*[!d].*[!d]"):
        if not file.name.endswith(("ckavg.json", ".ckavg-local.json", ".md")):
            assert (directory / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", CASES)
def test_a_command_makes_what_the_library_makes(own: Path, tmp_path: Path, name: str) -> None:
    verb, *options = CASES[name][0].split()
    result = run_cli(verb, own, *options, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record.keys() >= CONTRACT
    assert record["outputs"][0]["step"] == 150
    assert set(record["seconds"]) == {"path", "replay", "total"}
    assert_same(record, name, own)


def test_a_sweep_makes_all_of_them_from_one_reading(own: Path) -> None:
    (own / "averaged" / "path.json").unlink(missing_ok=True)
    result = run_cli("sweep", own, *(word for _, word, _ in CASES.values()), "--json")
    assert result.exit_code == 0, result.stderr
    records = json.loads(result.stdout)["averages"]
    assert [record["outputs"][0]["directory"] for record in records] == [str(own / "averaged" / name) for name in CASES]
    for record, name in zip(records, CASES, strict=True):
        assert_same(record, name, own)
    (own / "averaged" / "path.json").unlink()
    alone = json.loads(run_cli("pema", own, "--out", own.parent / "alone", "--json").stdout)
    assert {record["bytes_read"] for record in records} == {alone["bytes_read"]}


def test_a_verb_is_made_from_its_schemes() -> None:
    group: Any = typer.main.get_command(app)
    for verb in group.commands.values():
        assert isinstance(verb, Verb)
        loaded = verb.load()
        assert str(loaded.help).startswith(str(verb.help).partition("\n\n")[0]), "as ckavg --help says it"
    shown = run_cli("pema", "--help").stdout
    for part in (
        "Pathwise EMA: forget by how far",
        "β_k = (1 + T",
        "Reads every checkpoint twice",
        "larger values average",
    ):
        assert part in shown


def test_a_batch_that_grows(run: Path) -> None:
    """An option for each change; a sweep would take the comma for another value."""
    words = ("--momentum", "0.99", "--batch-scale", "1", "--batch-scale", "60:4")
    record = json.loads(run_cli("ema", run, *words, "--json").stdout)
    assert record["outputs"][0]["name"] == "ema-momentum0.99-batch-scale1-60x4"
    assert record["betas"][1:] == pytest.approx([1 - 0.99**50, 1 - 0.99 ** (10 + 4 * 40), 1 - 0.99**200], rel=1e-12)
    directory = record["outputs"][0]["directory"]
    assert "--momentum 0.99 --batch-scale 1,60:4" in Path(directory, "README.md").read_text()
    assert run_cli("verify", directory).exit_code == 0
    assert run_cli("sweep", run, "ema:momentum=0.99,batch-scale=1,60:4", "--dry-run").exit_code == 2


def test_json_of_pema_and_bema(run: Path) -> None:
    record = json.loads(run_cli("pema", run, "--json").stdout)
    assert (record["steps"], record["anchor_step"], record["span"]) == ([*STEPS], 0, 150)
    assert (record["path_length"][0], record["betas"][0], record["alphas"]) == (0, None, None)
    assert len(record["betas"]) == len(record["weights"]) == 4
    assert record["excluded_from_path"] == ["norm", "scalar", "single"]
    assert any("norm" in warning for warning in record["warnings"])
    record = json.loads(run_cli("bema", run, "--burn-in", "20", "--json").stdout)
    assert (record["path_length"], record["anchor_step"], record["span"]) == (None, 50, 100)
    assert record["betas"][:2] == [None, None]
    assert record["alphas"][2:] == pytest.approx([110**-0.2, 160**-0.2])
    assert record["weights"][0] == 0


def test_selection(run: Path, tmp_path: Path) -> None:
    def steps(*words: str) -> list[int]:
        told = json.loads(run_cli(words[0], run, *words[1:], "--force", "--json").stdout)
        return list(told["steps"])

    assert steps("bema", "--burn-in", "50", "--every", "100") == [0, 50, 150], "counted from the burn-in"
    assert steps("ema", "--every", "100") == [0, 100]
    late = run_cli("pema", run, "--from-step", "50", "--dry-run")
    assert "warning: The run begins at step 50: everything is measured from that checkpoint" in late.stderr
    (run / "checkpoint-0").rename(tmp_path / "base")
    record = json.loads(run_cli("mean", run, "--init", tmp_path / "base", "--json").stdout)
    assert record["steps"] == list(STEPS)
    assert record["weights"] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3]), "the mean leaves the base model out"


def test_summary(run: Path) -> None:
    result = run_cli("pema", run)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "Pathwise EMA (PEMA): gamma 0.15"
    assert lines[1].startswith("4 checkpoints of 106.7k parameters, steps 0 to 150, path length ℓ(T) = ")
    assert lines[3].split() == ["step", "ℓ", "β", "weight"]
    assert [line.split()[0] for line in lines[4:8]] == ["0", "50", "100", "150"]
    assert max(line.count("█") for line in lines[4:8]) == 32
    assert any(line.startswith("result ") and "pema-gamma0.15" in line for line in lines)
    assert any(line.startswith("next ") and "LlamaForCausalLM" in line for line in lines)
    assert "\x1b" not in result.stdout
    assert "pass 1 of 2, measuring the path: 1.7 MB\n" in result.stderr
    assert "pass 2 of 2, averaging: 100 %, " in result.stderr
    assert "syncing and hashing: " in result.stderr
    assert result.stderr.index("writing card and record\n") > result.stderr.index("syncing and hashing: ")
    assert "warning: No spread at the anchor" in result.stderr
    negative = run_cli("bema", run, "--eta", "0", "--kappa", "0.1").stdout.splitlines()
    first, last = (next(line for line in negative if line.startswith(step)) for step in ("   0 ", " 150 "))
    assert "-0." in first
    assert first.endswith("█│"), "to the left of the axis"
    assert "  │█" in last.replace(" " * 12, "  "), "to its right"
    quiet = run_cli("ema", run, "--gamma", "0.05", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, f"{run}/averaged/ema-gamma0.05\n", "")
    assert (run / "averaged/ema-gamma0.05/model-00001-of-00002.safetensors").exists()


def test_many_checkpoints_are_summed_up(tmp_path: Path) -> None:
    weights = [{"w": torch.arange(4.0) + step} for step in range(60)]
    result = run_cli("ema", write_run(tmp_path, weights, range(60)))
    (hidden,) = (line for line in result.stdout.splitlines() if line.lstrip().startswith("…"))
    assert "20 more" in hidden


def test_table_of_a_sweep(run: Path) -> None:
    result = run_cli("sweep", run, "pema:gamma=0.1,0.3", "bema:eta=0,kappa=0.1", "last")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "4 averages of 4 checkpoints, steps 0 to 150"
    assert lines[1].startswith("path length ℓ(T) = ")
    rows = {line.split()[0]: line.split()[1:] for line in lines[4:8]}
    assert rows["last"] == ["▁▁▁█", "0.0000", "1.0000", "0.0000", "1.0", "0"]
    assert rows["bema-eta0-kappa0.1"][0].startswith("-")
    assert rows["pema-gamma0.1"][0].endswith("█")


def test_dry_run_reads_and_writes_nothing(run: Path) -> None:
    before = snapshot(run)
    result = run_cli("pema", run, "--dry-run")
    assert result.exit_code == 0
    assert "would read" in result.stdout
    assert "Nothing was read or written." in result.stdout
    assert run_cli("sweep", run, "pema:gamma=0.1,0.3", "mean", "--dry-run").stdout.count("would write") == 3
    assert len(json.loads(run_cli("sweep", run, "mean", "last", "--dry-run", "--json").stdout)["averages"]) == 2
    plan = json.loads(run_cli("pema", run, "--dry-run", "--json").stdout)
    assert snapshot(run) == before
    done = json.loads(run_cli("pema", run, "--json").stdout)
    assert plan["bytes_to_read"] == done["bytes_read"]
    weights = sum(file.stat().st_size for file in (run / "averaged/pema-gamma0.15").glob("*.safetensors"))
    assert plan["bytes_to_write"] == pytest.approx(weights, abs=5000)
    assert plan["outputs"][0]["directory"] == done["outputs"][0]["directory"]


def test_existing_result_needs_force(run: Path) -> None:
    assert run_cli("mean", run).exit_code == 0
    before = snapshot(run)
    for words in (("mean", run), ("sweep", run, "pema", "mean")):
        result = run_cli(*words, "--accumulate", "float64")
        assert result.exit_code == 1
        assert "mean already holds a result; accumulate float32 there, float64 asked." in result.stderr
        assert "--force" in result.stderr
        assert snapshot(run) == before, "before anything is read"
    assert run_cli("mean", run, "--force").exit_code == 0


def test_places(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli("sweep", run, "mean", "last", "--out", tmp_path / "many", "-q").exit_code == 0
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"mean", "last"}
    monkeypatch.chdir(run)
    assert run_cli("sweep", "mean", "last", "-q").exit_code == 0
    assert {path.name for path in (run / "averaged").iterdir()} == {"mean", "last"}
    command = [sys.executable, "-m", "ckavg", "bema", "--eta", "0.3"]
    ran = subprocess.run(command, cwd=run, capture_output=True, text=True, check=True)
    assert "Bias-corrected EMA (BEMA): eta 0.3" in ran.stdout
    assert (run / "averaged/bema-eta0.3/config.json").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("nonsense:x=1", "no scheme is named"),
        ("mean nonsense:x=1", "there is no scheme 'nonsense'"),
        ("mean mean", "mean is requested twice"),
        ("mean mean:decay=none", "mean is requested twice"),
        ("mean:decay=exponential", "decay is 'exponential'; it must be one of none, linear, cosine, minus-sqrt"),
        ("mean:last=0", "last is 0; it must be 1 or more"),
        ("mean last --push-to-hub a/b", "uploads one average, and nothing tells which"),
        ("mean --revision pema", "--revision goes with --push-to-hub"),
    ],
)
def test_wrong_words_exit_2(run: Path, monkeypatch: pytest.MonkeyPatch, words: str, told: str) -> None:
    monkeypatch.chdir(run)
    result = run_cli("sweep", *words.split())
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (run / "averaged").exists()
