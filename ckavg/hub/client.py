"""Stage *publish*, its outer end: repositories, rights and files on the Hugging Face Hub.

The only user of huggingface_hub, which is imported when something is asked of the Hub. Knows nothing of results. The
token stays with huggingface_hub: it is looked for where its users expect, and no value here ever holds it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ckavg.errors import CkavgError, HubError
from ckavg.hub.answers import explained, may_not_write
from ckavg.hub.destination import MAIN, Destination
from ckavg.hub.rights import check_token, may_create

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_BY_ITSELF = 1 << 20
"""Bytes from which a file is uploaded by itself, before the commit. Smaller ones go with the commit."""


@dataclass(frozen=True, slots=True)
class Access:
    """What was found before an upload: the full name of the repository, and what of it exists."""

    repo: str
    exists: bool
    has_branch: bool


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


def check_access(destination: Destination, names: Collection[str] = ()) -> Access:
    """Find out whether an upload would be let in, and change nothing.

    Args:
        destination: where it would go.
        names: of the files that would be uploaded.

    Raises:
        HubError: there is no token; it may not write there; the owner does not exist; the repository is not private, or
            not public, as it was asked for; or weights that a loader might take for these lie there.
    """
    api = _api()
    with _asking("asking whose the token is", destination.repo, api):
        me = api.whoami()
        if not isinstance(me.get("name"), str):
            raise ValueError("it names nobody")
    repo = destination.repo if "/" in destination.repo else f"{me['name']}/{destination.repo}"
    check_token(me, repo, api.endpoint, create_pr=destination.create_pr)
    with _asking("looking at the repository", repo, api):
        private = _is_private(api, repo)
    if private is None:
        _check_owner(me, repo, api)
        return Access(repo, exists=False, has_branch=False)
    if destination.private is not None and private != destination.private:
        is_now, asked = ("private", "public") if private else ("public", "private")
        raise HubError(
            f"{repo} exists and is {is_now}; --{asked} was asked for.",
            hint=f"Leave out --{asked}, or change the repository at {api.endpoint}/{repo}/settings first.",
        )
    if not destination.create_pr:
        _check_writable(api, repo)
    revision = destination.revision or MAIN
    with _asking("looking at the repository", repo, api):
        refs = api.list_repo_refs(repo, include_pull_requests=True)
    if any(revision == each.name for each in refs.tags):
        raise HubError(f"{repo}: {revision} is a tag; an upload needs a branch.", hint="Name another --revision.")
    known = {each.name for each in refs.branches} | {each.ref for each in refs.pull_requests or ()}
    if revision.startswith("refs/") and revision not in known:
        raise HubError(f"{repo} has no {revision}.", hint=f"Its pull requests are at {api.endpoint}/{repo}/discussions")
    _check_other_weights(api, repo, revision if revision in known else MAIN, names)
    return Access(repo, exists=True, has_branch=revision in known)


def upload(
    destination: Destination,
    access: Access,
    files: Sequence[HubFile],
    *,
    message: str,
    on_done: Callable[[int], None],
) -> Uploaded:
    """Upload files as one commit; what is there already, of an earlier attempt, say, is not sent again.

    Args:
        destination: where they go.
        access: of `check_access`, just before.
        files: all of them.
        message: first line of the commit, where the destination has none.
        on_done: called with the bytes of what is done.

    Raises:
        HubError: the Hub refused, or cannot be reached. What was sent by then is not sent again by the next attempt.
    """
    from huggingface_hub import CommitOperationAdd

    api, repo = _api(), access.repo
    if not access.exists:
        with _asking("creating the repository", repo, api):
            api.create_repo(repo, private=destination.private is not False)
    revision = destination.revision or MAIN
    if not access.has_branch and revision != MAIN:
        with _asking(f"creating the branch {revision}", repo, api):
            api.create_branch(repo, branch=revision, exist_ok=True)
    operations = []
    for file in files:
        operation = CommitOperationAdd(file.name, str(file.path))
        if file.sha256 is not None:
            operation.upload_info.sha256 = bytes.fromhex(file.sha256)  # was read from the file a moment ago
        operations.append(operation)
    target: dict[str, Any] = {"revision": revision, "create_pr": destination.create_pr}
    for file, operation in zip(files, operations, strict=True):
        if file.size >= _BY_ITSELF:
            with _asking(f"uploading {file.name}", repo, api):
                api.preupload_lfs_files(repo, [operation], free_memory=False, **target)
            on_done(file.size)
    with _asking("committing", repo, api):
        done = api.create_commit(
            repo, operations, commit_message=destination.commit_message or message, num_threads=1, **target
        )
    on_done(sum(file.size for file in files if file.size < _BY_ITSELF))
    try:
        _check_arrived(api, repo, done.oid, files, operations)
    except HubError as error:
        if done.pr_url:
            error.add_note(f"The pull request is open, and another attempt opens another one: {done.pr_url}")
        raise
    branch = "" if revision == MAIN else f"/tree/{revision}"
    return Uploaded(repo, done.pr_url or f"{api.endpoint}/{repo}{branch}", done.oid)


def _api() -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    from huggingface_hub.utils import logging as of_client

    disable_progress_bars()  # the caller is told of progress, and shows it as it likes
    if not os.environ.get("HF_HUB_VERBOSITY") and not os.environ.get("HF_DEBUG"):
        of_client.set_verbosity_error()  # type: ignore[no-untyped-call]  # each retry would be a warning, with the address of a storage and its key
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=True)


@contextmanager
def _asking(doing: str, repo: str, api: HfApi) -> Iterator[None]:
    """Make an error of the client one of ours. Where its text holds the token, nothing of it is kept."""
    try:
        yield
    except CkavgError:
        raise
    except Exception as error:
        secret = holds_token(error)
        told = explained(error, doing=doing, repo=repo, endpoint=api.endpoint, quoting=not secret)
        if told is None:
            raise
        raise told from (None if secret else error)


def holds_token(error: BaseException) -> bool:
    """Whether the text of an exception, or of what caused it, holds the token."""
    from huggingface_hub import get_token

    token = get_token()
    return bool(token) and str(token) in "".join(traceback.format_exception(error))


def _is_private(api: HfApi, repo: str) -> bool | None:
    """Whether a model repository is private; None where there is none, as far as the token sees."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return bool(api.repo_info(repo).private)
    except RepositoryNotFoundError as error:
        status = error.response.status_code
        if status != 404:
            raise
        return None


