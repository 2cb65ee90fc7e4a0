"""Headers that are like those of the checkpoint before are parsed and kept once; what differs is still found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckavg
from ckavg.checkpoints.fingerprints import fingerprint, fingerprint_run
from ckavg.checkpoints.headers import KnownHeaders, read_header
from ckavg.errors import CombinedError, CorruptFileError, TruncatedShardError
from tests.runs import random_run, write_run

STEPS = (0, 10, 20, 30)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", random_run(0, 4, torch.bfloat16), STEPS, shards=(3,))


def shard(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}" / "model-00002-of-00003.safetensors"


def test_equal_tables_are_one(run: Path) -> None:
    opened = ckavg.open_run(run)
    assert len({id(each.entries) for each in opened.checkpoints}) == 1
    assert [each.shards[1].path for each in opened.checkpoints] == [shard(run, step) for step in STEPS]
    assert [each.shards[1].state for each in opened.checkpoints] == [
        (shard(run, step).stat().st_ino, shard(run, step).stat().st_mtime_ns) for step in STEPS
    ]


def test_of_other_tables_names_and_shapes_are_one(run: Path) -> None:
    for step in STEPS[2:]:
        file = shard(run, step)
        save_file(load_file(file), file, {"format": "pt", "note": "a longer header moves every tensor"})
    first, second, third, fourth = (each.entries for each in ckavg.open_run(run).checkpoints)
    assert first is second
    assert third is fourth
    assert first is not third
    assert first != third
    for (name, entry), (other_name, other) in zip(first.items(), third.items(), strict=True):
        assert name is other_name
        assert entry.dtype is other.dtype
    opened = ckavg.open_run(run)
    assert fingerprint_run(opened) == tuple(map(fingerprint, opened.checkpoints))
    assert len(set(fingerprint_run(opened))) == len(STEPS)


@pytest.mark.parametrize(("change", "error"), [(-1, TruncatedShardError), (1, CorruptFileError)])
def test_a_known_header_does_not_hide_another_size(run: Path, change: int, error: type[Exception]) -> None:
    os.truncate(shard(run, 20), shard(run, 20).stat().st_size + change)
    with pytest.raises(error, match="checkpoint-20"):
        ckavg.open_run(run)
    known: KnownHeaders = {}
    read_header(shard(run, 10), shard=1, known=known)
    with pytest.raises(error, match="checkpoint-20"):
        read_header(shard(run, 20), shard=1, known=known)


def test_a_header_of_the_same_length_is_not_taken_for_the_one_before(run: Path) -> None:
    text = shard(run, 20).read_bytes()
    assert b'"BF16"' in text
    shard(run, 20).write_bytes(text.replace(b'"BF16"', b'"F16" '))
    with pytest.raises(CombinedError, match="step 20: tensor 'chunk_and_a_bit' is F16, but BF16 at step 10"):
        ckavg.open_run(run)


def test_training_state_is_left_out_of_every_checkpoint(run: Path) -> None:
    for step in STEPS:
        folder = run / f"checkpoint-{step}" / "state_of_training"
        folder.mkdir()
        save_file({"w.exp_avg": torch.ones(3), "w.exp_avg_sq": torch.ones(3)}, folder / "model.safetensors")
    opened = ckavg.open_run(run)
    assert not any("exp_avg" in name for name in opened.tensors)
    for checkpoint in opened.checkpoints:
        assert checkpoint.left_out == (("training state", "state_of_training/model.safetensors"),)
