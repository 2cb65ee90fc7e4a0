"""A result of the same recipe and of the same checkpoints is not made again; whatever differs is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckavg.checkpoints.fingerprints import fingerprint_files
from tests.averaging.test_adapters import write_adapters
from tests.cli.runner import run_cli, snapshot
from tests.exhaustive import all_but
from tests.runs import random_run, write_checkpoint, write_run

STEPS = (10, 20, 30, 40)
MODEL = "model.safetensors"


def make_run(root: Path) -> Path:
    base, *rest = random_run(3, len(STEPS) + 1, torch.float32)
    write_checkpoint(root / "base", base)
    (root / "card.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    run = write_run(root / "run", rest, STEPS)
    (run / f"checkpoint-{STEPS[-1]}" / "notes.txt").write_text("mine")
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def bytes_read() -> int:
    """Bytes that this process has read until now, by the system's own account."""
    return int(Path("/proc/self/io").read_text().split()[1])


def check_refused(run: Path, told: str, *words: str | Path) -> None:
    before = snapshot(run)
    done = run_cli(*words)
    assert done.exit_code == 1, done.stdout
    assert f"already holds a result; {told}" in " ".join(done.stderr.split()), done.stderr
    assert "--force" in done.stderr
    assert snapshot(run) == before


def test_an_identical_rerun_touches_and_reads_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"w": torch.rand(1_000_000)} for _ in STEPS], STEPS)
    assert run_cli("pema", run, "-q").exit_code == 0
    before, made = snapshot(run), (run / "averaged/pema-gamma0.15").stat().st_mtime_ns
    begun = bytes_read()
    again = run_cli("pema", run)
    read = bytes_read() - begun
    assert again.exit_code == 0, again.stderr
    assert again.stdout.startswith(
        f"{run / 'averaged/pema-gamma0.15'} is up to date\nPathwise EMA (PEMA): gamma 0.15\n"
    )
    assert "GB" not in again.stderr, "no pass"
    assert read < 1_000_000, "headers and records, of weights of 4 MB each"
    assert (snapshot(run), (run / "averaged/pema-gamma0.15").stat().st_mtime_ns) == (before, made)
    told = run_cli("pema", run, "--json")
    record = json.loads((run / "averaged/pema-gamma0.15/ckavg.json").read_text())
    said = json.loads(told.stdout)
    assert said.pop("up_to_date") is True
    assert said["outputs"][0]["directory"] == str(run / "averaged/pema-gamma0.15")
    places = ("source", "inputs", "outputs")
    assert {name: value for name, value in said.items() if name not in places} == {
        name: value for name, value in record.items() if name not in places
    }
    assert run_cli("pema", run, "--dry-run").stdout.splitlines()[0].endswith("is up to date")
    assert json.loads(run_cli("pema", run, "--dry-run", "--json").stdout)["bytes_to_read"] == 0
    assert snapshot(run) == before


def test_force_makes_it_again(run: Path) -> None:
    assert run_cli("mean", run, "-q").exit_code == 0
    before = (run / "averaged/mean" / MODEL).stat()
    done = run_cli("mean", run, "--force", "--json")
    assert done.exit_code == 0
    assert "up_to_date" not in json.loads(done.stdout)
    after = (run / "averaged/mean" / MODEL).stat()
    assert (after.st_ino, after.st_mtime_ns) != (before.st_ino, before.st_mtime_ns)


# --- the recipe ---

