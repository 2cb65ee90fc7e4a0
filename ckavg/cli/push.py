"""`ckavg push`, and what other verbs need to push what they have made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ckavg.cli.failures import INTERRUPTED, failures
from ckavg.cli.options import (
    Averaging,
    CommitMessage,
    CreatePr,
    Json,
    Private,
    Quiet,
    Revision,
    Verbose,
)
from ckavg.cli.progress import show_progress
from ckavg.cli.terminal import stderr_is_terminal, warn
from ckavg.errors import SettingError
from ckavg.hub import Destination, Pushed, check_access, continued, plan_push
from ckavg.hub import push as upload
from ckavg.report.text import as_bytes


def push(
    result: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a result, or of a snapshot in it.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hugging Face Hub.")],
    *,
    private: Private = None,
    revision: Revision = None,
    commit_message: CommitMessage = None,
    create_pr: CreatePr = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Upload a finished average to the Hugging Face Hub.

    Checks the rights, then every file against the record, then uploads all of it as one commit. An upload that failed
    is continued by the same command. Log in with: hf auth login
    """
    with failures(verbose=verbose):
        destination = Destination(
            repo=repo, private=private, revision=revision, commit_message=commit_message, create_pr=create_pr
        )
        pushed = push_shown(result, destination, quiet=quiet)
        print_pushed(pushed, as_json=as_json, quiet=quiet)


def destination_of(options: Averaging) -> Destination | None:
    """Where a result is to be uploaded, by the options of an averaging verb; None where it is not."""
    given = {
        "--revision": options.revision is not None,
        "--commit-message": options.commit_message is not None,
        "--create-pr": options.create_pr,
        "--private or --public": options.private is not None,
    }
    if options.push_to_hub is None:
        for name, is_given in given.items():
            if is_given:
                raise SettingError(f"{name} goes with --push-to-hub.", hint="Name the repository: --push-to-hub REPO")
        return None
    return Destination(
        repo=options.push_to_hub,
        private=options.private,
        revision=options.revision,
        commit_message=options.commit_message,
        create_pr=options.create_pr,
    )


def check_push(destination: Destination | None, files: tuple[str, ...]) -> None:
    """Find out, before hours of reading, whether the upload after them would be let in."""
    if destination is not None:
        check_access(destination, files)


@contextmanager
def complete_in(directory: Path, destination: Destination | None = None) -> Iterator[None]:
    """Let an interrupt after the averaging say that the result is there, and how to go on if it is to be uploaded."""
    goes_on = "" if destination is None else f" {continued(directory, destination)}"
    with interrupted_with(f"The result is complete in {directory}.{goes_on}"):
        yield


@contextmanager
def interrupted_with(told: str) -> Iterator[None]:
    """Have an interrupt end the command with these words, for work that was complete before it."""
    try:
        yield
    except KeyboardInterrupt as error:
        warn("interrupted", told)
        raise typer.Exit(INTERRUPTED) from error


def push_shown(directory: Path, destination: Destination, *, quiet: bool) -> Pushed:
    """Upload a result and show how far it has come. An interrupt costs nothing but the rest of the upload."""
    show_bars = stderr_is_terminal() and not quiet
    with complete_in(directory, destination):
        with show_progress(2, quiet=quiet) as on_progress:
            plan = plan_push(directory, destination, on_progress=on_progress)
            if not show_bars:
                pushed = upload(plan, on_progress=on_progress)
        if show_bars:
            pushed = upload(plan, show_bars=True)
    for warning in pushed.warnings:
        warn("warning", warning)
    return pushed


def print_pushed(pushed: Pushed, *, as_json: bool = False, quiet: bool = False) -> None:
    """Print where the result can be looked at, or one JSON object."""
    from ckavg.report.console import print_json, quoted, stdout_console

    if as_json:
        print_json(pushed.to_dict())
    elif not quiet:
        content = f"{len(pushed.files)} files, {as_bytes(pushed.bytes)}, commit {pushed.commit[:8]}"
        console = stdout_console()
        console.print(quoted(f"uploaded {content}"), soft_wrap=True)
        console.print(quoted(f"url      {pushed.url}"), soft_wrap=True)
