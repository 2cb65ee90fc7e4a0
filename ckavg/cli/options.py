"""The options that verbs share, each written once, and how a verb gets them. Defaults are those of the library."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from ckavg.checkpoints.run import Selection
from ckavg.cli.completion import devices, directories
from ckavg.errors import SettingError

Options = TypeVar("Options")
Command = Callable[..., None]


def with_options(
    options: type[Options], *, without: tuple[str, ...] = ()
) -> Callable[[Callable[[Options], None]], Command]:
    """Make a command of a function that takes a dataclass of options: each field is a parameter.

    Args:
        options: the dataclass.
        without: fields that are left at their default.
    """
    hints = typing.get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(options)  # type: ignore[arg-type]
        if field.name not in without
    ]

    def decorate(function: Callable[[Options], None]) -> Command:
        def command(**values: object) -> None:
            function(options(**values))

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def option(panel: str, text: str, *names: str, shown: str | bool = True, **more: Any) -> Any:
    """An option in a panel of the help; `shown` is what the help says of the default."""
    return typer.Option(*names, help=text, show_default=shown, rich_help_panel=panel, **more)


choice = partial(option, "Which checkpoints")
result = partial(option, "The result")
work = partial(option, "How it is computed")
processes = partial(option, "Several processes")
display = partial(option, "What is shown")
evaluation = partial(option, "Evaluation by your own command")
hub = partial(option, "The Hugging Face Hub")


def folder(name: str, text: str, **more: Any) -> Any:
    """An argument that is a directory; `name` is what the help calls it."""
    return typer.Argument(metavar=name, help=text, autocompletion=directories, **more)


Source = Annotated[
    Path,
    folder(
        "SOURCE",
        "Directory of saved checkpoints, hf://owner/name, or an address such as s3://bucket/run.",
        show_default="current directory",
        readable=False,  # what cannot be read is no wrong usage, and is reported later
    ),
]
Json = Annotated[bool, display("One JSON object on stdout.", "--json")]
Quiet = Annotated[bool, display("No progress and no summary: the paths of results alone.", "--quiet", "-q")]
Verbose = Annotated[bool, display("Add a traceback to an error.", "--verbose", "-v")]

Private = Annotated[
    bool | None, hub("Who may see the repository.", "--private/--public", shown="private, or unchanged")
]
Revision = Annotated[str | None, hub("Branch to upload to.", metavar="BRANCH", shown="main")]
CommitMessage = Annotated[str | None, hub("First line of the commit.", metavar="TEXT", shown="names the average")]
CreatePr = Annotated[bool, hub("Open a pull request.", "--create-pr")]


@dataclass(frozen=True, slots=True)
class Choice:
    """`SOURCE` and the options that choose checkpoints from it; they have the names that `Selection` has."""

    source: Source = Path()
    init: Annotated[
        Path | None,
        choice(
            "The base model, as the anchor θ_0: its directory, file or hf://owner/name.",
            metavar="PATH",
            shown="the first checkpoint",
            readable=False,
        ),
    ] = None
    init_step: Annotated[int, choice("Optimizer step of --init.", metavar="N")] = 0
    match: Annotated[
        str | None, choice("Of several runs in one directory, those whose names match.", metavar="GLOB")
    ] = None
    steps: Annotated[str | None, choice("Exactly these steps.", metavar="N,N,...", shown="all")] = None
    skip_step: Annotated[list[int] | None, choice("Leave out step N (repeatable).", metavar="N")] = None
    every: Annotated[
        int | None,
        choice("Take a checkpoint every F optimizer steps only.", metavar="F", min=1, shown="every checkpoint"),
    ] = None
    from_step: Annotated[int | None, choice("Leave out checkpoints before step N.", metavar="N")] = None
    to_step: Annotated[int | None, choice("Leave out checkpoints after step N.", metavar="N")] = None
    best: Annotated[int | None, choice("Take the N best checkpoints by --metric only.", metavar="N", min=1)] = None
    metric: Annotated[
        str | None, choice("Of --best: a metric in the trainer's log, such as eval_loss.", metavar="NAME")
    ] = None
    goal: Annotated[
        Literal["min", "max"] | None, choice("Of --best: which values are best.", shown="as the name tells")
    ] = None
    last: Annotated[int | None, choice("Take the newest N checkpoints only.", metavar="N", min=1)] = None
    revisions: Annotated[
        list[str] | None,
        choice("Revisions of hf://owner/name, each of which is a checkpoint (repeatable).", metavar="GLOB"),
    ] = None
    prefix: Annotated[
        str | None,
        choice(
            "Of torch.distributed checkpoints: how the names of the model's tensors begin, to be taken off.",
            metavar="TEXT",
            shown="as they are nested",
        ),
    ] = None
    max_disk: Annotated[
        str | None,
        choice(
            "Fetch at most this much of a remote SOURCE to the disk, such as 50GB; stream the rest.",
            metavar="SIZE",
            shown="all, if there is room",
        ),
    ] = None
    skip_incomplete: Annotated[bool, choice("Leave out incomplete checkpoints.", "--skip-incomplete")] = False
    common_only: Annotated[
        bool, choice("Average the tensors that all checkpoints have; copy the others.", "--common-only")
    ] = False

    def selection(self, every_from: int | None = None) -> Selection:
        """The same, as the library takes it; --every counts from step `every_from`."""
        given: dict[str, Any] = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(Selection)}
        given |= {"steps": _whole_numbers(self.steps), "every_from": every_from if self.every else None}
        for name in ("skip_step", "revisions", "copy"):
            given[name] = tuple(given[name] or ())
        return Selection(**given)


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

    device: Annotated[str, work("auto, cpu, cuda or cuda:N.", metavar="DEVICE", autocompletion=devices)] = "auto"
    path_exclude: Annotated[
        list[str] | None, work("Tensors that do not count in the path length (repeatable).", metavar="GLOB")
    ] = None
    zero_sigma: Annotated[
        Literal["exclude", "eps"], work("Tensors without spread: not counted, or divided by 1e-8.")
    ] = "exclude"
    sample: Annotated[
        float, work("Estimate the path length from a fraction F of each tensor.", metavar="F", shown="1: exact")
    ] = 1.0
    plot: Annotated[Path | None, display("Plot of path, β and weights: .png, .svg or .pdf.", metavar="FILE")] = None
    allow_nonfinite: Annotated[
        bool, work("Continue where a checkpoint holds NaN or infinity.", "--allow-nonfinite")
    ] = False
    distributed: Annotated[
        Literal["torchrun", "slurm"], processes("Who starts the processes: torchrun sets RANK, Slurm SLURM_PROCID.")
    ] = "torchrun"
    rank_timeout: Annotated[
        float,
        processes("End the job where a process comes no further for so long.", metavar="SECONDS", min=1, shown="600"),
    ] = 600.0
    as_json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False


@dataclass(frozen=True, slots=True)
class Averaging(Measuring):
    """The options of every verb that forms an average."""

    plot: Annotated[
        Path | None, display("Plot path, β and weights, also in the card: .png, .svg or .pdf.", metavar="FILE")
    ] = None
    out: Annotated[
        Path | None,
        result(
            "Where the result goes: a directory, or an address such as s3://bucket/result.",
            "--out",
            "-o",
            metavar="DIR",
            shown="SOURCE/averaged/NAME",
            autocompletion=directories,
        ),
    ] = None
    dtype: Annotated[Literal["source", "float32", "bfloat16", "float16"], result("Output dtype.")] = "source"
    snapshot_every: Annotated[
        int | None,
        result("Also write the average as of every F optimizer steps.", metavar="F", min=1, shown="the final one only"),
    ] = None
    copy: Annotated[
        list[str] | None,
        result("Further files of the last checkpoint to copy beside the weights (repeatable).", metavar="GLOB"),
    ] = None
    card: Annotated[
        Path | None,
        result(
            "Markdown with front matter: its fields and its text come first in the model card.",
            metavar="FILE",
            readable=False,
        ),
    ] = None
    allow_anchor: Annotated[bool, work("Continue where the result is in effect the anchor.", "--allow-anchor")] = False
    force: Annotated[bool, result("Replace an existing result.", "--force")] = False
    dry_run: Annotated[bool, result("Show what would be read and written, and do neither.", "--dry-run")] = False
    accumulate: Annotated[
        Literal["float32", "float64"],
        work("Dtype of the running average.", shown="float32; float64 for float64 checkpoints"),
    ] = "float32"
    lora: Annotated[
        Literal["factors", "product"] | None,
        work("Low-rank adapters: average A and B each by itself, or the products s·BA.", shown="factors"),
    ] = None
    rank: Annotated[
        int | None, work("Cut averaged products to rank R.", metavar="R", min=1, shown="exact, the sum of all ranks")
    ] = None
    part: Annotated[
        str | None,
        processes("Do the I-th of N parts by itself, I from 0; see ckavg join.", metavar="I/N", shown="all of it"),
    ] = None
    wait: Annotated[bool, processes("Of --part: wait for the other parts of pass 1.", "--wait")] = False
    eval_command: Annotated[
        str | None,
        evaluation(
            "Run COMMAND on each result: {dir} its directory, {out} an empty one for its files.",
            "--eval",
            metavar="COMMAND",
        ),
    ] = None
    eval_metric: Annotated[
        str | None,
        evaluation(
            "The value that counts: a key of the JSON it prints or writes, or a word before a number.",
            metavar="NAME",
            shown="the last number printed",
        ),
    ] = None
    eval_goal: Annotated[
        Literal["min", "max"] | None,
        evaluation("Whether the least or the greatest value is best.", shown="by the name of the metric"),
    ] = None
    eval_stderr: Annotated[
        str | None, evaluation("The standard error of the value.", metavar="NAME", shown="NAME_stderr")
    ] = None
    eval_again: Annotated[bool, evaluation("Forget what this command said of these weights.", "--eval-again")] = False
    eval_run: Annotated[bool, evaluation("Also evaluate the run's own checkpoints, and snapshots.", "--eval-run")] = (
        False
    )
    csv: Annotated[Path | None, evaluation("Write the values by step to FILE.", metavar="FILE")] = None
    report: Annotated[
        Path | None, display("One HTML page of the results: table, curves, weights, path.", metavar="FILE.html")
    ] = None
    push_to_hub: Annotated[str | None, hub("Upload the result to owner/name when it is done.", metavar="REPO")] = None
    private: Private = None
    revision: Revision = None
    commit_message: CommitMessage = None
    create_pr: CreatePr = False

    @property
    def plots_weights(self) -> bool:
        """Whether the card gets its plot: importing matplotlib takes longer than a small average."""
        return self.plot is not None or self.push_to_hub is not None
