"""The path cache: what is read again, and what is not, after every kind of change to a run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ckavg
from ckavg.checkpoints import fingerprints as stamps
from ckavg.errors import ChangedError
from tests.cli.runner import run_cli
from tests.exhaustive import thinned, unless
from tests.runs import random_run, write_checkpoint, write_run

STEPS = (0, 50, 100, 150)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(0, 4, torch.bfloat16), STEPS, shards=(1, 2))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measured(source: Path, every: int | None = None, to_step: int | None = None) -> ckavg.PathLength:
    return ckavg.path_length(ckavg.open_run(source, every=every, to_step=to_step))


def fresh(source: Path, every: int | None = None) -> ckavg.PathLength:
    """The path of a run, measured in full."""
    kept = source / "averaged" / "path.json"
    held = kept.read_bytes() if kept.exists() else None
    kept.unlink(missing_ok=True)
    path = measured(source, every)
    kept.unlink(missing_ok=True)
    if held is not None:
        kept.write_bytes(held)
    return path


def checkpoint_bytes(source: Path) -> int:
    """Bytes that pass 1 reads of one checkpoint."""
    run = ckavg.open_run(source)
    return sum(entry.nbytes for entry in run.tensors.values() if entry.is_floating)


def in_checkpoints(source: Path, path: ckavg.PathLength) -> int:
    """How many checkpoints' worth of bytes were read; the first element of each tensor is read once more."""
    return round(path.bytes_read / checkpoint_bytes(source))


def flip(file: Path) -> None:
    """Change the mantissa of a number near the end of a file."""
    data = bytearray(file.read_bytes())
    data[-4] ^= 0b1
    file.write_bytes(data)


def file_of(source: Path, step: int) -> Path:
    return min((source / f"checkpoint-{step}").glob("*.safetensors"))


def test_a_second_measurement_reads_nothing(source: Path) -> None:
    first, second = measured(source), measured(source)
    assert in_checkpoints(source, first) == 4
    assert second.bytes_read == 0
    assert (second.lengths, second.tensors) == (first.lengths, first.tensors)


def test_another_gamma_reads_each_checkpoint_once(source: Path) -> None:
    records = [json.loads(run_cli("pema", source, "--gamma", gamma, "--json").stdout) for gamma in ("0.1", "0.2")]
    integers = sum(entry.nbytes for entry in ckavg.open_run(source).tensors.values() if not entry.is_floating)
    once = 4 * checkpoint_bytes(source) + integers
    assert records[1]["bytes_read"] == once
    assert records[0]["bytes_read"] >= 2 * once - integers
    assert records[1]["path_length"] == records[0]["path_length"]
    assert records[1]["seconds"]["path"] < records[0]["seconds"]["path"]


def test_path_of_the_path_verb_serves_pema_to_the_byte(source: Path, tmp_path: Path) -> None:
    run_cli("path", source)
    run_cli("pema", source, "--out", tmp_path / "known")
    shutil.rmtree(source / "averaged")
    run_cli("pema", source, "--out", tmp_path / "measured")
    for file in (tmp_path / "known").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "measured" / file.name).read_bytes()


def test_a_grown_run_reads_two_checkpoints(source: Path) -> None:
    measured(source)
    write_checkpoint(source / "checkpoint-200", random_run(0, 5, torch.bfloat16)[-1], step=200)
    want = fresh(source)
    grown = measured(source)
    assert in_checkpoints(source, grown) == 2
    assert (grown.lengths, grown.tensors) == (want.lengths, want.tensors)
    assert measured(source).bytes_read == 0


