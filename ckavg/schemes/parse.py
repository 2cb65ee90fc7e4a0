"""Schemes from the words of a command line: `pema:gamma=0.05,0.1` is two of them. Pure."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

from ckavg.errors import SettingError
from ckavg.schemes.base import Scheme

_EXAMPLE = "Write a scheme as NAME or NAME:PARAMETER=VALUE,VALUE,..., such as pema:gamma=0.1,0.15 or mean."


def parse_schemes(words: Iterable[str], known: Iterable[type[Scheme]]) -> tuple[Scheme, ...]:
    """Every scheme that the words name, in order; several values of a parameter give as many schemes.

    A word is a name, or a name, a colon and parameters: `bema:eta=0.1,0.2,kappa=0.5`. With several values of several
    parameters, all combinations are meant, the last parameter changing fastest.

    Args:
        words: what was typed.
        known: the schemes there are; of two with one name, the first that has all parameters is taken.

    Raises:
        SettingError: a name, a parameter or a value is not understood, or one average is named twice.

    >>> from ckavg.schemes import SCHEMES
    >>> [scheme.label for scheme in parse_schemes(["pema:gamma=0.1,0.2", "mean"], SCHEMES)]
    ['pema-gamma0.1', 'pema-gamma0.2', 'mean']
    """
    classes = tuple(known)
    schemes = tuple(scheme for word in words for scheme in _parse(word, classes))
    labels = [scheme.label for scheme in schemes]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise SettingError(f"{twice[0]} is there twice.", hint="Name every average once.")
    return schemes


def is_scheme(word: str, known: Iterable[type[Scheme]]) -> bool:
    """Whether a word begins with the name of a scheme, so that it is no directory.

    >>> from ckavg.schemes import SCHEMES
    >>> is_scheme("mean", SCHEMES), is_scheme("pema:gamma=1", SCHEMES), is_scheme("./checkpoints", SCHEMES)
    (True, True, False)
    """
    return word.partition(":")[0] in {scheme.name for scheme in known}


def _parse(word: str, classes: tuple[type[Scheme], ...]) -> list[Scheme]:
    name, _, rest = word.partition(":")
    candidates = [scheme for scheme in classes if scheme.name == name]
    if not candidates:
        names = ", ".join(dict.fromkeys(scheme.name for scheme in classes))
        raise SettingError(f"{word!r}: there is no scheme {name!r}. There are {names}.", hint=_EXAMPLE)
    values = _values(word, rest)
    parameters = [{field.name for field in dataclasses.fields(scheme)} for scheme in candidates]
    fitting = next((place for place, names in enumerate(parameters) if names >= values.keys()), None)
    if fitting is None:
        allowed = sorted(set().union(*parameters))
        unknown = next((name for name in values if name not in allowed), None)
        wrong = f"has no parameter {unknown!r}" if unknown else f"does not take {', '.join(values)} together"
        told = f"It has {', '.join(allowed)}." if allowed else "It has none."
        raise SettingError(f"{word!r}: {name} {wrong}. {told}", hint=_EXAMPLE)
    scheme = candidates[fitting]
    types = {field.name: type(field.default) for field in dataclasses.fields(scheme)}
    typed = [[_typed(word, name, text, types[name]) for text in texts] for name, texts in values.items()]
    return [scheme(**dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*typed)]


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


def _typed(word: str, name: str, text: str, kind: type) -> float | int | str:
    try:
        return kind(text)  # type: ignore[no-any-return]
    except ValueError as error:
        told = "a whole number" if kind is int else "a number"
        raise SettingError(f"{word!r}: {name} is {text!r}; it must be {told}.", hint=_EXAMPLE) from error
