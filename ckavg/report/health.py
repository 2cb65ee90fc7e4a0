"""Stage *report*: what `inspect --deep` shows beside what `inspect` does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckavg.checkpoints.inspect import Inspection
from ckavg.errors import listed
from ckavg.report import inspection
from ckavg.report.console import print_json, quoted, stdout_console
from ckavg.report.text import MOST_ROWS, as_bytes
from ckavg.verify.findings import Finding
from ckavg.verify.health import Health

_MOST_FINDINGS = 20
_NAMED = 3


def to_dict(found: Inspection, health: Health, *, seconds: float) -> dict[str, Any]:
    """The inspection and the health as plain JSON values."""
    return {
        **inspection.to_dict(found),
        "health": {
            "findings": [
                {"kind": each.check, "step": each.step, "tensor": each.tensor, "message": each.message}
                for each in health.findings
            ],
            "path": list(health.path),
            "sha256": dict(health.sha256),
            "bytes_read": health.bytes_read,
            "seconds": seconds,
        },
    }


def print_health(found: Inspection, health: Health, *, seconds: float, as_json: bool) -> None:
    """Print the inspection, then findings and hashes, to stdout.

    Args:
        found: what the headers told.
        health: what the weights told.
        seconds: how long the reading took.
        as_json: one JSON object instead.
    """
    if as_json:
        print_json(to_dict(found, health, seconds=seconds))
        return
    console = stdout_console()
    inspection.print_inspection(found, as_json=False, verdict=False)
    for kind, style, told in (
        ("problem", "bold red", _shortened(each for each in health.findings if each.is_problem)),
        ("warning", "yellow", _shortened(_warnings(health))),
    ):
        for message in told:
            console.print()
            console.print(quoted(f"{kind}: {message}"), style=style)
    if health.sha256:
        console.print()
        console.print("SHA-256 of the weight files", style="bold")
        for file, digest in list(health.sha256.items())[:MOST_ROWS]:
            console.print(quoted(f"{digest}  {file}"), soft_wrap=True)
        if len(health.sha256) > MOST_ROWS:
            console.print(f"… {len(health.sha256) - MOST_ROWS} more with --json")
    console.print()
    frozen = [each.tensor for each in health.findings if each.check == "frozen" and each.tensor]
    if frozen:
        named = listed(frozen, _NAMED)
        console.print(quoted(f"frozen   {len(frozen)} tensor{'s' * (len(frozen) > 1)} that never move ({named})"))
    console.print(f"read     {as_bytes(health.bytes_read)}, in {seconds:.1f} s")
    console.print()
    console.print(quoted(_verdict(found, health)), soft_wrap=True)


def _warnings(health: Health) -> Iterable[Finding]:
    return (each for each in health.findings if not each.is_problem and each.check != "frozen")


def _shortened(findings: Iterable[Finding]) -> list[str]:
    messages = [finding.message for finding in findings]
    hidden = len(messages) - _MOST_FINDINGS
    return messages if hidden <= 0 else [*messages[:_MOST_FINDINGS], f"and {hidden} more, all of them with --json."]


def _verdict(found: Inspection, health: Health) -> str:
    steps = sorted({finding.step for finding in health.findings if finding.is_problem and finding.step is not None})
    if not steps:
        return inspection.conclusion(found, [(each.step, each.message) for each in _warnings(health)])
    options = " ".join(f"--skip-step {step}" for step in steps[:_NAMED]) + " …" * (len(steps) > _NAMED)
    return (
        f"NaN or infinity in {len(steps)} checkpoint{'s' * (len(steps) > 1)}: leave them out with {options}, or save "
        "them again."
    )
