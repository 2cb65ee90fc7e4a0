"""Push a result to the Hugging Face Hub: checked against its record, then one commit of all of it.

The only user of the write side of huggingface_hub, which is imported when the Hub is asked and finds the token
where its users expect it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.engine.context import OnProgress, Progress
from ckavg.errors import HubError, RecordError, SettingError, listed, short_repr
from ckavg.output.commands import as_options, shell_word
from ckavg.output.output_path import CARD
from ckavg.output.record import Record, read_record
from ckavg.storage.address import as_repository
from ckavg.storage.hub_errors import ask, connect, endpoint_of, hub_errors, may_pass, retry, status_of
from ckavg.storage.redaction import shown_address
from ckavg.verify.files import Part, check_files
from ckavg.verify.findings import Report

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

    Operations = Mapping[str, CommitOperationAdd]

MAIN = "main"
_NO_BRANCH = re.compile(r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|@\{|//|^[-/.]|[/.]$|\.lock$|^$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_ROLES_THAT_WRITE = ("admin", "write", "contributor")
_SMALL = (RESULT_RECORD, CARD)
_LARGE = 1 << 20
"""Bytes from which a file is uploaded before the commit. Smaller ones go with the commit."""

_HAS_MOVED = 412
"""Status of a commit whose parent is no longer the head of the branch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where an upload goes.

    Attributes:
        repo: `owner/name`; the name alone is that of a repository of the token's user.
        private: whether the repository must be private (True) or public (False); None: private where it is created,
            and as it is where it exists.
        revision: the branch, created from `main` if need be, or `refs/pr/N`; None: `main`.
        commit_message: its first line; None: one that names the average.
        create_pr: open a pull request rather than change the branch.

    Raises:
        SettingError: a name or a combination that no repository could have.
    """

    repo: str
    private: bool | None = None
    revision: str | None = None
    commit_message: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.repo)
        except HFValidationError:
            name, revision = as_repository(self.repo)
            meant = f"{name} --revision {revision}" if revision else name
            raise SettingError(
                f"Invalid repository id {shown_address(self.repo[:200])!r}: expected owner/name.",
                hint=f"Did you mean {meant}?" if meant else "For example: my-org/my-model-averaged",
            ) from None
        if self.revision is not None and _NO_BRANCH.search(self.revision):
            raise SettingError(f"Invalid branch name {self.revision!r}.", hint="For example: --revision pema-gamma0.15")
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            raise SettingError(f"{self.revision} is a commit; an upload needs a branch.", hint="Name a branch.")
        if self.create_pr and self.revision not in (None, MAIN):
            raise SettingError(
                "A pull request is always made to main, and does not go with another revision.",
                hint="Leave out --revision; or, to add to a pull request, --create-pr for --revision refs/pr/N.",
            )
        if self.commit_message is not None and not self.commit_message.strip():
            raise SettingError("The commit message is empty.", hint="Leave it out for one that names the average.")

    @property
    def branch(self) -> str:
        """The branch, or `refs/pr/N`."""
        return self.revision or MAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What was uploaded.

    Attributes:
        result: the directory.
        repo: full name of the repository.
        revision: the branch, or `refs/pr/N`; None where a pull request was opened.
        url: where to look at it: the repository, the branch or the pull request.
        commit: the commit that holds it.
        files: names of all its files, those included that were there already.
        bytes: size of all of them.
        warnings: what a user should know.
    """

    result: Path
    repo: str
    revision: str | None
    url: str
    commit: str
    files: tuple[str, ...]
    bytes: int
    warnings: tuple[str, ...] = ()

    __repr__ = short_repr

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        values = dataclasses.asdict(self)
        return values | {"result": str(self.result), "files": list(self.files), "warnings": list(self.warnings)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """A result whose rights and files were checked: what goes where, and bytes and SHA-256 of every file by name."""

    directory: Path
    destination: Destination
    repo: str
    sizes: dict[str, int]
    sha256: dict[str, str]
    message: str
    warnings: tuple[str, ...]


def push_result(
    result: Record | Path | str,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    on_progress: OnProgress | None = None,
) -> Pushed:
    """Upload a result to the Hugging Face Hub as one commit: the files of its record, and the record.

    The files are first read again and compared with their SHA-256 in the record. What the Hub has already is not sent
    again, so that an upload that failed is continued by the same call. The token is found as huggingface_hub does.

    Args:
        result: a result, or the directory of one or of one of its snapshots.
        repo: `owner/name`, or a name of the token's user; created where it does not exist.
        private, revision, commit_message, create_pr: as of `Destination`.
        on_progress: called now and then while files are read, and after each large file that was sent.

    Raises:
        RecordError: there is no record, or the files are not those of it.
        ReadError: the system would not let us read it.
        HubError: the Hub refused, or cannot be reached.
        SettingError: a name that no repository or branch could have.
    """
    destination = Destination(
        repo=repo, private=private, revision=revision, commit_message=commit_message, create_pr=create_pr
    )
    directory = result.directory if isinstance(result, Record) else Path(result)
    return push(plan_push(directory, destination, on_progress=on_progress), on_progress=on_progress)


def plan_push(directory: Path, destination: Destination, *, on_progress: OnProgress | None = None) -> PushPlan:
    """Check the rights, then every file of a result against its record. Sends nothing; errors as of `push_result`."""
    record = read_record(directory)
    with _continuing(directory, destination):
        repo = check_access(destination, record.output.files)
    sizes, warnings = _check_files(directory, record, on_progress)
    # the record does not hold its own SHA-256, and people edit a card
    own = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in sizes if name in _SMALL}
    steps = f"steps {record.steps[0]} to {record.output.step}"
    return PushPlan(
        directory=directory,
        destination=destination,
        repo=repo,
        sizes=sizes,
        sha256={name: own.get(name) or record.output.sha256[name] for name in sizes},
        message=destination.commit_message or f"Upload {record.output.name}, the average of {steps}",
        warnings=warnings,
    )