OPTIONS = {
    "--gamma 0.1": "gamma 0.15 there, 0.1 asked",
    "--scope tensor": "scope global there, tensor asked",
    "--pairing next": "pairing same there, next asked",
    "--clock updates": "clock steps there, updates asked",
    "--every 20": "checkpoints 4 of steps 10 to 40 there, 2 of steps 10 to 30 asked; every none there, 20 asked",
    "--last 4": "last none there, 4 asked",
    "--to-step 30": "checkpoints 4 of steps 10 to 40 there, 3 of steps 10 to 30 asked",
    "--skip-step 20": "checkpoints 4 of steps 10 to 40 there, 3 of steps 10 to 40 asked",
    "--steps 10,20,30,40": "steps none there, 10,20,30,40 asked",
    "--init ../base": "checkpoints 4 of steps 10 to 40 there, 5 of steps 0 to 40 asked; init none there",
    "--common-only": "common-only none there, True asked",
    "--copy notes.txt": "copy none there, notes.txt asked",
    "--card ../card.md": "card none there, of SHA-256",
    "--dtype bfloat16": "dtype source there, bfloat16 asked",
    "--accumulate float64": "accumulate float32 there, float64 asked",
    "--path-exclude bias": "path-exclude",
    "--zero-sigma eps": "zero-sigma exclude there, eps asked",
    "--sample 0.5": "sample 1.0 there, 0.5 asked",
    "--snapshot-every 20": "snapshot-every none there, 20 asked",
    "--allow-nonfinite": "allow-nonfinite False there, True asked",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with a result, which no test changes."""
    run = make_run(tmp_path_factory.mktemp("made"))
    assert run_cli("pema", run, "--out", run / "out", "-q").exit_code == 0
    yield run
    assert run_cli("pema", run, "--out", run / "out").stdout.startswith(f"{run / 'out'} is up to date\n")


TYPICAL = {"--gamma 0.1", "--every 20", "--init ../base", "--copy notes.txt", "--card ../card.md", "--sample 0.5"}


@pytest.mark.parametrize("option", all_but(TYPICAL, OPTIONS))
def test_each_change_of_the_recipe_is_noticed(made: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.chdir(made)
    check_refused(made, OPTIONS[option], "pema", "--out", made / "out", *option.split())


def test_another_scheme_is_noticed_and_what_changes_no_byte_is_not(made: Path) -> None:
    check_refused(made, "scheme pema there, mean asked.", "mean", made, "--out", made / "out")
    for option in ("--device=cpu", "--allow-anchor", "--gamma=0.15"):
        assert run_cli("pema", made, "--out", made / "out", option, "-q").exit_code == 0


def test_another_card_is_noticed_and_path_options_are_no_part_of_a_mean(run: Path) -> None:
    card = run.parent / "card.md"
    assert run_cli("mean", run, "--card", card, "-q").exit_code == 0
    assert run_cli("mean", run, "--card", card, "--sample", "0.5", "--zero-sigma", "eps", "-q").exit_code == 0
    card.write_text("Another text.\n")
    check_refused(run, "card of SHA-256", "mean", run, "--card", card)


def test_another_version_of_the_format_is_noticed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli("mean", run, "-q").exit_code == 0
    monkeypatch.setattr("ckavg.averaging.recipe.FORMAT", 2)
    check_refused(run, "format 1 there, 2 asked.", "mean", run)


# --- the checkpoints ---


def rewrite(path: Path) -> None:
    """Change a byte of the weights, and give the file its old size and time of modification."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def resave(path: Path) -> None:
    save_file(load_file(path) | {"bias": torch.zeros(130)}, path)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "touched": (lambda path: path.touch(), "the checkpoints of step 20 have changed since."),
    "rewritten": (rewrite, "the checkpoints of step 20 have changed since."),
    "saved again": (resave, "the checkpoints of step 20 have changed since."),
    "another file": (lambda path: shutil.move(shutil.copy2(path, path.with_suffix(".x")), path), "the checkpoints of"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_checkpoint_is_noticed(run: Path, change: str) -> None:
    assert run_cli("mean", run, "-q").exit_code == 0
    do, told = CHANGES[change]
    do(run / "checkpoint-20" / MODEL)
    check_refused(run, told, "mean", run)


def test_a_new_checkpoint_and_another_config_are_noticed(run: Path) -> None:
    assert run_cli("sweep", run, "mean", "ema:last=2", "-q").exit_code == 0
    write_checkpoint(run / "checkpoint-50", random_run(9, 1, torch.float32)[0], step=50)
    check_refused(run, "checkpoints 4 of steps 10 to 40 there, 5 of steps 10 to 50 asked.", "mean", run)
    assert run_cli("mean", run, "--to-step", "40", "--out", run / "out", "-q").exit_code == 0
    (run / "checkpoint-40/config.json").write_text("{}")
    words = ("mean", run, "--to-step", "40", "--out", run / "out")
    check_refused(run, "the last checkpoint has another config.json now.", *words)


# --- the result itself ---


def test_files_of_the_result_that_were_changed_are_noticed(run: Path) -> None:
    words = ("mean", run, "--snapshot-every", "20")
    for name in (MODEL, f"checkpoint-20/{MODEL}", "config.json", "README.md"):
        assert run_cli(*words, "-q", "--force").exit_code == 0
        path = run / "averaged/mean" / name
        rewrite(path) if name.endswith(MODEL) else path.unlink()
        check_refused(run, f"its own files have changed since: {name}.", *words)


def test_an_edited_card_is_nobodys_business(run: Path) -> None:
    assert run_cli("mean", run, "-q").exit_code == 0
    (run / "averaged/mean/README.md").write_text("Edited.\n")
    assert run_cli("mean", run, "-q").exit_code == 0
    assert (run / "averaged/mean/README.md").read_text() == "Edited.\n"


def test_records_do_not_make_other_weights_up_to_date(run: Path) -> None:
    """Beside the weights of one result, the files of another one say what they like."""
    assert run_cli("sweep", run, "ema:gamma=0.1,0.3", "-q").exit_code == 0
    one, other = run / "averaged/ema-gamma0.1", run / "averaged/ema-gamma0.3"
    planted = ("ckavg.json", ".ckavg-local.json")
    for name in planted:
        shutil.copy(other / name, one / name)
    words = ("ema", run, "--gamma", "0.3", "--out", one)
    check_refused(
        run, "its own files have changed since: config.json, model.safetensors, notes.txt, tokenizer.json.", *words
    )
    local = json.loads((one / planted[1]).read_text())
    for own in (
        {},
        {name: fingerprint_files([one / name]) for name in (MODEL, "config.json", "notes.txt", "tokenizer.json")},
    ):
        (one / MODEL).write_bytes((one / MODEL).read_bytes() + b"\0")
        local["made"]["own_fingerprints"] = own
        (one / planted[1]).write_text(json.dumps(local))
        check_refused(run, "its own files have changed since: model.safetensors", *words)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda record, local: record["parameters"].update(gamma=0.3), "its record was edited."),
        (lambda record, local: record.update(dtype="float32"), "its record was edited."),
        (lambda record, local: local["made"]["recipe"].update(gamma=0.3), "gamma 0.3 there, 0.15 asked."),
        (lambda record, local: local.pop("made"), "the state of the checkpoints it was made from is not recorded."),
        (
            lambda record, local: local["made"].pop("recipe"),
            "the state of the checkpoints it was made from is not recorded",
        ),
        (lambda record, local: local["made"]["source_fingerprints"].pop(), "it has fingerprints of other checkpoints"),
        (lambda record, local: local["made"].update(source_fingerprints=[None] * 4), "it is unknown whether step 10"),
        (lambda record, local: record.pop("weights"), "its record is damaged, or of another version."),
    ],
)
def test_edited_records_are_noticed(run: Path, edit: Callable[[Any, Any], Any], told: str) -> None:
    assert run_cli("ema", run, "-q").exit_code == 0
    paths = [run / "averaged/ema-gamma0.15" / name for name in ("ckavg.json", ".ckavg-local.json")]
    values = [json.loads(path.read_text()) for path in paths]
    edit(*values)
    for path, value in zip(paths, values, strict=True):
        path.write_text(json.dumps(value))
    check_refused(run, told, "ema", run)


