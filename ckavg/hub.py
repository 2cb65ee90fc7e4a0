"""Push a result to the Hugging Face Hub: check it against its record, then upload it as one commit.

Only this module writes with huggingface_hub. It imports that library on use, and leaves finding the token to it.
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
"""Bytes from which a file is uploaded before the commit. Smaller ones are part of the commit."""

_HAS_MOVED = 412
"""Status of a commit whose parent is no longer the head of the branch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where an upload goes.

    Attributes:
        repo: `owner/name`; a name alone belongs to the token's user.
        private: whether the repository must be private (True) or public (False). None: a new one is private, an
            existing one stays as it is.
        revision: the branch, created from `main` if needed, or `refs/pr/N`; None means `main`.
        commit_message: its first line; None means one that names the average.
        create_pr: open a pull request instead of changing the branch.

    Raises:
        SettingError: a name is invalid, or the settings contradict each other.
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
            raise SettingError(f"{self.revision} is a commit; an upload needs a branch.", hint="Give a branch.")
        if self.create_pr and self.revision not in (None, MAIN):
            raise SettingError(
                "A pull request is always made against main: --create-pr cannot be combined with another revision.",
                hint="Leave out --revision. To add to an existing pull request, use --revision refs/pr/N alone.",
            )
        if self.commit_message is not None and not self.commit_message.strip():
            raise SettingError("The commit message is empty.", hint="Leave it out to get one that names the average.")

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
        revision: the branch, or `refs/pr/N`; None if a pull request was opened.
        url: of the repository, the branch or the pull request.
        commit: the commit that has the files.
        files: names of all files, including those that the Hub already had.
        bytes: their total size.
        warnings: for the user.
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
    """A checked upload: what goes where, and bytes and SHA-256 of every file by name."""

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

    The files are first read and compared with their SHA-256 in the record. Files that the Hub already has are not
    uploaded again, so the same call continues a failed upload. huggingface_hub finds the token.

    Args:
        result: a result, or the directory of one or of one of its snapshots.
        repo: `owner/name`, or a name alone for the token's user; created if it does not exist.
        private, revision, commit_message, create_pr: see `Destination`.
        on_progress: called from time to time while files are read, and after each large upload.

    Raises:
        RecordError: there is no record, or the files differ from it.
        ReadError: a file cannot be read.
        HubError: the Hub refused, or cannot be reached.
        SettingError: the name of the repository or branch is invalid.
    """
    destination = Destination(
        repo=repo, private=private, revision=revision, commit_message=commit_message, create_pr=create_pr
    )
    directory = result.directory if isinstance(result, Record) else Path(result)
    return push(plan_push(directory, destination, on_progress=on_progress), on_progress=on_progress)


def plan_push(directory: Path, destination: Destination, *, on_progress: OnProgress | None = None) -> PushPlan:
    """Check permissions, then every file of a result against its record. Uploads nothing; errors: see `push_result`."""
    record = read_record(directory)
    with _continuing(directory, destination):
        repo = check_access(destination, record.output.files)
    sizes, warnings = _check_files(directory, record, on_progress)
    # the record has no SHA-256 of itself, and users edit the card
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
    """Upload a result: large files first, then one commit of all. Skips what the Hub already has.

    Args:
        plan: from `plan_push`, just before.
        on_progress: called after each large file.
        show_bars: let huggingface_hub draw its progress bars on stderr.

    Raises:
        HubError: the Hub refused, or cannot be reached. The next attempt skips what has been uploaded.
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
            with hub_errors(f"uploading {name}", repo, api):  # the client retries by itself
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
    """The command that continues after a failure."""
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
    """Check a result's files; return the sizes of those to upload, and warnings."""
    output, report = record.output, Report(on_progress)
    (sizes,) = check_files(report, [Part(directory, output)], within=directory)
    problems = [each.message for each in report.findings if each.is_problem]
    if problems:
        more = f" And {len(problems) - 1} more." if len(problems) > 1 else ""
        raise RecordError(
            f"{directory} differs from its record: {problems[0]}{more}",
            hint=f"See all problems with: ckavg verify {shell_word(str(directory))}",
        )
    hidden = [name for name in output.files if any(part.startswith(".") for part in PurePosixPath(name).parts)]
    warnings = [each.message for each in report.findings]
    if output.directory.is_absolute():
        warnings.append(f"{RESULT_RECORD} was written by an earlier version: it names directories of this machine.")
    return {name: sizes[name] for name in output.files if name not in hidden}, tuple(warnings)


