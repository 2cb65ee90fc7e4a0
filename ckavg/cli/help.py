"""Help screens: of the program, and of a verb, where the common options come first and all of them on demand."""

from __future__ import annotations

import inspect
import re
import shutil
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import typer
from typer.core import TyperCommand, TyperOption

from ckavg.cli.text import as_encoded, is_plain, wrapped
from ckavg.schemes import SCHEMES
from ckavg.schemes.parse import SELECTED_BY, described, parameters_of, shown

DOCUMENTATION = "https://example.org/ckavg/docs"

ALL = "--help-all"
MOST_LINES = 40

_COMMON = {
    *("init", "every", "from_step", "to_step", "last", "out", "dtype", "force", "dry_run"),
    *("eval_command", "as_json", "quiet"),
}
"""Shared options that `--help` shows. It also shows the options that only this verb has."""

_RARE = {"pairing", "clock", "min_beta", "form", "no_bias_correction", "momentum_per", "batch_scale", "sha256"}
"""Options of one verb that only `--help-all` shows."""

_KINDS = {float: "X", int: "N", str: "TEXT"}

_GAP = " " * 3
"""What separates the parts of a formula."""

_WIDEST, _COLUMN = 100, 26
"""The widest screen, since long lines are hard to read, and the column where meanings begin."""

EXAMPLES = {
    "pema": ("ckavg pema ./checkpoints", "ckavg pema ./checkpoints --gamma 0.2 --last 10"),
    "bema": ("ckavg bema ./checkpoints", "ckavg bema . --init ./base-model --eta 0.2"),
    "ema": ("ckavg ema ./checkpoints --gamma 0.2", "ckavg ema ./checkpoints --momentum 0.9999"),
    "power": ("ckavg power ./checkpoints", "ckavg power ./checkpoints --sigma-rel 0.05"),
    "ouema": ("ckavg ouema ./checkpoints", "ckavg ouema . --init ./base-model --eta 0.2"),
    "dema": ("ckavg dema ./checkpoints", "ckavg dema ./checkpoints --kappa 0.6"),
    "mean": ("ckavg mean ./checkpoints --last 5", "ckavg mean . --from-step 5000 --decay cosine"),
    "weights": ("ckavg weights . --last 3 --weights 0.1,0.2,0.7", "ckavg weights . --weights 500:0.3,1000:0.7"),
    "sweep": (
        "ckavg sweep . pema:gamma=0.1,0.15 mean:last=5,10",
        "ckavg sweep . pema last --eval './test.sh {dir}'",
    ),
    "watch": ("ckavg watch ./checkpoints pema mean:last=5", "ckavg watch . pema --until 10000"),
    "best": (
        "ckavg best . --eval './test.sh {dir}' --eval-goal min",
        "ckavg best . --eval './test.sh {dir}' --eval-metric acc",
    ),
    "join": ("ckavg pema . --out ./average --part 0/4", "ckavg join ./average"),
    "path": ("ckavg path ./checkpoints", "ckavg path . --sample 0.01 --csv path.csv"),
    "inspect": ("ckavg inspect ./checkpoints", "ckavg inspect ./checkpoints --deep"),
    "eval": ("ckavg eval ./average --text held_out.txt", "ckavg eval . --text held_out.txt --length 512"),
    "verify": ("ckavg verify ./averaged/mean", "ckavg verify ./averaged/mean --replay"),
    "ls": ("ckavg ls ./checkpoints", "ckavg ls ./results --json"),
    "diff": ("ckavg diff ./averaged/mean ./averaged/best", "ckavg diff ./averaged/mean ./checkpoint-1000"),
    "push": ("ckavg push ./averaged/mean my-model", "ckavg push ./averaged/mean lab/model --public"),
    "demo": ("ckavg demo", "ckavg demo ./try --force"),
}
"""Two command lines of each verb, short enough for a line of a narrow terminal."""


def program_screen(groups: dict[str, dict[str, str]], options: Sequence[Any]) -> str:
    """What `ckavg --help` prints.

    Args:
        groups: by their titles, the verbs with what each does.
        options: of the program itself.
    """
    columns = _width()
    purpose = "Average the saved checkpoints of a training run into one better model."
    lines = [f"{_emphasized('Usage:')} ckavg VERB [OPTIONS]", "", wrapped(purpose, columns)]
    for title, verbs in groups.items():
        rows = [(verb, _clause(text, columns - 11)) for verb, text in verbs.items()]
        lines += ["", _emphasized(f"{title}:"), *_in_columns(rows, columns, first=11)]
    begin = ("ckavg inspect ./checkpoints", "ckavg pema ./checkpoints")
    lines += ["", _emphasized("Begin with:"), *(f"  {each}" for each in begin)]
    names = ", ".join(each.opts[0] for each in options if each.param_type_name == "option")
    lines += ["", wrapped(f"ckavg VERB --help shows the options of a verb. Of the program: {names}.", columns)]
    return as_encoded("\n".join((*lines, f"{DOCUMENTATION}/cli.html")))