# --- sweeps ---


def test_a_sweep_forms_and_evaluates_only_what_is_new(run: Path) -> None:
    """The command has a path in it, which a record that may be uploaded does not show."""
    counted = run.parent / "Counted"
    command = f"echo {{dir}} >> {counted}; wc -c < {{dir}}/ckavg.json"
    words = ("--eval", command, "--eval-goal", "min")
    assert run_cli("sweep", run, "pema:gamma=0.1", "mean", *words, "-q").exit_code == 0
    before = {name: snapshot(run / "averaged" / name) for name in ("pema-gamma0.1", "mean")}
    begun = run_cli("sweep", run, "pema:gamma=0.1,0.2", "mean", *words)
    assert begun.exit_code == 0, begun.stderr
    names = [Path(line).name for line in counted.read_text().splitlines()]
    assert names == ["pema-gamma0.1", "mean", "pema-gamma0.2"]
    assert {name: snapshot(run / "averaged" / name) for name in before} == before
    rows = {row.split()[0]: row.rstrip() for row in begun.stdout.splitlines()[4:7]}
    assert {name: row.endswith("up to date") for name, row in rows.items()} == {
        "pema-gamma0.1": True,
        "pema-gamma0.2": False,
        "mean": True,
    }
    told = json.loads(run_cli("sweep", run, "pema:gamma=0.1,0.2", "mean", "ema", *words, "--json").stdout)
    assert [each.get("up_to_date", False) for each in told["averages"]] == [True, True, True, False]
    assert all(each["evaluation"]["value"] > 0 for each in told["averages"])
    assert len(counted.read_text().splitlines()) == 4


def test_a_sweep_with_a_result_that_differs_does_nothing(run: Path) -> None:
    assert run_cli("mean", run, "-q").exit_code == 0
    (run / "checkpoint-20" / MODEL).touch()
    check_refused(run, "the checkpoints of step 20 have changed since.", "sweep", run, "ema", "mean")


def test_averaged_products_whose_rank_is_known_only_when_they_are_made(tmp_path: Path) -> None:
    """θ_0 has no weight with `--pairing next`, and so no part in the rank that the config states."""
    run = write_adapters(tmp_path)
    words = ("pema", run, "--pairing", "next", "--lora", "product", "--out", run / "out")
    assert run_cli(*words, "-q").exit_code == 0
    before = snapshot(run)
    assert run_cli(*words).stdout.startswith(f"{run / 'out'} is up to date\n")
    assert snapshot(run) == before
    check_refused(run, "rank none there, 2 asked.", *words, "--rank", "2")
    rewrite(run / "out/adapter_model.safetensors")
    check_refused(run, "its own files have changed since: adapter_model.safetensors.", *words)
