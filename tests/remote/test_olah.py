"""A Hub that others wrote, as huggingface_hub reads it: the same answers as those of the Hub on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, HfFileSystem, RepoFile, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError

from tests.hub.server import Hub
from tests.remote.mirrors import BLOCK, Olah
from tests.remote.questions import FILE


def expected(hub: Hub, olah: Olah, revision: str) -> dict[str, bytes]:
    repo = hub.repos[olah.name]
    return {path: data for path, (data, _) in repo.commits[repo.branches[revision]].items()}


def assert_listed(hub: Hub, olah: Olah) -> None:
    """Refs, trees and files are told as they are on the Hub on loopback, but for the names of commits in git."""
    api, ours = HfApi(endpoint=olah.url, token=False), HfApi(endpoint=hub.url, token=False)
    refs = api.list_repo_refs(olah.name)
    assert {each.name: each.target_commit for each in refs.branches} == olah.branches
    assert sorted(olah.branches) == ["main", "step10", "step20", "step30"]
    for branch, commit in olah.branches.items():
        for revision in (branch, commit):
            assert api.repo_info(olah.name, revision=revision).sha == commit
            tree = {each.path: each for each in api.list_repo_tree(olah.name, revision=revision, recursive=True)}
            same = {each.path: each for each in ours.list_repo_tree(olah.name, revision=branch, recursive=True)}
            assert tree == same
            names = [path for path, each in tree.items() if isinstance(each, RepoFile) and each.lfs]
            found = api.get_paths_info(olah.name, [*names, "nowhere"], revision=revision)
            assert [(each.path, each) for each in found] == [(path, tree[path]) for path in names]


def test_the_mirror_of_a_hub_lists_it(hub: Hub, olah: Olah) -> None:
    assert_listed(hub, olah)
    api = HfApi(endpoint=olah.url, token=False)
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(olah.name, revision="step99")
    with pytest.raises(HfHubHTTPError):
        api.list_repo_refs("lab/other")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(olah.name, "nowhere.json", revision="step10", token=False)


def test_the_mirror_of_a_hub_gives_files_and_ranges(hub: Hub, olah: Olah) -> None:
    for revision in ("step10", "step20", "step30"):
        place = Path(snapshot_download(olah.name, revision=revision, token=False))
        assert {path.name: path.read_bytes() for path in place.iterdir()} == expected(hub, olah, revision)
    hub.forget()
    files = HfFileSystem(endpoint=olah.url, token=False, skip_instance_cache=True)
    data = expected(hub, olah, "step10")[FILE]
    assert files.cat_file(f"{olah.name}@step10/{FILE}", start=500_000, end=500_100) == data[500_000:500_100]
    assert hub.served.total() == 0, "it has kept them"


def test_the_mirror_of_a_hub_reads_it_in_blocks(hub: Hub, olah: Olah) -> None:
    files = HfFileSystem(endpoint=olah.url, token=False, skip_instance_cache=True)
    path, data = f"{olah.name}@step30/{FILE}", expected(hub, olah, "step30")[FILE]
    assert files.info(path)["size"] == len(data)
    with files.open(path, block_size=100, cache_type="none") as file:
        file.seek(500_000)
        assert file.read(100) == data[500_000:500_100]
        assert hub.served == {path: BLOCK}
        assert {asked for line, asked in hub.ranges if "/storage/" in line} == {f"bytes={BLOCK}-{2 * BLOCK - 1}"}
        file.seek(len(data) - 10)
        assert file.read(10) == data[-10:]
        assert hub.served == {path: BLOCK + len(data) % BLOCK}


def test_a_git_repository_as_a_hub(olah_of_git: Olah, hub: Hub) -> None:
    olah = olah_of_git
    for revision in ("step10", "step20", "step30"):
        place = Path(snapshot_download(olah.name, revision=revision, token=False))
        assert place.name == olah.branches[revision]
        assert {path.name: path.read_bytes() for path in place.iterdir()} == expected(hub, olah, revision)
    files = HfFileSystem(endpoint=olah.url, token=False, skip_instance_cache=True)
    data = expected(hub, olah, "step10")[FILE]
    # all of the file came, with status 200, and its first bytes are taken for those that were asked for
    assert files.cat_file(f"{olah.name}@step10/{FILE}", start=500_000, end=500_100) == data[:100]
    assert data[:100] != data[500_000:500_100]