def verb_screen(command: TyperCommand, *, whole: bool) -> str:
    """What `ckavg VERB --help` prints: as much as fits a screen, or all of it.

    Args:
        command: the verb with its parameters.
        whole: whether all of it is shown.
    """
    columns = _width()
    options = [each for each in command.params if isinstance(each, TyperOption) and each.name != "help_all"]
    options.sort(key=_is_shared)  # its own first
    if whole:
        variables = (f"{each.envvar}={each.default}" for each in options if each.envvar and each.default)
        more = [wrapped(f"The environment can set options, too: {each}", columns) for each in islice(variables, 1)]
        return "\n".join(_lines(command, options, more, columns, by_panel=True))
    common = [each for each in options if _is_common(each, command)]
    more = [wrapped(f"{len(options) - len(common)} more options: ckavg {command.name} {ALL}", columns)]
    screens = (
        _lines(command, options, [], columns),
        _lines(command, common, more, columns, is_short=_is_shared),
        _lines(command, common, more, columns, is_short=lambda _: True),
    )
    return "\n".join(next((each for each in screens if len(each) <= MOST_LINES), screens[-1]))


def _lines(
    command: TyperCommand,
    options: Sequence[TyperOption],
    more: Sequence[str],
    columns: int,
    *,
    by_panel: bool = False,
    is_short: Callable[[Any], bool] = lambda _: False,
) -> list[str]:
    """The lines of a screen with these options. Short ones get one line with the most important words."""

    def rows(parameters: Iterable[Any]) -> Iterator[str]:
        texts = ((_named(each), _meaning(each, columns - _COLUMN if is_short(each) else 0)) for each in parameters)
        return _in_columns(texts, columns)

    lines = [f"{_emphasized('Usage:')} {usage(command)}", "", *_described(as_encoded(str(command.help)), columns)]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    if arguments:
        lines += ["", *rows(arguments)]
    if _takes_words(command):
        lines += ["", _emphasized("Schemes, with their parameters and defaults:"), *_schemes(columns)]
    panels: dict[str, list[TyperOption]] = {}
    for each in options:
        panels.setdefault((each.rich_help_panel if by_panel else None) or "Options", []).append(each)
    for panel, here in panels.items():
        lines += ["", _emphasized(f"{panel}:"), *rows(here)]
    lines += ["", _emphasized("Examples:"), *(f"  {each}" for each in EXAMPLES[str(command.name)])]
    text = "\n".join((*lines, "", *more, f"{DOCUMENTATION}/cli.html#ckavg-{command.name}"))
    return as_encoded(text).split("\n")


def usage(command: TyperCommand) -> str:
    """How a verb is typed.

    Args:
        command: the verb with its parameters.
    """
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    names = [_named(each) if each.required or "[" in _named(each) else f"[{_named(each)}]" for each in arguments]
    required = [
        f"{each.opts[0]} {_metavar(each)}" for each in command.params if isinstance(each, TyperOption) and each.required
    ]
    return " ".join(("ckavg", str(command.name), *names, *required, "[OPTIONS]"))


def add_metavars(command: TyperCommand, function: Any) -> None:
    """Give every option without a metavar one by its type; a switch gets none."""
    kinds = typing.get_type_hints(function)
    for each in command.params:
        if each.metavar is None and each.name in kinds:
            each.metavar = _kind(kinds[each.name])


def _kind(kind: Any) -> str:
    """The metavar of a type: its choices, a letter for a number, `TEXT` or `PATH`."""
    kind = (
        next((each for each in typing.get_args(kind) if each is not type(None)), kind) if _is_optional(kind) else kind
    )
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    return "" if kind is bool else _KINDS.get(kind, "PATH")


