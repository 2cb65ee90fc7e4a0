"""How a verb gets its options: a dataclass of shared ones, joined to the verb's own in one signature."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping

Options = typing.TypeVar("Options")
Command = Callable[..., None]


def with_options(options_class: type[Options]) -> Callable[[Callable[[Options], None]], Command]:
    """Make a command of a function that takes nothing but shared options."""

    def decorate(function: Callable[[Options], None]) -> Command:
        return joined(function, options_class, {}, lambda options, _: function(options))

    return decorate


def joined(
    described: Callable[..., object],
    options_class: type[Options],
    own: Mapping[str, inspect.Parameter],
    body: Callable[[Options, Mapping[str, object]], None],
    *,
    takes_source: bool = True,
) -> Command:
    """Make a command with the name and the text of a function, and with two sets of options.

    Args:
        described: whose name and docstring the command has.
        options_class: a dataclass of the shared options, `source` the first of them.
        own: the verb's own parameters, by name.
        body: called with the shared options and the values of the verb's own.
        takes_source: whether the source is an argument of its own.
    """
    hints = typing.get_type_hints(options_class, include_extras=True)
    source, *shared = (
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(options_class)  # type: ignore[arg-type]
    )
    parameters = [*([source] if takes_source else ()), *own.values(), *shared]

    def command(**values: object) -> None:
        of_verb = {name: values.pop(name) for name in own}
        body(options_class(**values), of_verb)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__ = described.__name__
    command.__doc__ = described.__doc__
    return command
