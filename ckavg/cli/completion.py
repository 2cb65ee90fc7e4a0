"""Shell completion: directories, and the words of a sweep."""

from __future__ import annotations

import os
import shlex
import typing
from collections.abc import Iterator
from typing import Literal

from ckavg.schemes import SCHEMES
from ckavg.schemes.parse import SELECTED_BY, is_scheme, parameters_of, shown

_BREAKS = (":", "=")
"""Characters at which bash splits words."""


class _Rest(str):
    """The rest of a word of which bash has cut off the beginning, so that it does not start with what was typed."""

    def startswith(self, *_: object) -> bool:
        return True


def directories(incomplete: str) -> list[str]:
    """Directories that begin with `incomplete`; none if the shell does better: names to quote, a single match."""
    before, slash, start = incomplete.rpartition("/")
    try:
        found = sorted(each.name for each in os.scandir(before + slash or ".") if each.is_dir())
    except OSError:
        return []
    names = [each for each in found if each.startswith(start) and (start or not each.startswith("."))]
    if any(shlex.quote(each) != each for each in names) or (incomplete and len(names) == 1):
        return []
    return [f"{before}{slash}{each}" for each in names]


def devices(incomplete: str) -> list[str]:
    """What `--device` takes."""
    return [each for each in ("auto", "cpu", "cuda", "cuda:0") if each.startswith(incomplete)]


def scheme_words(incomplete: str) -> list[str]:
    """Words of a sweep that begin with `incomplete`, and directories: the first word may be one."""
    whole, cut_off = _whole_word(incomplete)
    found = [each for each in _words(whole) if each.startswith(whole)]
    found += directories(whole) if ":" not in whole else []
    return [_Rest(each[len(cut_off) :]) for each in found]


def _words(typed: str) -> Iterator[str]:
    """Schemes; of one that is meant, its parameters; of one of these, values; after a lone word, shells add a space."""
    name, colon, rest = typed.partition(":")
    if not colon:
        names = [*dict.fromkeys(scheme.name for scheme in SCHEMES if scheme.in_sweep)]
        yield from names
        meant = [each for each in names if each.startswith(typed)]
        if len(meant) == 1:
            yield from _words(f"{meant[0]}:")
    elif is_scheme(name):
        stated, comma, last = rest.rpartition(",")
        parameter, equals, _ = last.partition("=")
        values = _values(name)
        meant = [each for each in values if (each == parameter if equals else each.startswith(parameter))]
        before = f"{name}:{stated}{comma}"
        yield from (f"{before}{each}=" for each in meant if f"{each}=" not in stated)
        if len(meant) == 1:
            yield from (f"{before}{meant[0]}={value}" for value in values[meant[0]])


def _values(name: str) -> dict[str, list[str]]:
    """What the parameters of a scheme, and those that select checkpoints, may be: all choices, or an example."""
    found = {}
    for each in parameters_of(name):
        if typing.get_origin(each.type) is Literal:
            found[shown(each.name)] = list(typing.get_args(each.type))
        elif each.type is not bool:
            found[shown(each.name)] = [f"{0.99 if each.default is None else each.default}"]
    return found | {shown(each): ["1"] for each in SELECTED_BY}


def _whole_word(incomplete: str) -> tuple[str, str]:
    """The word that is typed, and how much of it bash has cut off, which ends words at a colon and an equals sign."""
    if "COMP_WORDS" not in os.environ:
        return incomplete, ""
    *before, last = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
    whole = last
    while before and (whole.startswith(_BREAKS) or before[-1].endswith(_BREAKS)):
        whole = before.pop() + whole
    return whole, whole if last in _BREAKS else whole.removesuffix(last)
