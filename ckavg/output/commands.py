"""The command line that makes a result again, and how its words are quoted. Pure."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from ckavg.output.record import BASE_MODEL, Record, is_address
from ckavg.schemes import Scheme


def as_options(settings: Mapping[str, object]) -> str:
    """The options for some settings. An option with several values is repeated; a switch has no value.

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
    r"""The text quoted for a shell: one word on one line, without control characters.

    >>> print(shell_word("run"), shell_word("my run"), shell_word("a\nb's"))
    run 'my run' $'a\nb\'s'
    """
    if text.isprintable():
        return shlex.quote(text)
    octal = {char: "".join(f"\\{byte:03o}" for byte in os.fsencode(char)) for char in text if not char.isprintable()}
    octal |= {"\n": "\\n", "\\": r"\\", "'": r"\'"}
    return f"$'{''.join(octal.get(char, char) for char in text)}'"


def reproduce(record: Record, scheme: Scheme) -> str:
    """The command line that makes the same average. A run on this machine is taken from the current directory."""
    settings: dict[str, object] = {**scheme.stated, **record.selection}
    settings.pop("every_from", None)  # follows from --burn-in
    if "init" in settings and not is_address(settings["init"]):
        settings["init"] = BASE_MODEL  # a local path means nothing elsewhere
    snapshot = record.output.step if record.output.step < record.steps[-1] else None
    measured = record.path_length is not None
    others: dict[str, tuple[object, object]] = {
        "dtype": (record.dtype, "source"),
        "accumulate": (record.accumulate, "float32"),
        "allow_nonfinite": (record.allow_nonfinite, False),
        "allow_anchor": (record.is_mostly_anchor, False),
        "snapshot_every": (snapshot, None),
        "lora": (record.lora, "factors"),
        "rank": (record.rank, None),
        "sample": (record.sample, 1),
        "path_exclude": (record.path_exclude if measured else (), ()),
        "zero_sigma": (record.zero_sigma if measured else "exclude", "exclude"),
    }
    settings |= {name: value for name, (value, default) in others.items() if value != default}
    source = f" {shell_word(str(record.source))}" if is_address(record.source) else ""
    verb = f"{record.scheme}{source}" if scheme.has_verb else f"sweep{source} {record.scheme}"
    return f"ckavg {verb} {as_options(settings)}".rstrip()
