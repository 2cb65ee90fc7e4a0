"""The verbs: which there are, what each does, and how one is loaded when it is run."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperOption

from ckavg.cli.errors import usage_errors
from ckavg.cli.help import ALL, add_metavars, verb_screen
from ckavg.cli.text import say
from ckavg.errors import SettingError, printable
from ckavg.schemes import SCHEMES
from ckavg.schemes.parse import described

GROUPS = {
    "Average a run": {
        **{scheme.name: described(scheme.name) for scheme in SCHEMES if scheme.has_verb},
        "join": "Put the parts of an average together that were done with --part.",
    },
    "Compare averages": {
        "sweep": "Form many averages from one reading of the checkpoints: every value of every scheme.",
        "best": "Search for the average that your own command finds best, and compare it with the last checkpoint.",
        "watch": "Average a run anew whenever a checkpoint of it is complete, while training goes on.",
        "eval": "Compute the held-out loss of a causal language model on a text, in nats per token.",
    },
    "Look at a run or a result": {
        "inspect": "Show what was found, in which order, and what is wrong with it. Reads no weights without --deep.",
        "path": "Measure how far the weights travelled: pass 1 alone, kept for later runs.",
        "ls": "List the results of a run: recipe, evaluation, what their weights say. Reads no weights.",
        "diff": "Compare two results, or a result with a checkpoint: recipe, weights, distance by tensor.",
        "verify": "Read a result again and check it against its record: files, weights, numbers.",
    },
    "Publish, and try": {
        "push": "Upload a finished average to the Hugging Face Hub.",
        "demo": "Train a small model, save its checkpoints, average them, and compare.",
    },
}
"""What `ckavg --help` says of each verb, without importing its file; a verb itself begins with the same sentence."""

VERBS = {verb: text for group in GROUPS.values() for verb, text in group.items()}

TYPED_ONLY = {
    *("force", "allow_anchor", "allow_nonfinite", "eval_command", "confirm", "fetch"),
    *("push_to_hub", "private", "create_pr"),
}
"""Options that the environment cannot set: they replace results, lift a refusal, run a command, or publish."""

_EVALUATION_VARIABLES = {"CKAVG_EVAL_DIR", "CKAVG_EVAL_OUT"}
"""What a command given with --eval finds in its environment, and passes on to a `ckavg eval`."""


class Verb(TyperCommand):
    """A verb whose file is imported when it is run, so that `ckavg --help` need not wait for all of them."""

    def load(self) -> TyperCommand:
        """The verb itself, with its options."""
        name = str(self.name)
        if name in {scheme.name for scheme in SCHEMES}:
            function = import_module("ckavg.cli.average").scheme_verb(name)
        else:
            function = getattr(import_module(f"ckavg.cli.{name}"), name)
        command = _as_command(name, function)
        add_metavars(command, function)
        for each in _options(command):
            each.envvar = None if each.name in TYPED_ONLY else _variable(name, each)
        command.params += _as_command(name, _help_all).params
        return command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **more: Any) -> Any:
        """As of the verb itself."""
        command = self.load()
        with usage_errors(command):
            context = command.make_context(info_name, args, parent=parent, **more)
        if not context.resilient_parsing:  # as when a shell asks for completions
            _check_environment(command)
            _tell_environment(command, context)
        return context


class _Loaded(TyperCommand):
    def format_help(self, _context: Any, formatter: Any) -> None:
        formatter.write(verb_screen(self, whole=False))


def _as_command(name: str, function: Any) -> TyperCommand:
    alone = typer.Typer(add_completion=False)
    alone.command(name, cls=_Loaded)(function)
    return cast(TyperCommand, typer.main.get_command(alone))


def _show_all(context: typer.Context, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        typer.echo(verb_screen(cast(TyperCommand, context.command), whole=True))
        raise typer.Exit


def _help_all(
    help_all: Annotated[
        bool,
        typer.Option(ALL, callback=_show_all, is_eager=True, expose_value=False, help="Show all options and exit."),
    ] = False,
) -> None:
    pass


def _options(command: TyperCommand) -> Iterator[TyperOption]:
    yield from (each for each in command.params if isinstance(each, TyperOption))


def _variable(verb: str, option: TyperOption) -> str:
    """The environment variable that sets an option: `CKAVG_PEMA_GAMMA`."""
    name = max(option.opts, key=len).removeprefix("--")
    return f"CKAVG_{verb}_{name}".replace("-", "_").upper()


def _check_environment(command: TyperCommand) -> None:
    """Refuse variables that look as if they set an option of this verb, and do not.

    Raises:
        SettingError: there is one.
    """
    verb = str(command.name)
    variables = {_variable(verb, each): each for each in _options(command)}
    begun = [name for name in os.environ if name.startswith(f"CKAVG_{verb.upper()}_")]
    for name in sorted({*begun} - _EVALUATION_VARIABLES):
        option = variables.get(name)
        if option is None:
            near = difflib.get_close_matches(name, variables, n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            raise SettingError(f"The variable {name} sets no option of {verb}.", hint=f"{meant}See: ckavg {verb} {ALL}")
        if not option.envvar and os.environ[name]:
            raise SettingError(
                f"The variable {name} is set, but {option.opts[0]} is only taken from the command line.",
                hint=f"Unset it with: unset {name}",
            )


def _tell_environment(command: TyperCommand, context: Any) -> None:
    """Say which options the environment has set: nobody sees them in the command line."""
    for each in _options(command):
        source = context.get_parameter_source(str(each.name))
        if source is not None and source.name == "ENVIRONMENT":
            say(printable(f"{each.opts[0]} is {os.environ[str(each.envvar)]}, by the variable {each.envvar}"))
