"""The Hub on loopback, as huggingface_hub reads it."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, HfFileSystem, RepoFile, RepoFolder, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

from tests.hub.server import Hub, Repo
from tests.remote.published import BY_TOKENS, digest_of, publish_folders, publish_revisions, weights
from tests.remote.questions import FILE, REPO


def files_of(api: HfApi, revision: str, folder: str | None = None) -> dict[str, int]:
    entries = api.list_repo_tree(REPO, folder, recursive=True, revision=revision)
    return {each.path: each.size for each in entries if isinstance(each, RepoFile)}


def test_revisions(hub: Hub, run: Path, repo: Repo, api: HfApi) -> None:
    refs = api.list_repo_refs(REPO)
    assert {each.name: each.target_commit for each in refs.branches} == repo.branches
    assert sorted(repo.branches) == ["main", "step10", "step20", "step30"]
    assert (refs.tags, refs.converts, refs.pull_requests) == ([], [], None)
    assert api.list_repo_refs(REPO, include_pull_requests=True).pull_requests == []
    assert sorted(files_of(api, "step20")) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert files_of(api, "main") == files_of(api, "step30")
    assert files_of(api, repo.branches["step10"])[FILE] == len(weights(run))


def test_tags_and_names_with_tokens(hub: Hub, run: Path, api: HfApi) -> None:
    repo = publish_revisions(hub, REPO, run, called=BY_TOKENS, tags=True)
    refs = api.list_repo_refs(REPO)
    assert [each.name for each in refs.branches] == ["main"]
    names = [each.name for each in refs.tags]
    assert names == [f"stage1-step{step}-tokens{step // 10}B" for step in (10, 20, 30)]
    assert api.repo_info(REPO, revision=names[0]).sha == repo.tags[names[0]]


def test_a_revision_with_slashes(repo: Repo, api: HfApi, run: Path) -> None:
    repo.branches["runs/2026/a"] = repo.branches["step10"]
    repo.pulls["refs/pr/1"] = repo.branches["step20"]
    assert api.repo_info(REPO, revision="runs/2026/a").sha == repo.branches["step10"]
    assert files_of(api, "runs/2026/a") == files_of(api, "step10")
    assert files_of(api, "refs/pr/1") == files_of(api, "step20")
    assert Path(hf_hub_download(REPO, FILE, revision="runs/2026/a")).read_bytes() == weights(run)
    assert api.get_paths_info(REPO, FILE, revision="runs/2026/a")[0].path == FILE


def test_folders(hub: Hub, run: Path, api: HfApi) -> None:
    publish_folders(hub, REPO, run)
    top = list(api.list_repo_tree(REPO))
    assert [each.path for each in top if isinstance(each, RepoFolder)] == [f"checkpoint-{n}" for n in (10, 20, 30)]
    inside = {f"checkpoint-10/{path.name}": path.stat().st_size for path in (run / "checkpoint-10").iterdir()}
    assert files_of(api, "main", "checkpoint-10") == inside
    assert [each.path for each in api.list_repo_tree(REPO, "checkpoint-10")] == sorted(inside)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "checkpoint-99"))
    found = api.get_paths_info(REPO, ["checkpoint-10", f"checkpoint-20/{FILE}", "checkpoint-30/config.json"])
    assert [(type(each), each.path) for each in found] == [
        (RepoFolder, "checkpoint-10"),
        (RepoFile, "checkpoint-30/config.json"),
    ], "what does not exist is left out"


def test_what_is_told_of_a_file(repo: Repo, run: Path, api: HfApi) -> None:
    (listed,) = [each for each in api.list_repo_tree(REPO, revision="step10", expand=True) if each.path == FILE]
    (looked,) = api.get_paths_info(REPO, FILE, revision="step10", expand=True)
    info = api.model_info(REPO, revision="step10", files_metadata=True)
    assert info.siblings is not None
    (sibling,) = [each for each in info.siblings if each.rfilename == FILE]
    assert isinstance(listed, RepoFile)
    assert isinstance(looked, RepoFile)
    assert listed == looked
    assert listed.lfs is not None
    assert sibling.lfs is not None
    assert listed.size == sibling.size == listed.lfs.size == len(weights(run))
    assert listed.lfs.sha256 == sibling.lfs.sha256
    assert listed.blob_id == sibling.blob_id != listed.lfs.sha256
    assert listed.last_commit is not None
    assert listed.last_commit.oid == repo.branches["step10"]
    metadata = api.get_hf_file_metadata(url=f"{api.endpoint}/{REPO}/resolve/step10/{FILE}")
    assert (metadata.etag, metadata.size) == (listed.lfs.sha256, listed.size)
    assert metadata.commit_hash == repo.branches["step10"]


def test_pages(hub: Hub, repo: Repo, api: HfApi) -> None:
    """Trees come in pages. The list of refs does not: huggingface_hub looks for no second page of it."""
    whole = files_of(api, "step20")
    hub.page = 3
    hub.forget()
    assert files_of(api, "step20") == whole
    assert hub.requests == [f"GET /api/models/{REPO}/tree/step20"] * 3
    repo.branches.update({f"many{number}": repo.branches["main"] for number in range(1_200)})
    assert len(api.list_repo_refs(REPO).branches) == 1_204


@pytest.mark.parametrize("small_elsewhere", [False, True])
def test_a_download(hub: Hub, repo: Repo, run: Path, small_elsewhere: bool) -> None:
    hub.small_elsewhere = small_elsewhere
    assert Path(hf_hub_download(REPO, FILE, revision="step10")).read_bytes() == weights(run)
    assert hub.requests == [f"HEAD /{REPO}/resolve/step10/{FILE}", f"GET /storage/{digest_of(weights(run))}"]
    small = Path(hf_hub_download(REPO, "config.json", revision="step10"))
    config = (run / "checkpoint-10" / "config.json").read_bytes()
    assert small.read_bytes() == config
    assert hub.served == {f"{REPO}@step10/{FILE}": len(weights(run)), f"{REPO}@step10/config.json": len(config)}
    assert hub.served_by_stage == {"fetch": len(weights(run)), "resolve": len(config)}
    assert any("/api/resolve-cache/" in line for line in hub.requests) == small_elsewhere


def test_a_snapshot(hub: Hub, repo: Repo, run: Path) -> None:
    place = Path(snapshot_download(REPO, revision="step20"))
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {
        **hub.files(REPO, "step20"),
        ".gitattributes": (place / ".gitattributes").read_bytes(),
    }
    assert hub.served.total() == sum(path.stat().st_size for path in place.iterdir())


def test_files_and_ranges_by_fsspec(hub: Hub, repo: Repo, run: Path) -> None:
    files = HfFileSystem(endpoint=hub.url, skip_instance_cache=True)
    assert f"{REPO}@step10/{FILE}" in files.ls(f"{REPO}@step10", detail=False)
    assert files.info(f"{REPO}@step10/{FILE}")["size"] == len(weights(run))
    hub.forget()
    with files.open(f"{REPO}@step10/{FILE}", block_size=1_000, cache_type="none") as file:
        file.seek(500_000)
        assert file.read(2_000) == weights(run)[500_000:502_000]
    assert hub.served == {f"{REPO}@step10/{FILE}": 2_000}
    assert hub.ranges[-1] == (f"GET /storage/{digest_of(weights(run))}", "bytes=500000-501999")
    with files.open(f"{REPO}@step10/{FILE}", block_size=0) as file:
        assert file.read() == weights(run)


@pytest.mark.parametrize(
    ("asked", "status", "got"),
    [
        ("bytes=0-0", 206, slice(0, 1)),
        ("bytes=10-", 206, slice(10, None)),
        ("bytes=-7", 206, slice(-7, None)),
        ("bytes=5-99999999", 206, slice(5, None)),
        ("bytes=0-1,5-6", 200, slice(None)),
        ("lines=1-2", 200, slice(None)),
        ("bytes=99999999-", 416, slice(0, 0)),
    ],
)
def test_ranges(hub: Hub, repo: Repo, run: Path, asked: str, status: int, got: slice) -> None:
    answer = httpx2.get(
        f"{hub.url}/{REPO}/resolve/step10/{FILE}", headers={"Range": asked}, follow_redirects=True, trust_env=False
    )
    data = weights(run)
    assert (answer.status_code, answer.content) == (status, data[got])
    begin, end, _ = got.indices(len(data))
    told = {200: None, 206: f"bytes {begin}-{end - 1}/{len(data)}", 416: f"bytes */{len(data)}"}
    assert answer.headers.get("Content-Range") == told[status]


def test_a_branch_that_moves(hub: Hub, repo: Repo, run: Path, api: HfApi) -> None:
    """Between the question what there is and the next one. The counts keep the name under which it was published."""
    before = repo.branches["step10"]
    hub.then["refs"] = lambda: repo.branches.update(step10=repo.branches["step30"])
    assert {each.name: each.target_commit for each in api.list_repo_refs(REPO).branches}["step10"] == before
    assert Path(hf_hub_download(REPO, FILE, revision="step10")).read_bytes() == weights(run, 30)
    assert hub.served == {f"{REPO}@step30/{FILE}": len(weights(run))}
    assert Path(hf_hub_download(REPO, FILE, revision=before)).read_bytes() == weights(run)

    hub.then["list"] = lambda: repo.branches.pop("step20")
    list(api.list_repo_tree(REPO, revision="step20"))
    for ask in (
        lambda: list(api.list_repo_tree(REPO, revision="step20")),
        lambda: api.repo_info(REPO, revision="step20"),
        lambda: api.get_paths_info(REPO, FILE, revision="step20"),
        lambda: hf_hub_download(REPO, FILE, revision="step20"),
    ):
        with pytest.raises(RevisionNotFoundError):
            ask()


def test_a_file_that_is_not_there(repo: Repo) -> None:
    with pytest.raises(EntryNotFoundError) as caught:
        hf_hub_download(REPO, FILE, revision="step20")
    assert not isinstance(caught.value, LocalEntryNotFoundError)
