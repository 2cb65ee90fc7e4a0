"""The options that verbs share, each written once. Defaults come from the library's own functions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from ckavg.checkpoints.run import Selection
from ckavg.errors import SettingError

_CHOICE = "Which checkpoints"
_RESULT = "The result"
_WORK = "How it is computed"
_SHOWN = "What is shown"
_HUB = "The Hugging Face Hub"

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="Directory of saved checkpoints, hf://owner/name, or an address such as s3://bucket/run.",
        show_default="current directory",
        readable=False,  # that it is not is no wrong usage, and said later
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=_SHOWN)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.", rich_help_panel=_SHOWN)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Add a traceback to an error.", rich_help_panel=_SHOWN)]

Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public",
        help="Who may see the repository.",
        show_default="private, or as it is",
        rich_help_panel=_HUB,
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="BRANCH", help="Branch to upload to.", show_default="main", rich_help_panel=_HUB)
]
CommitMessage = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="First line of the commit.", show_default="names it", rich_help_panel=_HUB),
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request.", rich_help_panel=_HUB)]


@dataclass(frozen=True, slots=True)
class Choice:
    """`SOURCE` and the options that choose checkpoints from it."""

    source: Source = Path()
    init: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The anchor θ_0: the base model's directory, file or hf://owner/name.",
            show_default="the first checkpoint",
            readable=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    init_step: Annotated[int, typer.Option(metavar="N", help="Optimizer step of --init.", rich_help_panel=_CHOICE)] = 0
    match: Annotated[
        str | None,
        typer.Option(
            metavar="GLOB",
            help="Of several runs in one directory, those whose names match.",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    steps: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Exactly these steps.", show_default="all", rich_help_panel=_CHOICE),
    ] = None
    skip_step: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Leave out step N (repeatable).", show_default=False, rich_help_panel=_CHOICE),
    ] = None
    every: Annotated[
        int | None,
        typer.Option(
            metavar="F",
            min=1,
            help="Visit a checkpoint every F optimizer steps only.",
            show_default="every checkpoint",
            rich_help_panel=_CHOICE,
        ),
    ] = None
    from_step: Annotated[
        int | None, typer.Option(metavar="N", help="Leave out checkpoints before step N.", rich_help_panel=_CHOICE)
    ] = None
    to_step: Annotated[
        int | None, typer.Option(metavar="N", help="Leave out checkpoints after step N.", rich_help_panel=_CHOICE)
    ] = None
    last: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Take the newest N checkpoints only.", rich_help_panel=_CHOICE),
    ] = None
    revisions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Revisions of hf://owner/name, each of which is a checkpoint (repeatable).",
            show_default=False,
            rich_help_panel=_CHOICE,
        ),
    ] = None
    max_disk: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Fetch at most this much of a remote SOURCE to the disk, such as 50GB; stream the rest.",
            show_default="all, if there is room",
            rich_help_panel=_CHOICE,
        ),
    ] = None
    skip_incomplete: Annotated[
        bool,
        typer.Option(
            "--skip-incomplete", help="Leave out checkpoints that are not written in full.", rich_help_panel=_CHOICE
        ),
    ] = False
    common_only: Annotated[
        bool,
        typer.Option(
            "--common-only",
            help="Average the tensors that all checkpoints have; copy the others.",
            rich_help_panel=_CHOICE,
        ),
    ] = False

    def selection(self, every_from: int | None = None) -> Selection:
        """The same, as the library takes it."""
        return Selection(
            init=self.init,
            init_step=self.init_step,
            match=self.match,
            steps=_whole_numbers(self.steps),
            skip_step=tuple(self.skip_step or ()),
            every=self.every,
            every_from=every_from if self.every else None,
            from_step=self.from_step,
            to_step=self.to_step,
            last=self.last,
            skip_incomplete=self.skip_incomplete,
            common_only=self.common_only,
            revisions=tuple(self.revisions or ()),
        )


def _whole_numbers(text: str | None) -> tuple[int, ...]:
    """The steps that were typed as `100,300,700`."""
    try:
        return tuple(int(each) for each in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise SettingError(
            f"--steps is {text!r}; it must be whole numbers with commas between them.",
            hint="For example: --steps 100,300",
        ) from error


@dataclass(frozen=True, slots=True)
class Measuring(Choice):
    """The options of every verb that may measure the path."""

    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.", rich_help_panel=_WORK)] = (
        "auto"
    )
    path_exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Tensors that do not count in the path length (repeatable).",
            show_default=False,
            rich_help_panel=_WORK,
        ),
    ] = None
    zero_sigma: Annotated[
        Literal["exclude", "eps"],
        typer.Option(help="Tensors without spread: not counted, or divided by 1e-8.", rich_help_panel=_WORK),
    ] = "exclude"
    sample: Annotated[
        float,
        typer.Option(
            metavar="F",
            help="Estimate the path length from a fraction F of each tensor.",
            show_default="1: exact",
            rich_help_panel=_WORK,
        ),
    ] = 1.0
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A picture of path, β and weights: .png, .svg or .pdf.",
            show_default=False,
            rich_help_panel=_SHOWN,
        ),
    ] = None
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite", help="Go on where a checkpoint holds NaN or infinity.", rich_help_panel=_WORK
        ),
    ] = False
    as_json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False


@dataclass(frozen=True, slots=True)
class Averaging(Measuring):
    """The options of every verb that forms an average."""

    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Where the result goes.",
            show_default="SOURCE/averaged/NAME",
            rich_help_panel=_RESULT,
        ),
    ] = None
    dtype: Annotated[
        Literal["source", "float32", "bfloat16", "float16"],
        typer.Option(help="Output dtype.", rich_help_panel=_RESULT),
    ] = "source"
    snapshot_every: Annotated[
        int | None,
        typer.Option(
            metavar="F",
            min=1,
            help="Also write the average as of every F optimizer steps.",
            show_default="the final one only",
            rich_help_panel=_RESULT,
        ),
    ] = None
    copy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Further files of the last checkpoint to copy beside the weights (repeatable).",
            show_default=False,
            rich_help_panel=_RESULT,
        ),
    ] = None
    card: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Markdown with front matter: its fields and its text come first in the model card.",
            show_default=False,
            readable=False,
            rich_help_panel=_RESULT,
        ),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing result.", rich_help_panel=_RESULT)] = False
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be read and written, and do neither.", rich_help_panel=_RESULT),
    ] = False
    accumulate: Annotated[
        Literal["float32", "float64"],
        typer.Option(
            help="Dtype of the running average.",
            show_default="float32; float64 for float64 checkpoints",
            rich_help_panel=_WORK,
        ),
    ] = "float32"
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Upload the result to owner/name when it is done.",
            show_default=False,
            rich_help_panel=_HUB,
        ),
    ] = None
    private: Private = None
    revision: Revision = None
    commit_message: CommitMessage = None
    create_pr: CreatePr = False

    def selection(self, every_from: int | None = None) -> Selection:
        """The same, as the library takes it."""
        return dataclasses.replace(Measuring.selection(self, every_from), copy=tuple(self.copy or ()))


@dataclass(frozen=True, slots=True)
class Sweeping(Averaging):
    """The options of `sweep`."""

    eval_command: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="COMMAND",
            help="Run COMMAND on each result, {dir} its directory; the number it prints last counts.",
            show_default=False,
            rich_help_panel=_RESULT,
        ),
    ] = None
    eval_goal: Annotated[
        Literal["min", "max"],
        typer.Option(help="Whether the best result has the least or the greatest number.", rich_help_panel=_RESULT),
    ] = "min"
