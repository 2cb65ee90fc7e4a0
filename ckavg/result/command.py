"""Stage *write*: settings as the options of a command line. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping


def as_options(settings: Mapping[str, object]) -> str:
    """The options that state these settings; one with several values is repeated, and a switch that is on has none.

    >>> as_options({"gamma": 0.15, "from_step": 100, "path_exclude": ("lm_head.*", "b")})
    "--gamma 0.15 --from-step 100 --path-exclude 'lm_head.*' --path-exclude b"
    >>> as_options({"common_only": True})
    '--common-only'
    """
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if each is True else f" {shlex.quote(str(each))}")
        for name, value in settings.items()
        for each in (value if isinstance(value, tuple) else (value,))
    )