# --- permissions ---


def check_access(destination: Destination, names: Collection[str] = ()) -> str:
    """Check that files of these names may be uploaded, and return the full name of the repository.

    Raises:
        HubError: there is no token; it may not write there; the repository is public but should be private, or the
            reverse; or it has other weights that a loader might confuse with these.
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
    """Refuse a token that cannot write, or a fine-grained one that cannot write there, by the response to `whoami`.

    With `create_pr`, permission to open a pull request suffices. Unknown kinds of token are left to the Hub.
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
    """Refuse to create a repository unless the owner is the user or an organization in which the user may write."""
    user, owner = str(me["name"]), _owner(repo)
    roles = {str(each.get("name", "")).lower(): each.get("roleInOrg") for each in me.get("orgs") or ()}
    role = roles.get(owner)
    if owner != user.lower() and owner not in roles:
        raise HubError(
            f"{repo} does not exist, and {user} may not create it: {user} is neither {owner} nor a member of it.",
            hint="Check the name. To see who is logged in: hf auth whoami",
        )
    if owner != user.lower() and role not in (None, *_ROLES_THAT_WRITE):
        raise _may_not_write(repo, url, f"{user} has the role {role} in {owner}")


def _owner(repo: str) -> str:
    return repo.partition("/")[0].lower()


def _may_not_write(repo: str, url: str, why: str) -> HubError:
    return HubError(
        f"{repo}: the token cannot write there: {why}.",
        hint=f"Make a token with write access at {url}/settings/tokens, then: hf auth login --force",
    )


def _is_private(api: HfApi, repo: str) -> bool | None:
    """Whether a model repository is private; None if the token sees none of that name."""
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
        raise HubError(f"{repo}: {branch} is a tag; an upload needs a branch.", hint="Give another --revision.")
    existing = {each.name for each in refs.branches} | {each.ref for each in refs.pull_requests or ()}
    if branch.startswith("refs/") and branch not in existing:
        raise HubError(f"{repo} has no {branch}.", hint=f"See its pull requests: {endpoint_of(api)}/{repo}/discussions")
    return branch in existing


def _check_other_weights(api: HfApi, repo: str, revision: str, names: Collection[str]) -> None:
    """Refuse a repository with other weights: a loader might take those, or a mixture."""
    folders = {PurePosixPath(name).parent for name in names if name.endswith(_WEIGHTS)}
    existing = ask("listing its files", repo, api, lambda: api.list_repo_files(repo, revision=revision))
    others = [
        name
        for name in existing
        if name.endswith(_WEIGHTS) and name not in names and PurePosixPath(name).parent in folders
    ]
    if others:
        raise HubError(
            f"{repo} has other weights at {revision}, which a loader might take: {listed(others)}.",
            hint=f"Delete them at {endpoint_of(api)}/{repo}/tree/{revision}, or use another repository.",
        )


# --- upload: every attempt first checks whether an earlier one succeeded, since responses get lost ---


def _create(api: HfApi, repo: str, destination: Destination) -> None:
    """Create the repository and the branch, if they do not exist."""
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
    """Commit all files at once. Returns the commit, and the address of the pull request if it opened one.

    The Hub refuses a commit to a branch that has moved since the first attempt. A pull request is not retried after a
    lost response: each attempt that arrives would open another one.
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
        f"{repo}: the response to the commit was lost; the pull request may be open.",
        hint=f"Before another attempt, look at {endpoint_of(api)}/{repo}/discussions in a few minutes.",
    )


def _check_commit(api: HfApi, plan: PushPlan, commit: str) -> None:
    """Check that the commit has every file unchanged: a .gitignore there silently excludes files."""
    repo = plan.repo
    missing = ask("checking the commit", repo, api, lambda: _missing(api, plan, commit))
    if missing is not None:
        raise HubError(
            f"{repo}: {missing} is missing from commit {commit[:8]} or differs.",
            hint=f"Look for a .gitignore at {endpoint_of(api)}/{repo}/tree/{commit}",
        )


def _head(api: HfApi, repo: str, ref: str) -> str:
    return str(api.repo_info(repo, revision=ref).sha)


def _missing(api: HfApi, plan: PushPlan, revision: str) -> str | None:
    """The first file that is missing or differs; None if there is none."""
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
