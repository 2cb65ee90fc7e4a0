"""Stage *publish*, its outer end: repositories and rights on the Hugging Face Hub.

With `sending.py`, the only user of huggingface_hub, which is imported when something is asked of the Hub. Knows nothing
of results. The token stays with huggingface_hub: it is looked for where its users expect, and no value here holds it
longer than it takes to see whether a message does.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ckavg.errors import CkavgError, HubError
from ckavg.hub.answers import explained, holds_key, may_not_write, passwords_in, without_password
from ckavg.hub.destination import MAIN, Destination
from ckavg.hub.retrying import Answer, tried
from ckavg.hub.rights import check_token, may_create

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Access:
    """What was found before an upload: the full name of the repository, and what of it exists."""

    repo: str
    exists: bool
    has_branch: bool


def check_access(destination: Destination, names: Collection[str] = ()) -> Access:
    """Find out whether an upload would be let in, and change nothing.

    Args:
        destination: where it would go.
        names: of the files that would be uploaded.

    Raises:
        HubError: there is no token; it may not write there; the owner does not exist; the repository is not private, or
            not public, as it was asked for; or weights that a loader might take for these lie there.
    """
    api = connect()
    with asking("asking whose the token is", destination.repo, api):
        me = tried(api.whoami)
        if not isinstance(me.get("name"), str):
            raise ValueError("it names nobody")
    repo = destination.repo if "/" in destination.repo else f"{me['name']}/{destination.repo}"
    check_token(me, repo, address(api), create_pr=destination.create_pr)
    private = ask("looking at the repository", repo, api, lambda: is_private(api, repo))
    if private is None:
        _check_owner(me, repo, api)
        return Access(repo, exists=False, has_branch=False)
    if destination.private is not None and private != destination.private:
        is_now, asked = ("private", "public") if private else ("public", "private")
        raise HubError(
            f"{repo} exists and is {is_now}; --{asked} was asked for.",
            hint=f"Leave out --{asked}, or change the repository at {address(api)}/{repo}/settings first.",
        )
    if not destination.create_pr:
        _check_writable(api, repo)
    revision = destination.revision or MAIN
    refs = ask("looking at the repository", repo, api, lambda: api.list_repo_refs(repo, include_pull_requests=True))
    if any(revision == each.name for each in refs.tags):
        raise HubError(f"{repo}: {revision} is a tag; an upload needs a branch.", hint="Name another --revision.")
    known = {each.name for each in refs.branches} | {each.ref for each in refs.pull_requests or ()}
    if revision.startswith("refs/") and revision not in known:
        raise HubError(f"{repo} has no {revision}.", hint=f"Its pull requests are at {address(api)}/{repo}/discussions")
    _check_other_weights(api, repo, revision if revision in known else MAIN, names)
    return Access(repo, exists=True, has_branch=revision in known)


def connect() -> HfApi:
    """The client, with the user's endpoint and token, and without bars and logs of its own."""
    return quiet_api(token=True)


def quiet_api(*, token: bool | None = None) -> HfApi:
    """The client of the user's endpoint, without bars and logs of its own.

    Args:
        token: as huggingface_hub understands it: True requires one, None uses one where there is one.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    from huggingface_hub.utils import logging as of_client

    disable_progress_bars()  # the caller is told of progress, and shows it as it likes
    if not os.environ.get("HF_HUB_VERBOSITY") and not os.environ.get("HF_DEBUG"):
        of_client.set_verbosity_error()  # type: ignore[no-untyped-call]  # each retry would be a warning, with the address of a storage and its key
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)


def address(api: HfApi) -> str:
    """Of the Hub, as it may be shown: without a user and a password in it."""
    return without_password(api.endpoint)


@contextmanager
def asking(doing: str, repo: str, api: HfApi) -> Iterator[None]:
    """Make an error of the client one of ours. Where its text holds a secret or a key, nothing of it is kept.

    Args:
        doing: what is being done, such as "creating the repository".
        repo: the repository.
        api: the client.

    Raises:
        HubError: what the client's error means.
    """
    try:
        yield
    except CkavgError:
        raise
    except Exception as error:
        secret = holds_secret(error, api)
        told = explained(error, doing=doing, repo=repo, endpoint=address(api), quoting=not secret)
        if told is None:
            raise
        # a traceback would show whatever it says: in the addresses of large files, the key to them
        raise told from (None if secret or holds_key(error) else error)


def ask(doing: str, repo: str, api: HfApi, question: Callable[[], Answer]) -> Answer:
    """The answer to a question that may be asked several times, and is where that helps; errors as of `asking`."""
    with asking(doing, repo, api):
        return tried(question)


def holds_secret(error: BaseException, api: HfApi) -> bool:
    """Whether the text of an exception, or of what caused it, holds the token or a password of the address."""
    from huggingface_hub import get_token

    told = "".join(traceback.format_exception(error))
    return any(secret in told for secret in (get_token(), *passwords_in(api.endpoint)) if secret)


def is_private(api: HfApi, repo: str) -> bool | None:
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
    if may_create(me, repo, address(api)):
        return
    # a client from before organizations could be looked up gets no further than the last line of the loop
    for look in (getattr(api, "get_organization_overview", lambda _: None), api.get_user_overview):
        try:
            ask(f"looking for {owner}", repo, api, partial(look, owner))
        except HubError as error:
            cause = error.__cause__
            if not (isinstance(cause, HfHubHTTPError) and cause.response.status_code == 404):
                raise
        else:
            raise may_not_write(repo, address(api), f"{me['name']} is not {owner}, nor a member of it")
    raise HubError(
        f"{repo}: there is no user and no organization {owner} at {address(api)}.",
        hint=f"Check the name. The token is that of {me['name']}.",
    )


def _check_writable(api: HfApi, repo: str) -> None:
    import inspect

    if "write" in inspect.signature(api.auth_check).parameters:
        question = partial(api.auth_check, repo, write=True)
    else:  # a client from before there was such a question
        question = partial(_ask_for_right, api, repo)
    ask("asking whether the token may write", repo, api, question)


def _ask_for_right(api: HfApi, repo: str) -> None:
    import huggingface_hub.utils as of_client

    url = f"{api.endpoint}/api/models/{repo}/auth-check/write"
    headers = of_client.build_hf_headers(token=True)  # type: ignore[attr-defined]
    of_client.hf_raise_for_status(of_client.get_session().get(url, headers=headers))  # type: ignore[attr-defined]


def _check_other_weights(api: HfApi, repo: str, revision: str, names: Collection[str]) -> None:
    """Refuse weights beside those to be uploaded: which of them a loader takes is a matter of its taste."""
    folders = {PurePosixPath(name).parent for name in names if name.endswith(_WEIGHTS)}
    there = ask("listing its files", repo, api, lambda: api.list_repo_files(repo, revision=revision))
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
            hint=f"Delete them at {address(api)}/{repo}/tree/{revision}, or name another repository.",
        )
