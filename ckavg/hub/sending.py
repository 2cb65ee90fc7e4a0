"""Stage *publish*, its outer end: files to the Hugging Face Hub, large ones first, then one commit of all.

With `client.py`, the only user of huggingface_hub. Knows nothing of results.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.errors import HubError
from ckavg.hub.client import Access, address, ask, asking, connect, is_private
from ckavg.hub.destination import MAIN, Destination
from ckavg.hub.retrying import WAITS, is_passing, may_have_arrived, status_of, tried
from ckavg.hub.transfer import Transfer, operation_of, told_by_xet, tries_again

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_BY_ITSELF = 1 << 20
"""Bytes from which a file is uploaded by itself, before the commit. Smaller ones go with the commit."""

_COMMIT_HAS_MOVED = 412


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file to upload: its name in the repository, where it is, its size in bytes, and its SHA-256 where known."""

    name: str
    path: Path
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What came of an upload: full name, address to look at, and the commit."""

    repo: str
    url: str
    commit: str


@dataclass(frozen=True, slots=True)
class _Commit:
    """A commit on the Hub, and the address of the pull request that it opened, if it did."""

    oid: str
    pull_request: str | None = None


def upload(
    destination: Destination,
    access: Access,
    files: Sequence[HubFile],
    *,
    message: str,
    on_sent: Callable[[int], None],
) -> Uploaded:
    """Upload files as one commit; what is there already, of an earlier attempt, say, is not sent again.

    Args:
        destination: where they go.
        access: of `check_access`, just before.
        files: all of them.
        message: first line of the commit, where the destination has none.
        on_sent: called with the bytes that are done of all; while a file is sent, in a thread of the client's, too.

    Raises:
        HubError: the Hub refused, or cannot be reached. What was sent by then is not sent again by the next attempt.
    """
    api, repo = connect(), access.repo
    revision = destination.revision or MAIN
    _create(api, access, destination)
    transfer = Transfer(on_sent)
    operations = [operation_of(file.name, file.path, file.sha256, transfer) for file in files]
    for file, operation in zip(files, operations, strict=True):
        if file.size >= _BY_ITSELF:
            send = partial(
                api.preupload_lfs_files,
                repo,
                [operation],
                free_memory=False,
                revision=revision,
                create_pr=destination.create_pr,
            )
            with asking(f"uploading {file.name}", repo, api), told_by_xet(transfer):
                if tries_again():
                    send()
                else:
                    tried(send)
            transfer.complete(file.size)
    done = _commit(api, repo, destination, files, operations, message)
    transfer.complete(sum(file.size for file in files if file.size < _BY_ITSELF))
    try:
        with asking("looking at what was uploaded", repo, api):
            absent = tried(lambda: _absent(api, repo, done.oid, files, operations))
        if absent is not None:
            raise HubError(
                f"{repo}: {absent} is not in commit {done.oid[:8]} as it was sent.",
                hint=f"Look for a .gitignore at {address(api)}/{repo}/tree/{done.oid}",
            )
    except HubError as error:
        if done.pull_request:
            error.add_note(f"The pull request is open, and another attempt opens another one: {done.pull_request}")
        raise
    branch = "" if revision == MAIN else f"/tree/{revision}"
    return Uploaded(repo, done.pull_request or f"{address(api)}/{repo}{branch}", done.oid)


def _create(api: HfApi, access: Access, destination: Destination) -> None:
    """The repository and the branch, where they do not exist."""
    repo, revision = access.repo, destination.revision or MAIN
    if not access.exists:

        def settled() -> bool | None:
            return True if is_private(api, repo) is not None else None

        def create() -> bool:
            api.create_repo(repo, private=destination.private is not False)
            return True

        with asking("creating the repository", repo, api):
            tried(create, settled=settled)
    if not access.has_branch and revision != MAIN:
        ask(
            f"creating the branch {revision}",
            repo,
            api,
            partial(api.create_branch, repo, branch=revision, exist_ok=True),
        )


def _commit(
    api: HfApi,
    repo: str,
    destination: Destination,
    files: Sequence[HubFile],
    operations: Sequence[CommitOperationAdd],
    message: str,
) -> _Commit:
    """The one commit, made once: where its answer is lost, what is there now is looked at before another attempt.

    An attempt names the commit that it follows. If the one before arrives late all the same, the Hub refuses the other.
    A pull request is opened by every commit that arrives, so that there is no further attempt after a lost answer.
    """
    revision = destination.revision or MAIN
    message = destination.commit_message or message

    def arrived() -> _Commit | None:
        head = _head(api, repo, revision)
        return None if _absent(api, repo, head, files, operations) else _Commit(head)

    def commit() -> _Commit:
        parent = None if destination.create_pr else _head(api, repo, revision)
        try:
            done = api.create_commit(
                repo,
                operations,
                commit_message=message,
                num_threads=1,
                revision=revision,
                create_pr=destination.create_pr,
                parent_commit=parent,
            )
        except Exception as error:
            if status_of(error) == _COMMIT_HAS_MOVED and (found := arrived()):
                return found
            raise
        return _Commit(done.oid, done.pr_url)

    with asking("committing", repo, api):
        if not destination.create_pr:
            return tried(commit, settled=arrived)
        return _open_pull_request(api, repo, commit, lambda ref: not _absent(api, repo, ref, files, operations))


def _open_pull_request(api: HfApi, repo: str, commit: Callable[[], _Commit], is_ours: Callable[[str], bool]) -> _Commit:
    """The same as a pull request; one that was opened although the answer was lost is found among the new ones."""
    before = tried(lambda: _pull_requests(api, repo))

    def attempt() -> _Commit:
        try:
            return commit()
        except Exception as error:
            if not (is_passing(error) and may_have_arrived(error)):
                raise
            for wait in WAITS:
                time.sleep(wait)
                for ref in sorted(tried(lambda: _pull_requests(api, repo)) - before):
                    if is_ours(ref):
                        url = f"{address(api)}/{repo}/discussions/{ref.rpartition('/')[2]}"
                        return _Commit(_head(api, repo, ref), url)
            raise HubError(
                f"{repo}: the answer to the commit was lost, and no pull request of it is there yet.",
                hint=f"Look in some minutes whether it is, before another attempt: {address(api)}/{repo}/discussions",
            ) from None

    return tried(attempt)


def _pull_requests(api: HfApi, repo: str) -> set[str]:
    return {each.ref for each in api.list_repo_refs(repo, include_pull_requests=True).pull_requests or ()}


def _head(api: HfApi, repo: str, revision: str) -> str:
    return str(api.repo_info(repo, revision=revision).sha)


def _absent(
    api: HfApi, repo: str, revision: str, files: Sequence[HubFile], operations: Sequence[CommitOperationAdd]
) -> str | None:
    """The first file that is not there as it was sent, if one: a .gitignore, for one, silently keeps files out."""
    found: dict[str, Any] = {
        each.path: each for each in api.get_paths_info(repo, [file.name for file in files], revision=revision)
    }
    for file, operation in zip(files, operations, strict=True):
        there = found.get(file.name)
        if there is None or getattr(there, "size", None) != file.size:
            return file.name
        lfs = getattr(there, "lfs", None)
        if lfs is not None:
            is_same = lfs.sha256 == (file.sha256 or operation.upload_info.sha256.hex())
        else:
            is_same = there.blob_id == _blob_id(file.path)
        if not is_same:
            return file.name
    return None


def _blob_id(path: Path) -> str:
    """What git calls the content of a small file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