def push(plan: PushPlan, *, on_progress: OnProgress | None = None, show_bars: bool = False) -> Pushed:
    """Upload a result: large files first, then one commit of all. What is there already is not sent again.

    Args:
        plan: of `plan_push`, just before.
        on_progress: called after each large file.
        show_bars: let huggingface_hub draw its progress bars on stderr.

    Raises:
        HubError: the Hub refused, or cannot be reached. What was sent by then is not sent again by the next attempt.
    """
    from huggingface_hub import CommitOperationAdd

    api, repo, destination = connect(token=True, show_bars=show_bars), plan.repo, plan.destination
    operations = {name: CommitOperationAdd(name, str(plan.directory / name)) for name in plan.sizes}
    done, total = 0, sum(plan.sizes.values())
    report = partial(_report, on_progress, total)
    with _continuing(plan.directory, destination):
        _create(api, repo, destination)
        for name in (name for name, size in plan.sizes.items() if size >= _LARGE):
            report(done)
            with hub_errors(f"uploading {name}", repo, api):  # the client itself repeats what fails
                api.preupload_lfs_files(
                    repo, [operations[name]], revision=destination.branch, create_pr=destination.create_pr
                )
            done += plan.sizes[name]
        report(done)
        oid, pull_request = _commit(api, plan, operations)
        _check_commit(api, plan, oid)
    report(total)
    branch = "" if destination.branch == MAIN else f"/tree/{destination.branch}"
    return Pushed(
        result=plan.directory,
        repo=repo,
        revision=None if destination.create_pr else destination.branch,
        url=pull_request or f"{endpoint_of(api)}/{repo}{branch}",
        commit=oid,
        files=tuple(plan.sizes),
        bytes=total,
        warnings=plan.warnings,
    )


def _report(on_progress: OnProgress | None, total: int, done: int) -> None:
    if on_progress:
        on_progress(Progress("upload", done, total))


def continued(directory: Path, destination: Destination) -> str:
    """How to go on after a failure, as a command to type."""
    settings: dict[str, object] = {
        "private": destination.private,
        "public": destination.private is False,
        "revision": destination.revision,
        "commit_message": destination.commit_message,
        "create_pr": destination.create_pr,
    }
    options = as_options({name: value for name, value in settings.items() if value})
    return f"Continue with: ckavg push {shell_word(str(directory))} {destination.repo} {options}".rstrip()


@contextmanager
def _continuing(directory: Path, destination: Destination) -> Iterator[None]:
    try:
        yield
    except HubError as error:
        error.add_note(f"The result is complete in {directory}. {continued(directory, destination)}")
        raise


