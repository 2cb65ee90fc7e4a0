"""A remote run gives the same bytes as a local one, and uses no more disk than allowed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

import ckavg
from ckavg.storage.atomic import cache_directory
from tests.cli.runner import run_cli, visible
from tests.exhaustive import all_but
from tests.hub.server import TOKEN, Hub
from tests.runs import write_run
from tests.storage.mirrors import Olah
from tests.storage.outcome import nothing_is_busy, served_of, size_of
from tests.storage.outcome import weights_of as tensors_of
from tests.storage.published import publish_folders, publish_revisions
from tests.storage.stores import Store

REPO = "ada/run"
REVISIONS = f"hf://{REPO}@step*"
STEPS = tuple(range(10, 110, 10))
HEADERS = 64 << 10
SMALL = 1_000_000
"""What configs, cards and locks take of the disk."""


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten checkpoints of 8.4 MB in two files, a random walk."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "embed": torch.randn(1000, 700, generator=generator),
        "layers.0.up": torch.randn(700, 1000, generator=generator),
        "layers.0.down": torch.randn(700, 1000, generator=generator),
        "norm": torch.ones(700),
    }
    walk = []
    for _ in STEPS:
        weights = {name: each + 0.02 * torch.randn(each.shape, generator=generator) for name, each in weights.items()}
        walk.append(weights)
    return write_run(tmp_path_factory.mktemp("long") / "run", walk, STEPS, shards=(2,))


def weights_of(result: Path) -> dict[str, bytes]:
    own = {"README.md", "ckavg.json"}
    return {name: (result / name).read_bytes() for name in visible(result) - own}


def on_disk(*directories: Path) -> int:
    """What directories take of the disk, sparse files as little as they do."""
    total = 0
    for directory in directories:
        for folder, _, names in os.walk(directory):
            for name in names:
                with suppress(FileNotFoundError):  # removed since it was listed
                    total += (Path(folder) / name).lstat().st_blocks * 512
    return total


@contextmanager
def most_on_disk(*directories: Path) -> Iterator[list[int]]:
    """The most that directories take of the disk in this block, looked at all the time."""
    peak = [0]
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], on_disk(*directories))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        peak[0] = max(peak[0], on_disk(*directories))


@pytest.mark.parametrize("max_disk", [None, "0", "30MB"])
@pytest.mark.parametrize("scheme", all_but((ckavg.PEMA(),), [ckavg.PEMA(), ckavg.BEMA()]), ids=["pema", "bema"])
def test_ten_revisions_give_the_bytes_of_the_disk(
    hub: Hub, long_run: Path, tmp_path: Path, scheme: ckavg.PEMA | ckavg.BEMA, max_disk: str | None
) -> None:
    publish_revisions(hub, REPO, long_run)
    expected = ckavg.average(ckavg.open_run(long_run), scheme, out=tmp_path / "local")
    run = ckavg.open_run(REVISIONS, max_disk=max_disk)
    assert run.steps == STEPS
    hub.forget()
    with most_on_disk(tmp_path / "hf-home", cache_directory()) as peak:
        got = ckavg.average(run, scheme, out=tmp_path / "remote")
    of_local, of_remote = weights_of(expected.directory), weights_of(got.directory)
    assert {name: of_remote[name] for name in of_local} == of_local
    assert (got.betas, got.weights, got.path_length) == (expected.betas, expected.weights, expected.path_length)
    passes = 2 if scheme.needs_path else 1
    size = size_of(long_run)
    if max_disk is None:
        assert size <= peak[0] < size + SMALL
        assert served_of(hub.served) == size
    elif max_disk == "0":
        assert peak[0] < SMALL
        assert served_of(hub.served) <= passes * size
    else:
        assert 20e6 < peak[0] < 30e6 + SMALL
        assert served_of(hub.served) < passes * size - (passes - 1) * 20e6


def test_what_is_in_the_cache_is_not_fetched_again(hub: Hub, long_run: Path, tmp_path: Path) -> None:
    publish_revisions(hub, REPO, long_run)
    ckavg.average(ckavg.open_run(REVISIONS), ckavg.EMA(), out=tmp_path / "first")
    hub.forget()
    ckavg.average(ckavg.open_run(REVISIONS), ckavg.EMA(gamma=0.1), out=tmp_path / "second")
    assert served_of(hub.served) == 0


def test_a_sample_fetches_little_more_than_one_reading(hub: Hub, long_run: Path, tmp_path: Path) -> None:
    publish_revisions(hub, REPO, long_run)
    measured = ckavg.path_length(ckavg.open_run(REVISIONS), sample=0.01)
    of_sample = served_of(hub.served)
    assert of_sample < 0.05 * size_of(long_run) + 20 * HEADERS
    hub.forget()
    result = ckavg.average(ckavg.open_run(REVISIONS, max_disk=0), ckavg.PEMA(), sample=0.01, out=tmp_path / "out")
    assert size_of(long_run) < served_of(hub.served) < 1.2 * size_of(long_run)
    exact = ckavg.path_length(ckavg.open_run(long_run))
    assert result.path_length == measured.lengths
    assert measured.standard_errors is not None
    assert abs(measured.lengths[-1] - exact.lengths[-1]) < 4 * measured.standard_errors[-1]


def test_folders_of_one_revision(hub: Hub, long_run: Path, tmp_path: Path) -> None:
    publish_folders(hub, REPO, long_run, revision="v2")
    expected = ckavg.average(ckavg.open_run(long_run), ckavg.EMA(), out=tmp_path / "local")
    got = ckavg.average(ckavg.open_run(f"hf://{REPO}@v2"), ckavg.EMA(), out=tmp_path / "remote")
    assert weights_of(got.directory) == weights_of(expected.directory)
    assert str(got.inputs[0].directory) == f"hf://{REPO}@{hub.repos[REPO].branches['v2']}/checkpoint-10"


@pytest.mark.parametrize("scheme", all_but((ckavg.PEMA(),), [ckavg.PEMA(), ckavg.EMA()]), ids=["pema", "ema"])
def test_an_object_store_gives_the_bytes_of_the_disk(
    s3: Store, long_run: Path, tmp_path: Path, scheme: ckavg.PEMA | ckavg.EMA
) -> None:
    address = s3.upload(long_run, "runs/one")
    expected = ckavg.average(ckavg.open_run(long_run), scheme, out=tmp_path / "local")
    run = ckavg.open_run(address)
    s3.forget()
    with most_on_disk(cache_directory()) as peak:
        got = ckavg.average(run, scheme, out=tmp_path / "remote")
    assert weights_of(got.directory) == weights_of(expected.directory)
    tensors = 10 * 4 * (3 * 700_000 + 700)  # what is fetched as it is read leaves out the headers
    assert served_of(s3.served) == (size_of(long_run) if scheme.needs_path else tensors)
    assert peak[0] < SMALL + (size_of(long_run) if scheme.needs_path else 0)
    assert not [path for path in cache_directory().rglob("*.safetensors") if path.is_file()]


def test_an_object_store_within_a_bound(s3: Store, long_run: Path, tmp_path: Path) -> None:
    address = s3.upload(long_run)
    expected = ckavg.average(ckavg.open_run(long_run), ckavg.PEMA(), out=tmp_path / "local")
    with most_on_disk(cache_directory()) as peak:
        run = ckavg.open_run(address, max_disk="30MB")
        got = ckavg.average(run, ckavg.PEMA(), out=tmp_path / "remote")
    assert weights_of(got.directory) == weights_of(expected.directory)
    assert 20e6 < peak[0] < 30e6 + SMALL


def test_the_anchor_may_be_elsewhere(hub: Hub, long_run: Path, tmp_path: Path) -> None:
    publish_revisions(hub, REPO, long_run)
    base = long_run / "checkpoint-10"
    expected = ckavg.average(ckavg.open_run(long_run, init=base, from_step=20), ckavg.BEMA(), out=tmp_path / "local")
    run = ckavg.open_run(long_run, init=f"hf://{REPO}@step10", from_step=20)
    got = ckavg.average(run, ckavg.BEMA(), out=tmp_path / "remote")
    of_local = weights_of(expected.directory)
    assert {name: weights_of(got.directory)[name] for name in of_local} == of_local
    assert got.to_dict()["selection"]["init"] == f"hf://{REPO}@step10"
    assert got.source == str(long_run)
    card = (got.directory / "README.md").read_text().replace('"', "")
    assert f"base_model: {REPO}\n" in card
    assert "base_model_relation: finetune\n" in card
    assert f"\n    ckavg bema --eta 0.2 --init hf://{REPO}@step10 --from-step 20\n" in card


def test_both_ends_on_the_command_line(
    hub: Hub, long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_revisions(hub, REPO, long_run)
    monkeypatch.chdir(tmp_path)
    words = ("pema", f"hf://{REPO}", "--revisions", "step*", "--last", "4", "--max-disk", "20MB")
    told = json.loads(run_cli(*words, "--dry-run", "--json").stdout)
    assert told["fetch"]["to_disk_bytes"] + told["fetch"]["streamed_bytes"] / 2 == pytest.approx(
        4 / 10 * size_of(long_run), rel=0.01
    )
    assert 12e6 < told["fetch"]["to_disk_bytes"] <= 20e6
    assert served_of(hub.served) <= 8 * HEADERS
    done = run_cli(*words, "--push-to-hub", "ada/averaged")
    assert done.exit_code == 0, done.stderr
    assert f"fetch  {told['fetch']['to_disk_bytes'] / 1e6:.1f} MB to {tmp_path / 'hf-home'}" in done.stderr
    result = tmp_path / "averaged" / "pema-gamma0.15-last4"
    pushed = hub.files("ada/averaged")
    assert pushed.keys() == visible(result)
    assert all((result / name).read_bytes() == data for name, data in pushed.items())
    record = json.loads((result / "ckavg.json").read_text())
    assert record["source"] == f"hf://{REPO}"
    assert record["selection"] == {"last": 4, "revisions": ["step*"]}
    commits = hub.repos[REPO].branches
    assert [each["directory"] for each in record["inputs"]] == [
        f"hf://{REPO}@{commits[f'step{step}']}" for step in STEPS[-4:]
    ]
    card = (result / "README.md").read_text().replace('"', "")
    assert f"base_model: {REPO}\n" in card
    assert "base_model_relation: merge\n" in card
    assert "license: apache-2.0" in card
    assert f"\n    ckavg pema hf://{REPO} --gamma 0.15 --last 4 --revisions 'step*'\n" in card
    assert f"The checkpoints are those of [`{REPO}`](https://huggingface.co/{REPO})." in card
    everything = done.stdout + done.stderr + "".join(data.decode(errors="replace") for data in pushed.values())
    assert TOKEN not in everything
    assert str(cache_directory()) not in everything


def test_a_result_is_verified_against_checkpoints_elsewhere(hub: Hub, long_run: Path, tmp_path: Path) -> None:
    repo = publish_revisions(hub, REPO, long_run)
    run = ckavg.open_run(REVISIONS, last=3, max_disk=0)
    result = ckavg.average(run, ckavg.EMA(), out=tmp_path / "out").directory
    repo.branches["step100"] = repo.branches["step10"]  # the record knows the commit
    assert ckavg.verify_result(result, sources=True, fetch=True).problems == ()
    commit = json.loads((result / "ckavg.json").read_text())["inputs"][-1]["directory"].partition("@")[2]
    tree = repo.commits[commit]
    name = next(name for name in tree if name.endswith(".safetensors"))
    changed = bytearray(tree[name][0])
    changed[-1] ^= 0x40
    repo.commits[commit] = tree | {name: (bytes(changed), True)}
    hub.put(repo, repo.commits[commit], "the bytes alone")
    (problem,) = ckavg.verify_result(result, sources=True, fetch=True).problems
    assert "step 100: the weights in hf://ada/run@" in problem
    assert "are not the averaged ones" in problem
    repo.commits[commit] = tree
    verified = ckavg.verify_result(result, replay=True, sources=True, fetch=True)
    assert verified.problems == ()
    assert verified.elements == 10_000


# --- a Hub that others wrote ---


def assert_the_bytes_of_the_disk(olah: Olah, run: Path, tmp_path: Path, max_disk: int | None) -> None:
    expected = tensors_of(ckavg.average(ckavg.open_run(run), ckavg.PEMA(), out=tmp_path / "local").directory)
    opened = ckavg.open_run(f"hf://{olah.name}", revisions=["step*"], max_disk=max_disk)
    assert opened.steps == (10, 20, 30)
    result = ckavg.average(opened, ckavg.PEMA(), out=tmp_path / "remote")
    assert tensors_of(result.directory) == expected
    commits = [olah.branches[f"step{step}"] for step in (10, 20, 30)]
    assert [str(each.directory) for each in result.inputs] == [f"hf://{olah.name}@{commit}" for commit in commits]
    assert run_cli("verify", result.directory, "--fetch", "--sources").exit_code == 0
    del opened
    nothing_is_busy()


@pytest.mark.parametrize("max_disk", all_but((0,), [None, 0]))
def test_the_mirror_of_a_hub(hub: Hub, olah: Olah, run: Path, tmp_path: Path, max_disk: int | None) -> None:
    assert_the_bytes_of_the_disk(olah, run, tmp_path, max_disk)


@pytest.mark.parametrize("max_disk", [None, 0])
def test_a_git_repository(olah_of_git: Olah, run: Path, tmp_path: Path, max_disk: int | None) -> None:
    assert_the_bytes_of_the_disk(olah_of_git, run, tmp_path, max_disk)
