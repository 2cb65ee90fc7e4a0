"""What a downloaded run may hold: links, pipes, huge and deeply nested files. Refused or skipped, without waiting."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ckavg
from ckavg.checkpoints import checkpoint as reading
from ckavg.errors import CkavgError
from tests.cli.runner import run_cli
from tests.runs import write_checkpoint, write_run

STEPS = (10, 20, 30)
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


def weights(step: int) -> dict[str, Tensor]:
    return {"w": torch.arange(6.0) + step, "b": torch.full((2,), float(step))}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [weights(step) for step in STEPS], STEPS)


def linked(path: Path, target: Path) -> None:
    """Move a file elsewhere and leave a link in its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(target)


# --- links ---


def test_a_link_to_weights_outside_is_refused(source: Path, tmp_path: Path) -> None:
    for step in (40, 50):
        write_checkpoint(source / f"checkpoint-{step}", weights(step), shards=2)
    for step, name in ((20, MODEL), (40, INDEX), (50, "model-00002-of-00002.safetensors")):
        linked(source / f"checkpoint-{step}" / name, tmp_path / "elsewhere" / name)
        told = f"checkpoint-{step}/{name} is a link to {tmp_path}/elsewhere/{name}, outside the directory"
        with pytest.raises(CkavgError, match=re.escape(told)):
            ckavg.open_run(source, steps=(10, step))


def test_links_that_are_followed(source: Path, tmp_path: Path) -> None:
    """Within the source; and whoever collects the checkpoints of a run in one directory links them."""
    linked(source / "checkpoint-20" / MODEL, source / "store" / "a")
    linked(source / "checkpoint-30" / "config.json", source / "store" / "b")
    assert "config.json" in ckavg.plan_average(ckavg.open_run(source), ckavg.EMA()).side_files
    linked(source / "checkpoint-10", tmp_path / "elsewhere" / "checkpoint-10")
    (tmp_path / "flat").mkdir()
    for step in STEPS:
        (tmp_path / "flat" / f"step_{step}.safetensors").symlink_to(source / f"checkpoint-{step}" / MODEL)
    assert ckavg.open_run(source).steps == ckavg.open_run(tmp_path / "flat").steps == STEPS


@pytest.mark.parametrize("as_init", [False, True])
def test_snapshots_of_the_hub_are_links_into_its_blobs(tmp_path: Path, as_init: bool) -> None:
    """The names of the cache: models--owner--name/snapshots/REVISION/…, each file a link to blobs/HASH."""
    hub = tmp_path / "hub" / "models--owner--name"
    revision = hub / "snapshots" / "0a1b2c"
    (hub / "blobs").mkdir(parents=True)
    checkpoints = write_run(revision / "checkpoints", [weights(step) for step in STEPS], STEPS, shards=(1, 2))
    for number, path in enumerate(sorted(path for path in revision.rglob("*") if path.is_file())):
        blob = hub / "blobs" / f"{number:064x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    run = ckavg.open_run(checkpoints)
    if as_init:
        own = write_run(tmp_path / "own", [weights(step) for step in (40, 50)], (40, 50))
        run = ckavg.open_run(own, init=checkpoints / "checkpoint-30")
    result = ckavg.average(run, ckavg.Last(), out=tmp_path / "out")
    step = 50 if as_init else 30
    assert all(torch.equal(tensor, weights(step)[name]) for name, tensor in load_file(result.directory / MODEL).items())
    assert {"config.json", "tokenizer.json"} < set(result.outputs[0].files)


def test_another_directory_of_the_cache_is_outside(tmp_path: Path) -> None:
    run = write_run(tmp_path / "models--a--b" / "snapshots" / "0a", [weights(step) for step in STEPS], STEPS)
    linked(run / "checkpoint-20" / MODEL, tmp_path / "models--c--d" / "blobs" / "0")
    with pytest.raises(CkavgError, match="is a link to"):
        ckavg.open_run(run)


def test_side_files_that_lead_out_are_not_copied(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("a password")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "more.json").write_text("another")
    (source / "checkpoint-30" / "stolen.json").symlink_to(tmp_path / "secret.json")
    (source / "checkpoint-30" / "folder").symlink_to(tmp_path / "secrets")
    plan = ckavg.plan_average(ckavg.open_run(source), ckavg.EMA())
    assert plan.side_files.keys() == {"config.json", "tokenizer.json"}
    assert any("Not copied: " in warning and "stolen.json is a link to" in warning for warning in plan.warnings)
    with pytest.raises(CkavgError, match=r"stolen\.json is a link to"):
        ckavg.plan_average(ckavg.open_run(source, copy=("stolen.json",)), ckavg.EMA())