def _check_files(
    directory: Path, record: Record, on_progress: OnProgress | None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Read a result's files, and return the sizes of those to be uploaded, and what should be known of them."""
    output, report = record.output, Report(on_progress)
    (sizes,) = check_files(report, [Part(directory, output)], within=directory)
    problems = [each.message for each in report.findings if each.is_problem]
    if problems:
        more = f" And {len(problems) - 1} more." if len(problems) > 1 else ""
        raise RecordError(
            f"{directory} is not what its record says: {problems[0]}{more}",
            hint=f"See all of it with: ckavg verify {shell_word(str(directory))}",
        )
    hidden = [name for name in output.files if any(part.startswith(".") for part in PurePosixPath(name).parts)]
    warnings = [each.message for each in report.findings]
    if output.directory.is_absolute():
        warnings.append(f"{RESULT_RECORD} is as earlier versions wrote it: it names directories of this machine.")
    return {name: sizes[name] for name in output.files if name not in hidden}, tuple(warnings)


# --- rights ---


def check_access(destination: Destination, names: Collection[str] = ()) -> str:
    """Find out whether an upload of files of these names would be let in, and return the full name of the repository.

    Raises:
        HubError: there is no token; it may not write there; the repository is not private, or not public, as it was
            asked for; or weights that a loader might take for these lie there.
    """
    api = connect(token=True)
    me = ask("checking the token", destination.repo, api, api.whoami)
    repo = destination.repo if "/" in destination.repo else f"{me['name']}/{destination.repo}"
    url = endpoint_of(api)
    check_token(me, repo, url, create_pr=destination.create_pr)
    private = ask("looking at the repository", repo, api, lambda: _is_private(api, repo))
    if private is None:
        check_owner(me, repo, url)
        return repo
    _check_visibility(private, destination, repo, url)
    if not destination.create_pr:
        ask("checking the right to write", repo, api, lambda: api.auth_check(repo, write=True))
    has_branch = _has_branch(api, repo, destination.branch)
    _check_other_weights(api, repo, destination.branch if has_branch else MAIN, names)
    return repo


def check_token(me: dict[str, Any], repo: str, url: str, *, create_pr: bool) -> None:
    """Refuse a token that may write nowhere or, if it is fine-grained, not there, by the Hub's answer to `whoami`.

    With `create_pr`, the right to open a pull request is enough. A kind of token that is not known is left to the Hub.
    """
    token = (me.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise _may_not_write(repo, url, "it is a read token")
    if token.get("role") != "fineGrained":
        return
    needed = ("repo.write", "discussion.write") if create_pr else ("repo.write",)
    fine = token.get("fineGrained") or {}
    granted = set(fine.get("global") or ())
    for scope in fine.get("scoped") or ():
        if str((scope.get("entity") or {}).get("name", "")).lower() in (_owner(repo), repo.lower()):
            granted.update(scope.get("permissions") or ())
    if not granted.intersection(needed):
        raise _may_not_write(repo, url, f"it is fine-grained, without {' or '.join(needed)} for {repo}")


def check_owner(me: dict[str, Any], repo: str, url: str) -> None:
    """Refuse to create a repository whose owner is neither the user nor an organization that lets them write."""
    user, owner = str(me["name"]), _owner(repo)
    roles = {str(each.get("name", "")).lower(): each.get("roleInOrg") for each in me.get("orgs") or ()}
    role = roles.get(owner)
    if owner != user.lower() and owner not in roles:
        raise HubError(
            f"{repo} does not exist, and {user} may not create it: {user} is not {owner}, nor a member of it.",
            hint="Check the name, and who is logged in: hf auth whoami",
        )
    if owner != user.lower() and role not in (None, *_ROLES_THAT_WRITE):
        raise _may_not_write(repo, url, f"{user} has the role {role} in {owner}")


def _owner(repo: str) -> str:
    return repo.partition("/")[0].lower()


def _may_not_write(repo: str, url: str, why: str) -> HubError:
    return HubError(
        f"{repo}: the token may not write there: {why}.",
        hint=f"Make a token with write access at {url}/settings/tokens, then: hf auth login --force",
    )


def _is_private(api: HfApi, repo: str) -> bool | None:
    """Whether a model repository is private; None where there is none, as far as the token sees."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return bool(api.repo_info(repo).private)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise
        return None


def _check_visibility(private: bool, destination: Destination, repo: str, url: str) -> None:
    if destination.private is not None and private != destination.private:
        is_now, asked = ("private", "public") if private else ("public", "private")
        raise HubError(
            f"{repo} exists and is {is_now}; --{asked} was asked for.",
            hint=f"Leave out --{asked}, or change the repository at {url}/{repo}/settings first.",
        )


def _has_branch(api: HfApi, repo: str, branch: str) -> bool:
    refs = ask("listing the branches", repo, api, lambda: api.list_repo_refs(repo, include_pull_requests=True))
    if any(branch == each.name for each in refs.tags):
        raise HubError(f"{repo}: {branch} is a tag; an upload needs a branch.", hint="Name another --revision.")
    existing = {each.name for each in refs.branches} | {each.ref for each in refs.pull_requests or ()}
    if branch.startswith("refs/") and branch not in existing:
        raise HubError(f"{repo} has no {branch}.", hint=f"See its pull requests: {endpoint_of(api)}/{repo}/discussions")
    return branch in existing


def _check_other_weights(api: HfApi, repo: str, revision: str, names: Collection[str]) -> None:
    """Refuse weights beside those to be uploaded: which of them a loader takes, nobody can tell."""
    folders = {PurePosixPath(name).parent for name in names if name.endswith(_WEIGHTS)}
    existing = ask("listing its files", repo, api, lambda: api.list_repo_files(repo, revision=revision))
    others = [
        name
        for name in existing
        if name.endswith(_WEIGHTS) and name not in names and PurePosixPath(name).parent in folders
    ]
    if others:
        raise HubError(
            f"{repo} holds other weights at {revision}, which would be loaded in part or instead: {listed(others)}.",
            hint=f"Delete them at {endpoint_of(api)}/{repo}/tree/{revision}, or name another repository.",
        )


# --- upload: every attempt first looks whether an earlier one has arrived, for answers get lost ---


def _create(api: HfApi, repo: str, destination: Destination) -> None:
    """Create the repository and the branch, where they do not exist."""
    branch = destination.branch

    def create() -> None:
        private = _is_private(api, repo)
        if private is None:
            api.create_repo(repo, private=destination.private is not False)
        else:
            _check_visibility(private, destination, repo, endpoint_of(api))

    ask("creating the repository", repo, api, create)
    if branch != MAIN and not branch.startswith("refs/"):
        create_branch = partial(api.create_branch, repo, branch=branch, exist_ok=True)
        ask(f"creating the branch {branch}", repo, api, create_branch)


def _commit(api: HfApi, plan: PushPlan, operations: Operations) -> tuple[str, str | None]:
    """Commit all files at once, and return the commit, and the address of the pull request that it opened, if it did.

    The Hub refuses to commit to a branch that has moved since the first attempt. Every commit that arrives as a pull
    request opens one, so that there is no further attempt at it after a lost answer.
    """
    repo, branch, create_pr = plan.repo, plan.destination.branch, plan.destination.create_pr
    parent = None if create_pr else ask("looking at the branch", repo, api, lambda: _head(api, repo, branch))

    def attempt() -> tuple[str, str | None]:
        head = None if create_pr else _head(api, repo, branch)
        if head and _missing(api, plan, head) is None:
            return head, None
        made = api.create_commit(
            repo,
            list(operations.values()),
            commit_message=plan.message,
            revision=branch,
            create_pr=create_pr,
            parent_commit=parent,
        )
        return str(made.oid), made.pr_url

    def is_transient(error: Exception) -> bool:
        return status_of(error) == 429 if create_pr else may_pass(error) or status_of(error) == _HAS_MOVED

    with hub_errors("committing", repo, api):
        try:
            return retry(attempt, is_transient=is_transient)
        except Exception as error:
            if not create_pr or status_of(error) == 429 or not may_pass(error):
                raise
    raise HubError(
        f"{repo}: the answer to the commit was lost; the pull request may be open.",
        hint=f"Look at {endpoint_of(api)}/{repo}/discussions in some minutes, before another attempt.",
    )


def _check_commit(api: HfApi, plan: PushPlan, commit: str) -> None:
    """Look whether the commit holds every file as it was sent: a .gitignore there silently keeps files out."""
    repo = plan.repo
    missing = ask("checking the commit", repo, api, lambda: _missing(api, plan, commit))
    if missing is not None:
        raise HubError(
            f"{repo}: {missing} is not in commit {commit[:8]} as it was sent.",
            hint=f"Look for a .gitignore at {endpoint_of(api)}/{repo}/tree/{commit}",
        )


def _head(api: HfApi, repo: str, ref: str) -> str:
    return str(api.repo_info(repo, revision=ref).sha)


def _missing(api: HfApi, plan: PushPlan, revision: str) -> str | None:
    """The first file that is not there as it is here; None where all are."""
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils.sha import git_hash

    found = {each.path: each for each in api.get_paths_info(plan.repo, list(plan.sizes), revision=revision)}
    for name, size in plan.sizes.items():
        file = found.get(name)
        if not isinstance(file, RepoFile) or file.size != size:
            return name
        if file.lfs is None and file.blob_id != git_hash((plan.directory / name).read_bytes()):
            return name
        if file.lfs is not None and file.lfs.sha256 != plan.sha256[name]:
            return name
    return None
