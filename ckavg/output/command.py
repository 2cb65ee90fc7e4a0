"""Stage *write*: settings as the options of a command line. Pure."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping

_ESCAPED = re.compile(r"[\\']")


def as_options(settings: Mapping[str, object]) -> str:
    """The options that state these settings; one with several values is repeated, and a switch that is on has none.

    >>> as_options({"gamma": 0.15, "from_step": 100, "path_exclude": ("lm_head.*", "b")})
    "--gamma 0.15 --from-step 100 --path-exclude 'lm_head.*' --path-exclude b"
    >>> as_options({"common_only": True})
    '--common-only'
    """
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if each is True else f" {shell_word(str(each))}")
        for name, value in settings.items()
        for each in (value if isinstance(value, tuple) else (value,))
    )


def shell_word(text: str) -> str:
    r"""The text as a word of a shell's command line, in one line and without a character that a terminal would obey.

    >>> print(shell_word("run"), shell_word("my run"), shell_word("a\nb's"))
    run 'my run' $'a\nb\'s'
    """
    if text.isprintable():
        return shlex.quote(text)
    escaped = "".join(char if char.isprintable() else _as_bytes(char) for char in _ESCAPED.sub(r"\\\g<0>", text))
    return f"$'{escaped}'"


def _as_bytes(char: str) -> str:
    """In octal, which takes three digits at most, whatever follows."""
    return "\\n" if char == "\n" else "".join(f"\\{byte:03o}" for byte in os.fsencode(char))