def test_links_in_a_circle_end(source: Path) -> None:
    (source / "checkpoint-30" / "again").symlink_to(source / "checkpoint-30")
    (source / "checkpoint-30" / "once_more").symlink_to(source)
    (source / "checkpoint-30" / "itself.json").symlink_to("itself.json")
    plan = ckavg.plan_average(ckavg.open_run(source), ckavg.EMA())
    assert plan.side_files.keys() == {"config.json", "tokenizer.json"}


# --- what is no file ---


def make(kind: str, path: Path) -> None:
    """Something other than a file, under the name of one."""
    path.unlink(missing_ok=True)
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        before = Path.cwd()
        os.chdir(path.parent)  # the path of a socket may be 107 bytes long
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(before)


KINDS = ("a named pipe", "a directory", "a socket", "a device")


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_in_the_place_of_weights(source: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "flat").mkdir()
    (source / "checkpoint-10" / MODEL).rename(tmp_path / "flat" / "step_10.safetensors")
    places = source / "checkpoint-20" / MODEL, tmp_path / "flat" / "step_20.safetensors"
    for place in places:
        make(kind, place)
        with pytest.raises(CkavgError, match=f"{place.name} is {kind}, expected a file"):
            ckavg.open_run(tmp_path / "flat" if place.parent.name == "flat" else source, to_step=20)


# --- huge and deep files ---


def test_huge_and_deep_json_takes_no_memory(source: Path) -> None:
    """In a process of its own, with 600 MB of address space beyond what it has when it begins."""
    deep = "[" * 5_000_000
    many = "[" + "[]," * 15_000_000 + "0]"
    last = source / "checkpoint-30"
    (last / "trainer_state.json").write_text('{"global_step": 30, "log_history": ' + many + "}")
    (source / "checkpoint-20" / "trainer_state.json").write_text('{"global_step": ' + deep)
    (source / "checkpoint-10" / "config.json").write_text('{"model_type": ' + deep)
    (source / "checkpoint-20" / "config.json").touch()
    os.truncate(source / "checkpoint-20" / "config.json", 1 << 40)
    code = (
        "import resource, sys, ckavg; from ckavg.averaging.plan import plan_average\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000,) * 2)\n"
        "run = ckavg.open_run(sys.argv[1]); print(run.steps, sorted(plan_average(run, ckavg.EMA()).side_files))"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("the system does not tell how much memory is used")
    ran = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=False)
    assert ran.stdout == "(10, 20, 30) ['config.json', 'tokenizer.json']\n", ran.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"weight_map": {"w": "m.safetensors", "b": ' + "9" * 5000 + "}}", "is not a shard index"),
        ('{"weight_map": [' + "0," * 2_100_000 + "0]}", "more than 2,000,000 values"),
        ('{"weight_map": {}}', "lists no tensors"),
    ],
)
def test_absurd_indexes_are_refused(source: Path, text: str, told: str) -> None:
    write_checkpoint(source / "checkpoint-40", weights(40), shards=2)
    (source / "checkpoint-40" / INDEX).write_text(text)
    with pytest.raises(CkavgError, match=told):
        ckavg.open_run(source)


def test_numbers_that_claim_many_shards_are_one_problem(source: Path) -> None:
    (source / "checkpoint-30" / MODEL).rename(source / "checkpoint-30" / "model-00001-of-09999.safetensors")
    done = run_cli("ema", source)
    assert done.exit_code == 1
    assert "and neither do 9997 more of its 9999 shards." in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_too_many_shards_and_tensors_are_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"t{number}": f"model-{number}.safetensors" for number in range(reading.MOST_SHARDS + 1)}
    (source / "checkpoint-30" / MODEL).unlink()
    (source / "checkpoint-30" / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CkavgError, match="consists of 10,001 files, more than 10,000"):
        ckavg.open_run(source)
    monkeypatch.setattr(reading, "MOST_TENSORS", 1)
    with pytest.raises(CkavgError, match="holds more than 1 tensors"):
        ckavg.open_run(source, to_step=20)


def test_many_checkpoints_need_few_handles(tmp_path: Path) -> None:
    run = write_run(tmp_path, [weights(step) for step in range(40)], tuple(range(40)), shards=(2,))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, before[1]))
    try:
        assert len(ckavg.open_run(run).steps) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_equal_tables_are_kept_once(source: Path) -> None:
    first, *others = ckavg.open_run(source).checkpoints
    assert all(checkpoint.entries is first.entries for checkpoint in others)