def _is_optional(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def _is_shared(parameter: Any) -> bool:
    return bool(parameter.rich_help_panel)


def _is_common(option: TyperOption, command: TyperCommand) -> bool:
    if not _is_shared(option):
        return option.name not in _RARE
    return option.name in _COMMON and not (_takes_words(command) and option.name in SELECTED_BY)


def _takes_words(command: TyperCommand) -> bool:
    return any(each.name == "words" for each in command.params)


def _metavar(parameter: Any) -> str:
    return "" if getattr(parameter, "is_flag", False) else str(parameter.metavar or "")


def _named(parameter: Any) -> str:
    """How a parameter is typed: `-o, --out DIR`, `--private/--public`, `SOURCE`."""
    if parameter.param_type_name == "argument":
        return _metavar(parameter)
    names = ", ".join(sorted(parameter.opts, key=len))
    switched_off = "".join(f"/{name}" for name in parameter.secondary_opts)
    return f"{names}{switched_off} {_metavar(parameter)}".rstrip()


def _meaning(parameter: Any, room: int = 0) -> str:
    """The help of a parameter and its default, shortened to fit `room` columns if that is not 0."""
    text, default = str(parameter.help or ""), parameter.show_default
    if not isinstance(default, str):
        value = parameter.default
        is_said = parameter.required or default is False or value is None or value is False
        default = "" if is_said else f"{value:g}" if isinstance(value, float) else str(value)
    suffix = f" [default:\N{NO-BREAK SPACE}{default}]" if default else ""
    if not room:
        return f"{text}{suffix}"
    short = _clause(text, room - len(suffix))
    return f"{short}{suffix}" if len(short) + len(suffix) <= room else _clause(text, room)


def _described(text: str, columns: int) -> Iterator[str]:
    """The paragraphs of a docstring; formulas, which have wide gaps, are broken there alone."""
    for number, paragraph in enumerate(inspect.cleandoc(text).split("\n\n")):
        if number:
            yield ""
        if _GAP not in paragraph:
            yield from wrapped(paragraph.replace("\n", " "), columns).split("\n")
            continue
        for line in paragraph.split("\n"):
            left = " " * (4 + len(line) - len(line.lstrip()))
            parts = [line.strip()] if len(line) + 4 <= columns else re.split(f"{_GAP}+", line.strip())
            yield from (f"{left}{part.strip()}" for part in parts)


def _schemes(columns: int) -> Iterator[str]:
    """The words of a sweep: each scheme with its parameters and their defaults, then what selects checkpoints."""
    rows = []
    for name in dict.fromkeys(scheme.name for scheme in SCHEMES if scheme.in_sweep):
        own = [each for each in parameters_of(name) if each.type is not bool]
        stated = " ".join(f"{shown(each.name)}={_value(each.default, each.type)}" for each in own)
        rows.append((name, stated or _clause(described(name), columns - 11)))
    selection = " ".join(f"{shown(name)}=N" for name in SELECTED_BY)
    yield from _in_columns((*rows, ("any", selection)), columns, first=11)


def _value(default: object, kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    return _kind(kind) if default is None else f"{default:g}" if isinstance(default, float) else str(default)


# --- layout ---


def _width() -> int:
    """Columns that a help screen takes."""
    return max(40, min(shutil.get_terminal_size().columns, _WIDEST))


def _in_columns(rows: Iterable[tuple[str, str]], columns: int, *, first: int = _COLUMN) -> Iterator[str]:
    r"""Rows of a name and what it means, the meanings one below the other.

    Args:
        rows: names and meanings.
        columns: of the terminal.
        first: where the meanings begin; a longer name has a line of its own.

    >>> print(*_in_columns([("--every F", "Take a checkpoint every F steps.")], 30, first=14), sep="\n")
      --every F   Take a
                  checkpoint every
                  F steps.
    """
    for name, meaning in rows:
        left = f"  {name}"
        fits = len(left) + 1 < first
        lines = wrapped(as_encoded(meaning), columns, first, first).split("\n")
        lines[0] = f"{left if fits else '':{first}}{lines[0]}"
        yield from lines if fits else [left, *lines]


def _clause(text: str, room: int) -> str:
    """The first sentence up to the last colon, semicolon or comma that fits; at least up to the first.

    >>> _clause("Mean of the checkpoints: SWA; LAWA of the newest few. As is.", 35)
    'Mean of the checkpoints: SWA'
    """
    whole = re.split(r"\.(?:\s|$)", text)[0].replace("\n", " ")
    ends = [*(found.start() for found in re.finditer(r"[:;,] ", whole)), len(whole)]
    return whole[: max((end for end in ends if end <= room), default=ends[0])]


def _emphasized(text: str) -> str:
    """A heading, bold in a terminal that can show it."""
    return text if is_plain() else typer.style(text, bold=True)
