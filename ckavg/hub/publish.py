"""Stage *publish*: a result, checked against its record, on the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ckavg.checkpoints.checkpoint import RESULT_RECORD
from ckavg.engine.context import OnProgress, Progress
from ckavg.errors import HubError, RecordError
from ckavg.hub.client import check_access
from ckavg.hub.destination import MAIN, Destination
from ckavg.hub.sending import HubFile, upload
from ckavg.output.commands import as_options, shell_word
from ckavg.output.owned import CARD
from ckavg.output.record import Record, read_record
from ckavg.verify.files import check_digests, find_files


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

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        told = dataclasses.asdict(self)
        return told | {"result": str(self.result), "files": list(self.files), "warnings": list(self.warnings)}


def push_result(
    result: Path | str,
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
        result: directory of a result, or of one of its snapshots.
        repo: `owner/name`, or a name of the token's user; created where it does not exist.
        private, revision, commit_message, create_pr: as of `Destination`.
        on_progress: called now and then; while a file is sent, in a thread of the client's, too.

    Raises:
        RecordError: there is no record, or the files are not those of it.
        ReadError: the system would not let us read it.
        HubError: the Hub refused, or cannot be reached.
        SettingError: a name that no repository or branch could have.
    """
    destination = Destination(
        repo=repo, private=private, revision=revision, commit_message=commit_message, create_pr=create_pr
    )
    return push_to(Path(result), destination, on_progress=on_progress)


def push_to(directory: Path, destination: Destination, *, on_progress: OnProgress | None = None) -> Pushed:
    """The same, to a destination that was checked before, say."""
    record = read_record(directory)
    try:
        access = check_access(destination, record.output.files)
        files, warnings = _checked(directory, record, on_progress)
        total = sum(file.size for file in files)

        def sent(done: int) -> None:
            if on_progress:
                on_progress(Progress("upload", done, total))

        sent(0)
        steps = f"steps {record.steps[0]} to {record.output.step}"
        message = f"Upload {record.output.name}, the average of {steps}"
        uploaded = upload(destination, access, files, message=message, on_sent=sent)
    except HubError as error:
        error.add_note(f"The result is complete in {directory}. {continued(directory, destination)}")
        raise
    return Pushed(
        result=directory,
        repo=uploaded.repo,
        revision=None if destination.create_pr else destination.revision or MAIN,
        url=uploaded.url,
        commit=uploaded.commit,
        files=tuple(file.name for file in files),
        bytes=total,
        warnings=warnings,
    )


def continued(directory: Path, destination: Destination) -> str:
    """How to go on after a failure, as a command to type."""
    settings: dict[str, object] = {}
    if destination.private is not None:
        settings["private" if destination.private else "public"] = True
    for name in ("revision", "commit_message", "create_pr"):
        if value := getattr(destination, name):
            settings[name] = value
    options = as_options(settings)
    command = f"ckavg push {shell_word(str(directory))} {destination.repo}{f' {options}' if options else ''}"
    return f"Continue with: {command}"


def _checked(
    directory: Path, record: Record, on_progress: OnProgress | None
) -> tuple[tuple[HubFile, ...], tuple[str, ...]]:
    """The files of a result that are to be uploaded, after they were read; and what should be known of them."""
    output = record.output
    present = find_files(directory, output, within=directory)
    listen = _listener(present.sizes, on_progress)
    found = [*present.findings, *check_digests(directory, output, present.sizes, on_done=listen)]
    problems = [each.message for each in found if each.is_problem]
    if problems:
        more = f" And {len(problems) - 1} more." if len(problems) > 1 else ""
        raise RecordError(
            f"{directory} is not what its record says: {problems[0]}{more}",
            hint=f"See all of it with: ckavg verify {shell_word(str(directory))}",
        )
    files = tuple(
        HubFile(name, directory / name, present.sizes[name], None if _is_edited(name) else output.sha256[name])
        for name in output.files
        if not any(part.startswith(".") for part in PurePosixPath(name).parts)
    )
    told = [each.message for each in found]
    if output.directory.is_absolute():
        told.append(f"{RESULT_RECORD} is as earlier versions wrote it: it names directories of this machine.")
    return files, tuple(told)


def _is_edited(name: str) -> bool:
    """Whether the record does not know the SHA-256 for certain: of itself, and of a card that people write to."""
    return name in (RESULT_RECORD, CARD)


def _listener(sizes: dict[str, int], on_progress: OnProgress | None) -> Callable[[str], None]:
    done, total = 0, sum(sizes.values())

    def hashed(name: str) -> None:
        nonlocal done
        done += sizes[name]
        if on_progress:
            on_progress(Progress("files", done, total))

    return hashed