def _check_owner(me: dict[str, Any], repo: str, api: HfApi) -> None:
    """Refuse to create a repository for somebody who does not exist, or for whom the token's user may not."""
    from huggingface_hub.errors import HfHubHTTPError

    owner = repo.partition("/")[0]
    if may_create(me, repo, api.endpoint):
        return
    # a client from before organizations could be looked up gets no further than the last line of the loop
    for look in (getattr(api, "get_organization_overview", lambda _: None), api.get_user_overview):
        try:
            with _asking(f"looking for {owner}", repo, api):
                look(owner)
        except HubError as error:
            cause = error.__cause__
            if not (isinstance(cause, HfHubHTTPError) and cause.response.status_code == 404):
                raise
        else:
            raise may_not_write(repo, api.endpoint, f"{me['name']} is not {owner}, nor a member of it")
    raise HubError(
        f"{repo}: there is no user and no organization {owner} at {api.endpoint}.",
        hint=f"Check the name. The token is that of {me['name']}.",
    )


def _check_writable(api: HfApi, repo: str) -> None:
    import inspect

    if "write" not in inspect.signature(api.auth_check).parameters:
        return  # a client from before there was such a question; the Hub answers it when the upload begins
    with _asking("asking whether the token may write", repo, api):
        api.auth_check(repo, write=True)


def _check_other_weights(api: HfApi, repo: str, revision: str, names: Collection[str]) -> None:
    """Refuse weights beside those to be uploaded: which of them a loader takes is a matter of its taste."""
    folders = {PurePosixPath(name).parent for name in names if name.endswith(_WEIGHTS)}
    with _asking("listing its files", repo, api):
        there = api.list_repo_files(repo, revision=revision)
    others = [
        name
        for name in there
        if name.endswith(_WEIGHTS) and name not in names and PurePosixPath(name).parent in folders
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise HubError(
            f"{repo} holds other weights at {revision}, which would be loaded in part or instead: "
            f"{', '.join(others[:3])}{more}.",
            hint=f"Delete them at {api.endpoint}/{repo}/tree/{revision}, or name another repository.",
        )


def _check_arrived(
    api: HfApi, repo: str, commit: str, files: Sequence[HubFile], operations: Sequence[CommitOperationAdd]
) -> None:
    """Look at what the commit holds: a .gitignore there, for one, silently keeps files out."""
    with _asking("looking at what was uploaded", repo, api):
        there = {each.path: each for each in api.get_paths_info(repo, [file.name for file in files], revision=commit)}
    for file, operation in zip(files, operations, strict=True):
        found = there.get(file.name)
        lfs = getattr(found, "lfs", None)
        arrived = found is not None and getattr(found, "size", None) == file.size
        if not arrived or (lfs is not None and lfs.sha256 != operation.upload_info.sha256.hex()):
            raise HubError(
                f"{repo}: {file.name} is not in commit {commit[:8]} as it was sent.",
                hint=f"Look for a .gitignore at {api.endpoint}/{repo}/tree/{commit}",
            )
