"""Each row of the table "What is read" of docs/formats.md, on a run of that trainer.

What the row says is what happens: which weights are averaged, which files are copied, what is left out and told of, and
that the command under `next` loads what float64 says.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ckavg
from ckavg.checkpoints.layouts import as_safetensors
from tests.cli.runner import run_cli
from tests.exhaustive import all_but
from tests.formats import laid_out, of_distributed, of_images, of_language, of_models, of_others, pickled
from tests.formats.document import Cell, Row, table
from tests.formats.trained import Build, Trained, mean
from tests.output.test_loading import loaded_by

pytestmark = pytest.mark.filterwarnings("ignore")

BUILDERS: Mapping[str, Build] = (
    of_language.BUILDERS
    | of_images.BUILDERS
    | of_others.BUILDERS
    | of_models.BUILDERS
    | laid_out.BUILDERS
    | pickled.BUILDERS
    | of_distributed.BUILDERS
)
ROWS = table("What is read")
MADE_HERE = {"README.md", "ckavg.json", ".ckavg-local.json"}


def test_every_row_is_tried_and_every_try_is_a_row() -> None:
    assert ROWS.keys() == BUILDERS.keys()
    assert ROWS.keys() >= ALIKE


ALIKE = {
    *("TRL, SFT", "TRL, DPO with LoRA", "TRL, GRPO", "TRL, RLOO", "TRL, KTO", "TRL, DPO", "TRL, reward model"),
    *("BERT, tied decoder", "GPT-2", "Whisper", "ViT", "CLIP", "diffusers, ControlNet", "SetFit"),
    *("PEFT, DoRA", "PEFT, IA³", "PEFT, VeRA", "PEFT, LoHa", "PEFT, OFT", "PEFT, prefix tuning"),
    *("sentence-transformers, SparseEncoder", "sentence-transformers, CrossEncoder"),
}
"""Trainers whose runs have the layout of one that is tried each time."""


@pytest.mark.parametrize("trainer", all_but(ROWS.keys() - ALIKE, sorted(ROWS.keys() & BUILDERS.keys())))
def test_row(tmp_path: Path, trainer: str) -> None:
    row, trained = ROWS[trainer], BUILDERS[trainer](tmp_path / "run")
    root = trained.checkpoints[0].parent
    assert [each.path for each in ckavg.open_run(root).checkpoints] == trained.checkpoints
    assert_named(row["checkpoints"], trained)
    done = run_cli("mean", root)
    assert done.exit_code == 0, done.stderr
    out = root / "averaged" / "mean"
    assert_files(row, trained.checkpoints[-1], out, done.stderr, read=ckavg.open_run(root).last.names)
    averaged = assert_averaged(row["averaged"], trained, out)
    command = next(line.removeprefix("next     ") for line in done.stdout.splitlines() if line.startswith("next     "))
    assert all(code in command for code in row["loads as"].code), command
    assert_loads(trained, loaded_by(command), averaged)
    if trained.also is not None:
        trained.also(out)


def assert_named(cell: Cell, trained: Trained) -> None:
    """The names of the checkpoints are those of the row, N standing for any number."""
    patterns = [re.sub("N+", r"\\d+", re.escape(code.rstrip("/"))) for code in cell.code]
    names = [each.name for each in trained.checkpoints]
    assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in names)
    assert all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns)


def assert_files(row: Row, last: Path, out: Path, told: str, *, read: Collection[str]) -> None:
    """Every file of the last checkpoint has its place in the row, and the row names none that is not there."""
    result = files(out) - MADE_HERE
    own = files(last) - MADE_HERE if last.is_dir() else set()
    own = {safe if (safe := as_safetensors(name)) in result - own else name for name in own}
    left_out = own - result
    left_out |= {name for name in row["left out"].bold if not re.search("[./]", name)}  # entries of a pickle
    assert_matched(row["averaged"].code + row["copied"].code, result)
    assert_matched(row["left out"].code, left_out)
    warnings = [line for line in told.splitlines() if line.startswith("warning: ")]
    for name in row["left out"].bold:
        assert any(name in line and "neither averaged nor copied" in line for line in warnings), told
    weights = {name for name in left_out if name.endswith(".safetensors") and name not in read}
    assert weights == matching(row["left out"].bold, weights)
    assert len(warnings) == 0 or "neither" not in told or row["left out"].bold
    for name in result.intersection(own) - matching(row["averaged"].code, result):
        if name.endswith(".safetensors") and (last / name).exists():
            assert are_equal(load_file(out / name), load_file(last / name))
        elif not name.endswith((".index.json", "config.json", ".safetensors")):
            assert (out / name).read_bytes() == (last / name).read_bytes()


def are_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that fit a pattern; one of a folder fits all that is in it."""
    of_files = [f"{each}*" if each.endswith("/") else each for each in patterns]
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in of_files)}


def assert_matched(patterns: Iterable[str], names: set[str]) -> None:
    assert names - matching(patterns, names) == set()
    assert [each for each in patterns if not matching([each], names)] == []


def assert_averaged(cell: Cell, trained: Trained, out: Path) -> dict[str, dict[str, Tensor]]:
    """The weight files of the result, each the mean of those of the checkpoints in float64."""
    found = {}
    for name in matching(cell.code, files(out)):
        if not name.endswith(".safetensors"):
            continue
        found[name] = load_file(out / name)
        in_pieces = any(map(is_in_pieces, trained.checkpoints)) and not (trained.checkpoints[-1] / name).exists()
        sources = trained.states if in_pieces else [tensors_of(each, name) for each in trained.checkpoints]
        assert found[name].keys() == sources[-1].keys()
        for tensor, got in found[name].items():
            want = mean([each[tensor] for each in sources])
            torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-6, atol=1e-7)
        assert any(not torch.equal(got, sources[-1][tensor]) for tensor, got in found[name].items())
    assert found
    return found


def tensors_of(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """Those of a weight file of the result, as a checkpoint has them."""
    path = checkpoint / name if checkpoint.is_dir() else checkpoint
    if path.suffix == ".safetensors" and path.exists():
        found: dict[str, Tensor] = load_file(path)
        return found
    return pickled.tensors_in(checkpoint, name) if checkpoint.is_dir() else pickled.tensors_of(path)


def is_in_pieces(checkpoint: Path) -> bool:
    """Whether torch.distributed.checkpoint saved it."""
    return any(checkpoint.rglob("*.distcp")) or any(checkpoint.glob("shard-*"))


def assert_loads(trained: Trained, model: Any, averaged: Mapping[str, Mapping[str, Tensor]]) -> None:
    """What was loaded computes what the mean of the run's weights, as they were in memory, does in float64."""
    if trained.outputs is None:
        loaded = [model] if isinstance(model, dict) else model
        assert any(are_equal(held, each) for held in loaded for each in averaged.values())
        return
    expected, of_last = trained.computed(trained.states), trained.computed(trained.states[-1:])
    with torch.no_grad():
        got = trained.outputs(model).double()
    torch.testing.assert_close(got, expected.double(), rtol=1e-4, atol=1e-5)
    assert (expected - of_last).abs().max() > 1e-3  # a result that is the last checkpoint would be noticed
