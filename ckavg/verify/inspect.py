"""Inspects a run: its headers and, if asked for, its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckavg.averaging.sources import inspect_source
from ckavg.checkpoints.inspect import Inspection
from ckavg.checkpoints.run import Run, Selection
from ckavg.engine.context import OnProgress, listening
from ckavg.engine.remote import fetch_all
from ckavg.errors import SettingError, as_arguments
from ckavg.storage.base import AnyPath
from ckavg.storage.remote import storages_of

if TYPE_CHECKING:
    from ckavg.verify.health import Health


@dataclass(frozen=True, slots=True)
class Inspected:
    """The outcome of an inspection.

    Attributes:
        run: the checkpoints whose headers are sound.
        health: of their weights; None without `deep`.
        problems: what prevents averaging.
        warnings: for the user.
    """

    run: Run
    health: Health | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Inspected({self.run!r}, {len(self.problems)} problems, {len(self.warnings)} warnings)"

    def __str__(self) -> str:
        lines = [f"problem: {each}" for each in self.problems]
        lines += [f"warning: {as_arguments(each)}" for each in self.warnings if each not in self.run.warnings]
        return "\n".join([str(self.run), *lines])


def inspect(
    run: Run | AnyPath | str,
    *,
    deep: bool = False,
    sha256: bool = False,
    progress: bool | OnProgress = False,
    **selection: Any,
) -> Inspected:
    """Inspect a run, and return its problems instead of raising them.

    Args:
        run: a run, or a directory or address.
        deep: also read all weights, for NaN, stale saves and checkpoints that stand out.
        sha256: like `deep`, with the SHA-256 of every weight file.
        progress: see `average`.
        selection: which checkpoints of a directory or address, see `open_run`; not allowed with a run.

    Raises:
        CkavgError: there is nothing to inspect, or files changed or cannot be read.
    """
    found: Run
    if isinstance(run, Run):
        if selection:
            raise SettingError(
                f"{', '.join(selection)}: a run has its checkpoints already.",
                hint="Give its directory instead, or leave out the selection.",
            )
        found = run
    else:
        limit = selection.pop("max_disk", None)
        chosen: dict[str, Any] = {
            name: Path(value) if name == "init" and isinstance(value, str) else value
            for name, value in selection.items()
        }
        chosen |= {name: tuple(value) for name, value in chosen.items() if isinstance(value, list)}
        found = inspect_source(run, Selection(**chosen), max_disk=limit)
    problems = tuple(str(each) for each in found.problems) if isinstance(found, Inspection) else ()
    if not (deep or sha256):
        return Inspected(found, None, problems, found.warnings)
    from ckavg.verify.health import examine  # imports torch

    with listening(progress) as on_progress:
        fetch_all(found.checkpoints, on_progress)
        health = examine(found.source, found.checkpoints, sha256=sha256, on_progress=on_progress)
        for storage in storages_of(checkpoint.path for checkpoint in found.checkpoints):
            storage.remove_downloads()
    unsound = tuple(each.message for each in health.findings if each.is_problem)
    doubtful = tuple(each.message for each in health.findings if not each.is_problem)
    return Inspected(found, health, problems + unsound, found.warnings + doubtful)
