"""Stage *publish*: where an upload goes, as it is asked for. Pure; whether it exists is for `client.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckavg.errors import SettingError
from ckavg.hub.links import as_repository
from ckavg.storage.redaction import shown_address

MAIN = "main"
_MOST_OF_A_NAME = 96
_REPO = re.compile(r"([A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
_NO_REPO = re.compile(r"--|\.\.|[.-](/|$)|\.git$")
_NO_BRANCH = re.compile(r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|@\{|//|^[-/.]|[/.]$|\.lock$|^$")
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
        if not _REPO.fullmatch(self.repo) or _NO_REPO.search(self.repo) or len(self.repo) > _MOST_OF_A_NAME:
            name, revision = as_repository(self.repo)
            meant = f"{name} --revision {revision}" if revision else name
            raise SettingError(
                f"{shown_address(self.repo[: 2 * _MOST_OF_A_NAME])!r} is no name of a model repository: owner/name, of "
                f"at most {_MOST_OF_A_NAME} letters, digits, '-', '_' and '.'.",
                hint=f"Did you mean {meant}?" if meant else "Such as my-org/my-model-averaged.",
            )
        if self.revision is not None and _NO_BRANCH.search(self.revision):
            raise SettingError(f"{self.revision!r} is no name of a branch.", hint="Such as --revision pema-gamma0.15.")
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            raise SettingError(f"{self.revision} is a commit; an upload needs a branch.", hint="Name a branch.")
        if self.create_pr and self.revision not in (None, MAIN):
            raise SettingError(
                "A pull request is always made to main, and does not go with another revision.",
                hint="Leave out --revision; or, to add to a pull request, --create-pr for --revision refs/pr/N.",
            )
        if self.commit_message is not None and not self.commit_message.strip():
            raise SettingError("The commit message is empty.", hint="Leave it out for one that names the average.")
