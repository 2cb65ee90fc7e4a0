"""`ckavg push`, and what other verbs need to push what they have made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from ckavg.cli.errors import failures, interrupted_with
from ckavg.cli.options import Averaging, CommitMessage, CreatePr, Json, Private, Quiet, Revision, Verbose, folder
from ckavg.cli.progress import show_progress
from ckavg.cli.text import Output, is_plain, plural, print_json, print_places, say, stderr_is_terminal, warn_of
from ckavg.errors import SettingError
from ckavg.hub import Destination, Pushed, continued, plan_push
from ckavg.hub import push as upload


def push(
    result: Annotated[Path, folder("DIR", "Directory of a result, or of a snapshot in it.")],
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

    Checks your rights, then every file against the record, then uploads all of it as one commit. The same command
    continues an upload that failed. Log in with: hf auth login
    """
    with failures(verbose=verbose):
        destination = Destination(
            repo=repo, private=private, revision=revision, commit_message=commit_message, create_pr=create_pr
        )
        pushed = push_shown(result, destination, quiet=quiet)
        if as_json:
            print_json(pushed.to_dict())
        elif quiet:
            print_places([pushed.url])
        else:
            print_pushed(pushed)


def print_pushed(pushed: Pushed) -> None:
    """Print where the result can be looked at."""
    out = Output()
    out.fact("uploaded", f"{len(pushed.files)} files, {decimal(pushed.bytes)}, commit {pushed.commit[:8]}")
    out.fact("url", pushed.url, style="path")


def destination_of(options: Averaging) -> Destination | None:
    """Where a result is to be uploaded, by the options of an averaging verb; None where it is not.

    Raises:
        SettingError: there is none, and yet an option that goes with it.
    """
    unset: dict[str, Any] = {"private": None, "revision": None, "commit_message": None, "create_pr": False}
    settings = {name: getattr(options, name) for name in unset}
    if options.push_to_hub is not None:
        return Destination(repo=options.push_to_hub, **settings)
    for name, value in settings.items():
        if value != unset[name]:
            given = "--private or --public" if name == "private" else f"--{name.replace('_', '-')}"
            raise SettingError(f"{given} goes with --push-to-hub.", hint="Name the repository: --push-to-hub REPO")
    return None


def when_complete(directory: Path, destination: Destination | None) -> str:
    """What an interrupt after the averaging says: that the result is there, and how to continue with its upload."""
    goes_on = "" if destination is None else f" {continued(directory, destination)}"
    return f"The result is complete in {directory}.{goes_on}"


def push_shown(directory: Path, destination: Destination, *, quiet: bool) -> Pushed:
    """Upload a result and show how far it has come. An interrupt costs nothing but the rest of the upload."""
    show_bars = stderr_is_terminal() and not (quiet or is_plain())  # huggingface_hub's own
    with interrupted_with(when_complete(directory, destination)):
        with show_progress(1, quiet=quiet) as on_progress:
            plan = plan_push(directory, destination, on_progress=on_progress)
            if not show_bars:
                pushed = upload(plan, on_progress=on_progress)
        if show_bars:
            say(f"uploading {plural(len(plan.sizes), 'file')}, {decimal(sum(plan.sizes.values()))}, to {plan.repo}")
            pushed = upload(plan, show_bars=True)
    warn_of(pushed.warnings)
    return pushed