def change(file: Path, how: str) -> None:
    """Change a file: its bytes, with the times restored or not, or only its time."""
    status = file.stat()
    if how == "replaced, times restored":
        shutil.copyfile(file, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
    if how == "touched":
        file.touch()
    else:
        flip(file)
    if "restored" in how:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


CHANGES = ("changed", "changed, times restored", "replaced, times restored", "touched")


@pytest.mark.parametrize(("how", "place"), thinned(CHANGES, [(0, 2), (100, 3), (150, 2)]))
def test_a_changed_checkpoint_is_measured_again_and_no_other(source: Path, how: str, place: tuple[int, int]) -> None:
    step, read_again = place
    before = measured(source)
    change(file_of(source, step), how)
    want = fresh(source)
    after = measured(source)
    assert in_checkpoints(source, after) == read_again
    assert (after.lengths, after.tensors) == (want.lengths, want.tensors)
    assert (after.lengths == before.lengths) == (how == "touched")
    assert measured(source).bytes_read == 0


def test_a_truncated_checkpoint_is_refused_and_measured_again_once_whole(source: Path) -> None:
    measured(source)
    file = file_of(source, 100)
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    assert run_cli("path", source).exit_code == 1
    file.write_bytes(data)
    assert in_checkpoints(source, measured(source)) == 3


def test_checkpoints_are_known_by_their_files_not_their_names(source: Path) -> None:
    """Two checkpoints that change names change places in the path, too."""
    measured(source)
    for name, other in (("checkpoint-50", "x"), ("checkpoint-100", "checkpoint-50"), ("x", "checkpoint-100")):
        (source / name).rename(source / other)
    for step in (50, 100):
        (source / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    want = fresh(source)
    assert measured(source).lengths == want.lengths


def test_a_choice_of_checkpoints_is_measured_by_itself_and_beside_the_others(source: Path) -> None:
    measured(source)
    thinned = measured(source, every=100)
    assert in_checkpoints(source, thinned) == 2
    assert thinned.lengths == fresh(source, every=100).lengths
    assert measured(source).bytes_read == 0
    assert measured(source, to_step=100).bytes_read == 0
    assert measured(source, every=100).bytes_read == 0


def test_another_anchor_has_its_own_spread(source: Path, tmp_path: Path) -> None:
    measured(source)
    base = write_checkpoint(tmp_path / "base", random_run(9, 1, torch.bfloat16)[0])
    run = ckavg.open_run(source, init=base, from_step=50)
    first = ckavg.path_length(run)
    assert in_checkpoints(source, first) == 2
    assert ckavg.path_length(run).bytes_read == 0
    shutil.rmtree(source / "averaged")
    assert ckavg.path_length(run).lengths == first.lengths


def test_fewer_tensors_are_known_and_more_are_measured(source: Path) -> None:
    run = ckavg.open_run(source)
    some = ckavg.path_length(run, path_exclude=["tiles"])
    everything = ckavg.path_length(run)
    assert everything.bytes_read > 0
    assert ckavg.path_length(run, path_exclude=["tiles"]).lengths == some.lengths
    assert ckavg.path_length(run, path_exclude=["odd", "bias"]).bytes_read == 0
    assert ckavg.path_length(run, zero_sigma="eps").bytes_read == 0


def test_a_run_that_cannot_be_written_beside_is_kept_in_the_cache(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "averaged").write_text("not a directory, so nothing can be kept in it")
    assert measured(source).bytes_read > 0
    assert [file.suffix for file in (cache / "ckavg").iterdir()] == [".json"]
    assert measured(source).bytes_read == 0
    shutil.rmtree(cache)
    cache.write_text("nor here")
    assert measured(source).lengths == measured(source).lengths


@pytest.mark.parametrize("link", ["path.json", "averaged"])
def test_a_link_to_somewhere_else_is_not_written_through(source: Path, cache: Path, link: str) -> None:
    """In a downloaded run, such a link could lead to a checkpoint, or to a file of the user."""
    target = file_of(source, 50)
    if link == "averaged":
        (source / "averaged").symlink_to(target.parent)
    else:
        (source / "averaged").mkdir()
        (source / "averaged" / "path.json").symlink_to(target)
    before = sorted(target.parent.iterdir()), target.read_bytes()
    assert measured(source).bytes_read > 0
    assert (sorted(target.parent.iterdir()), target.read_bytes()) == before
    assert measured(source).bytes_read == 0
    assert len(list((cache / "ckavg").iterdir())) == 1


def sealed(table: dict[str, Any]) -> str:
    """A table with the checksum that belongs to it."""
    table = {key: value for key, value in table.items() if key != "sha256"}
    text = json.dumps(table, separators=(",", ":"))
    return json.dumps(table | {"sha256": hashlib.sha256(text.encode()).hexdigest()})


NUMBERS: tuple[Any, ...] = (-1.0, math.nan, math.inf, "1", None, [])
PARTS = ("tensors", "checkpoints", "sigma", "distances", "format")
VALUES: tuple[Any, ...] = (7, None, [], {}, [[1]], {"a": [1]}, {"a": {}})


@pytest.mark.parametrize(
    "nonsense",
    [
        *("", "[]", "{", "[" * 100_000, '{"format": 2}', '{"format": 1, "tensors": 7}'),
        *(("numbers", value) for value in NUMBERS),
        *(
            pytest.param((part, value), marks=unless((row + column) % 3 == 0))
            for row, part in enumerate(PARTS)
            for column, value in enumerate(VALUES)
        ),
    ],
    ids=str,
)
def test_a_table_that_makes_no_sense_is_measured_anew(source: Path, nonsense: str | tuple[str, Any]) -> None:
    """Text, impossible numbers, and other values instead of a part; all with a valid checksum."""
    want = measured(source)
    kept = source / "averaged" / "path.json"
    table = json.loads(kept.read_text())
    if isinstance(nonsense, str):
        kept.write_text(nonsense)
    elif nonsense[0] == "numbers":
        for row in (row for rows in (table["sigma"], table["distances"]) for row in rows.values()):
            row[:] = [nonsense[1]] * len(row)
        kept.write_text(sealed(table))
    else:
        kept.write_text(sealed(table | {nonsense[0]: nonsense[1]}))
    again = measured(source)
    assert again.lengths == want.lengths
    assert again.bytes_read == want.bytes_read or not isinstance(nonsense, str)
    assert measured(source).bytes_read == 0


def edit(table: dict[str, Any], what: str) -> None:
    """Change one valid value."""
    distances, checkpoints = table["distances"], table["checkpoints"]
    if what == "a distance":
        row = next(iter(distances.values()))
        row[0] = math.nextafter(row[0], math.inf)
    elif what == "a spread":
        next(iter(table["sigma"].values()))[-1] *= 2
    elif what == "two tensors exchanged":
        table["tensors"][:2] = table["tensors"][1::-1]
    elif what == "two pairs exchanged":
        table["distances"] = dict(zip(distances, reversed(distances.values()), strict=True))
    elif what == "a place renamed":
        checkpoints[next(iter(checkpoints))] += "0"
    else:  # no checksum; as earlier versions wrote it
        del table["sha256"]
        table["format"] = table["format"] if what == "no checksum" else 1


EDITS = (
    "a distance",
    "a spread",
    "two tensors exchanged",
    "two pairs exchanged",
    "a place renamed",
    "no checksum",
    "an earlier version",
)


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_table_is_noticed_and_measured_anew(source: Path, what: str) -> None:
    run_cli("pema", source, "--out", source / "first")
    kept = source / "averaged" / "path.json"
    table = json.loads(kept.read_text())
    kept.write_text(json.dumps(table))  # in other words: nothing is edited yet
    assert measured(source).bytes_read == 0
    edit(table, what)
    kept.write_text(json.dumps(table))
    told = f"{kept} is damaged, edited, or from another version of ckavg"
    assert any(told in warning for warning in ckavg.plan_average(ckavg.open_run(source), ckavg.PEMA()).warnings)
    assert not ckavg.plan_average(ckavg.open_run(source), ckavg.EMA()).warnings
    for words in (("path", source), ("pema", source, "--out", source / "second")):
        kept.write_text(json.dumps(table))
        done = run_cli(*words)
        assert (done.exit_code, done.stderr.count(told)) == (0, 1), done.stderr
    for file in (source / "first").glob("*.safetensors"):
        assert file.read_bytes() == (source / "second" / file.name).read_bytes()
    assert measured(source).bytes_read == 0
    assert told not in run_cli("path", source).stderr


def test_a_table_that_was_cut_off_or_damaged_anywhere_is_measured_anew(source: Path) -> None:
    want = measured(source)
    kept = source / "averaged" / "path.json"
    text = kept.read_bytes()
    for place in range(0, len(text), len(text) // 12):
        damaged = bytearray(text)
        damaged[place] ^= 1
        for spoilt in (text[:place], bytes(damaged)):
            kept.write_bytes(spoilt)
            again = measured(source)
            assert (again.bytes_read, again.lengths) == (want.bytes_read, want.lengths), place
            assert kept.read_bytes() == text


def test_a_file_that_changes_while_it_is_measured_is_refused_and_not_kept(source: Path) -> None:
    file = file_of(source, 50)

    def change_once(news: ckavg.Progress) -> None:
        if news.done == 0:
            flip(file)

    with pytest.raises(ChangedError, match=f"{file} was changed or replaced while it was read"):
        ckavg.path_length(ckavg.open_run(source), on_progress=change_once)
    assert in_checkpoints(source, measured(source)) == 3


@pytest.mark.parametrize("ahead", [0, 3_600_000_000_000])
def test_a_change_too_young_to_be_told_from_the_next_is_not_kept(
    source: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """Files of a coarse clock, changed just now, and of a clock that is ahead of ours."""
    changed = max(file.stat().st_ctime_ns for file in source.rglob("*.safetensors"))
    monkeypatch.setattr("ckavg.checkpoints.fingerprints.time.time_ns", lambda: changed - ahead)
    monkeypatch.setattr(stamps, "_tick", lambda changed: 2_000_000_000)
    measured(source)
    assert not (source / "averaged").exists()


def test_superseded_measurements_are_dropped(source: Path) -> None:
    for _ in range(3):
        flip(file_of(source, 100))
        measured(source)
    table = json.loads((source / "averaged" / "path.json").read_text())
    assert (len(table["checkpoints"]), len(table["sigma"]), len(table["distances"])) == (4, 1, 3)


def test_a_sample_is_not_kept_and_an_exact_path_is_preferred(source: Path) -> None:
    run = ckavg.open_run(source)
    sampled = ckavg.path_length(run, sample=0.01)
    assert sampled.sample == 0.01
    assert not (source / "averaged").exists()
    exact = ckavg.path_length(run)
    known = ckavg.path_length(run, sample=0.01)
    assert (known.sample, known.bytes_read, known.lengths) == (1.0, 0, exact.lengths)
