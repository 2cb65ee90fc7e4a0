"""Schemes by name: their parameters, from the fields and docstrings of the classes, and how to type them.

`ckavg pema --gamma 0.1` and the word `pema:gamma=0.1` of a sweep use the same table. Pure.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckavg.errors import SettingError
from ckavg.schemes import SCHEMES, Scheme

_EXAMPLE = "Write a scheme as NAME or NAME:PARAMETER=VALUE,VALUE,..., such as pema:gamma=0.1,0.15 or mean."


@dataclass(frozen=True, slots=True)
class Parameter:
    """A hyper-parameter of the schemes of one name.

    Attributes:
        name: as in Python.
        type: `int`, `float`, `str`, a `Literal`, or `bool` for a switch.
        default: None if stating it selects another scheme of that name.
        help: a sentence.
        repeatable: whether its option may be repeated; the values are joined by commas.
    """

    name: str
    type: Any
    default: float | int | str | None
    help: str
    repeatable: bool = False


def parameters_of(name: str) -> tuple[Parameter, ...]:
    """The hyper-parameters of all schemes of a name.

    >>> [parameter.name for parameter in parameters_of("ema")]
    ['gamma', 'tau', 'momentum', 'momentum_per', 'batch_scale']
    """
    return tuple(parameter for scheme in _called(name) for parameter in _parameters(scheme))


def described(name: str) -> str:
    """The description of the schemes of a name: each docstring up to and including the formula."""
    texts = []
    for scheme in _called(name):
        paragraphs = (inspect.getdoc(scheme) or "").split("\n\n")
        formula = next((place for place, text in enumerate(paragraphs) if text.startswith(" ")), 0)
        text = "\n\n".join(map(inspect.cleandoc, paragraphs[: formula + 1]))
        texts.append(f"With --{scheme.chosen_by}: {text}" if scheme.chosen_by else text)
    return "\n\n".join(texts)


def make_scheme(name: str, stated: Mapping[str, Any]) -> Scheme:
    """The scheme of a name with these parameters; switches set the parameters they stand for.

    Raises:
        SettingError: the parameters exclude each other, or a value is outside its domain.

    >>> make_scheme("bema", {"eta": 0.1, "no_bias_correction": True}).label
    'bema-etainf'
    """
    schemes = _called(name)
    plain = next(scheme for scheme in schemes if not scheme.chosen_by)
    chosen = next((scheme for scheme in schemes if scheme.chosen_by in stated), plain)
    values = dict(stated)
    for switch, stands_for in chosen.switches.items():
        values |= stands_for if values.pop(switch, False) else {}
    others = [shown(each) for each in values if each not in {field.name for field in dataclasses.fields(chosen)}]
    if others and chosen is plain:
        asked = next(scheme.chosen_by for scheme in schemes if scheme.chosen_by)
        raise SettingError(f"{name}: {' and '.join(others)} requires {asked}.", hint=f"Give a value for {asked}.")
    if others:
        raise SettingError(
            f"{name}: {' and '.join(others)} cannot be used with {chosen.chosen_by}.",
            hint="Choose one of the two schedules.",
        )
    return chosen(**values)


def shown(name: str) -> str:
    """The name of a parameter on the command line."""
    return name.replace("_", "-")


SELECTED_BY = ("every", "last", "from_step", "to_step")
"""Fields of `Selection` that a word may set, besides hyper-parameters."""


@dataclass(frozen=True, slots=True)
class Word:
    """One average as requested by a word.

    Attributes:
        text: the word with only these values, such as `pema:gamma=0.1,every=100`.
        scheme: how to average.
        selection: the word's selection of checkpoints: whole numbers by name.
    """

    text: str
    scheme: Scheme
    selection: Mapping[str, int]

    @property
    def label(self) -> str:
        """A name for the average."""
        return "-".join([self.scheme.label, *(f"{shown(name)}{value}" for name, value in self.selection.items())])


def parse_words(words: Iterable[str]) -> tuple[Word, ...]:
    """All averages that the words request, in order; several values of a parameter give several averages.

    A word is a name, or a name, a colon and parameters: `bema:eta=0.1,0.2,kappa=0.5,every=100`. Several values of
    several parameters give all combinations, with the last parameter changing fastest.

    Args:
        words: as typed.

    Raises:
        SettingError: a name, a parameter or a value is not valid, or one average is requested twice.

    >>> [word.label for word in parse_words(["pema:gamma=0.1,0.2,last=5", "mean"])]
    ['pema-gamma0.1-last5', 'pema-gamma0.2-last5', 'mean']
    """
    parsed = tuple(each for word in words for each in _parse(word))
    labels = [word.label for word in parsed]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise SettingError(f"{twice[0]} is requested twice.", hint="Name every average once.")
    return parsed


def is_scheme(word: str) -> bool:
    """Whether a word begins with the name of a scheme, and so is not a directory.

    >>> is_scheme("mean"), is_scheme("pema:gamma=1"), is_scheme("./checkpoints")
    (True, True, False)
    """
    return any(scheme.in_sweep for scheme in _called(word.partition(":")[0]))


def _called(name: str) -> list[type[Scheme]]:
    return [scheme for scheme in SCHEMES if scheme.name == name]


def _parameters(scheme: type[Scheme]) -> list[Parameter]:
    types, texts = typing.get_type_hints(scheme), _attributes(inspect.getdoc(scheme) or "")
    parameters = []
    for field in dataclasses.fields(scheme):
        default: Any = None if field.name == scheme.chosen_by or field.default == "" else field.default
        kind = types[field.name]
        kind = kind if typing.get_origin(kind) in (None, typing.Literal) else str  # several types: parsed by the scheme
        repeatable = field.name in scheme.repeatable
        parameters.append(Parameter(field.name, kind, default, texts.get(field.name, ""), repeatable))
    for switch, stands_for in scheme.switches.items():
        same = " ".join(f"--{shown(name)} {value}" for name, value in stands_for.items())
        parameters.append(Parameter(switch, bool, False, f"The same as {same}."))
    return parameters


def _attributes(docstring: str) -> dict[str, str]:
    """The texts under "Attributes:" of a docstring, by name, as sentences for a terminal."""
    texts: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Attributes:\n")[2].partition("\n\n")[0].splitlines():
        if line.startswith("     "):
            texts[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            texts[name] = text[:1].upper() + text[1:]
    return {name: text.replace("`", "") for name, text in texts.items()}


def _parse(word: str) -> list[Word]:
    name, _, rest = word.partition(":")
    if not is_scheme(name):
        names = ", ".join(dict.fromkeys(scheme.name for scheme in SCHEMES if scheme.in_sweep))
        raise SettingError(f"{word!r}: there is no scheme {name!r}. There are {names}.", hint=_EXAMPLE)
    own = {parameter.name: parameter.type for parameter in parameters_of(name) if parameter.type is not bool}
    types = own | dict.fromkeys(SELECTED_BY, int)
    values = _values(word, rest)
    unknown = next((each for each in values if each not in types), None)
    if unknown:
        allowed = f"It has {', '.join(sorted(own))}" if own else "It has none"
        selected = ", ".join(map(shown, SELECTED_BY))
        raise SettingError(
            f"{word!r}: {name} has no parameter {unknown!r}. {allowed}; checkpoints are chosen with {selected}.",
            hint=_EXAMPLE,
        )
    parsed = []
    for texts in itertools.product(*values.values()):
        typed = {each: _typed(word, each, text, types[each]) for each, text in zip(values, texts, strict=True)}
        selection = {each: int(typed[each]) for each in SELECTED_BY if each in typed}
        stated = ",".join(f"{shown(each)}={text}" for each, text in zip(values, texts, strict=True))
        scheme = make_scheme(name, {each: value for each, value in typed.items() if each in own})
        parsed.append(Word(f"{name}:{stated}" if stated else name, scheme, selection))
    return parsed


def _values(word: str, text: str) -> dict[str, list[str]]:
    """`eta=0.1,0.2,kappa=0.5` as texts by parameter name; hyphens and underscores are the same in names."""
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for part in text.split(",") if text else ():
        name, equals, value = part.rpartition("=")
        if equals:
            current = values.setdefault(name.strip().replace("-", "_"), [])
        if current is None or not value.strip():
            raise SettingError(f"{word!r}: {part!r} is not a parameter with a value.", hint=_EXAMPLE)
        current.append(value.strip())
    return values


def _typed(word: str, name: str, text: str, kind: Any) -> float | int | str:
    if kind not in (int, float):
        return text  # the scheme checks it
    try:
        value: float | int = kind(text)
    except ValueError as error:
        expected = "a whole number" if kind is int else "a number"
        raise SettingError(f"{word!r}: {shown(name)} is {text!r}; it must be {expected}.", hint=_EXAMPLE) from error
    if name in ("every", "last") and value < 1:
        raise SettingError(f"{word!r}: {name} is {value}; it must be 1 or more.", hint=_EXAMPLE)
    return value
