"""Schemes by name: what their parameters are, from the fields and docstrings of the classes, and how they are typed.

`ckavg pema --gamma 0.1` and the word `pema:gamma=0.1` of a sweep are made from the same table. Pure.
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
        default: None where stating it chooses another scheme of that name.
        help: a sentence.
        repeatable: whether its option may be repeated, for a text with commas.
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
    """What the schemes of a name do: of each docstring, all up to and with the formula."""
    texts = []
    for scheme in _called(name):
        paragraphs = (inspect.getdoc(scheme) or "").split("\n\n")
        formula = next((place for place, text in enumerate(paragraphs) if text.startswith(" ")), 0)
        text = "\n\n".join(map(inspect.cleandoc, paragraphs[: formula + 1]))
        texts.append(f"With --{scheme.chosen_by}: {text}" if scheme.chosen_by else text)
    return "\n\n".join(texts)


def make_scheme(name: str, stated: Mapping[str, Any]) -> Scheme:
    """The scheme of a name with these parameters; switches count for what they stand for.

    Raises:
        SettingError: they do not go together, or a value is outside its domain.

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
        raise SettingError(f"{name}: {' and '.join(others)} must go with {asked}.", hint=f"Give a value for {asked}.")
    if others:
        raise SettingError(
            f"{name}: {' and '.join(others)} must not go with {chosen.chosen_by}.",
            hint="Choose one of the two schedules.",
        )
    return chosen(**values)


def shown(name: str) -> str:
    """A parameter as it is typed."""
    return name.replace("_", "-")


SELECTED_BY = ("every", "last", "from_step", "to_step")
"""What a word may say of the selection of checkpoints, beside hyper-parameters; the names are those of `Selection`."""


@dataclass(frozen=True, slots=True)
class Word:
    """One average, as it was asked for.

    Attributes:
        text: the word with these values alone, such as `pema:gamma=0.1,every=100`.
        scheme: how to average.
        selection: of which checkpoints, where the word says so: whole numbers by name.
    """

    text: str
    scheme: Scheme
    selection: Mapping[str, int]

    @property
    def label(self) -> str:
        """A name for what the word says."""
        return "-".join([self.scheme.label, *(f"{shown(name)}{value}" for name, value in self.selection.items())])


def parse_words(words: Iterable[str]) -> tuple[Word, ...]:
    """Every average that the words name, in order; several values of a parameter give as many averages.

    A word is a name, or a name, a colon and parameters: `bema:eta=0.1,0.2,kappa=0.5,every=100`. With several values of
    several parameters, all combinations are meant, the last parameter changing fastest.

    Args:
        words: what was typed.

    Raises:
        SettingError: a name, a parameter or a value is not understood, or one average is named twice.

    >>> [word.label for word in parse_words(["pema:gamma=0.1,0.2,last=5", "mean"])]
    ['pema-gamma0.1-last5', 'pema-gamma0.2-last5', 'mean']
    """
    parsed = tuple(each for word in words for each in _parse(word))
    labels = [word.label for word in parsed]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise SettingError(f"{twice[0]} is there twice.", hint="Name every average once.")
    return parsed


def is_scheme(word: str) -> bool:
    """Whether a word begins with the name of a scheme, so that it is no directory.

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
            raise SettingError(f"{word!r}: {part!r} is no value of any parameter.", hint=_EXAMPLE)
        current.append(value.strip())
    return values


def _typed(word: str, name: str, text: str, kind: Any) -> float | int | str:
    if kind not in (int, float):
        return text  # the scheme knows which there are
    try:
        value: float | int = kind(text)
    except ValueError as error:
        told = "a whole number" if kind is int else "a number"
        raise SettingError(f"{word!r}: {shown(name)} is {text!r}; it must be {told}.", hint=_EXAMPLE) from error
    if name in ("every", "last") and value < 1:
        raise SettingError(f"{word!r}: {name} is {value}; it must be 1 or more.", hint=_EXAMPLE)
    return value
