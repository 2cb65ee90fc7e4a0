"""The command line, run in this process as a user would type it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from ckavg.cli.app import app

Snapshot = dict[str, tuple[int, int, bytes]]


def run_cli(*arguments: str | Path) -> Result:
    """Run `ckavg` with these arguments. A bug keeps its traceback; an exit status does not raise."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def placeless(record: dict[str, Any]) -> dict[str, Any]:
    """A record but for places, which `ckavg.json` and `--json` state each in its own way."""
    moved = {name: [each | {"directory": ""} for each in record[name]] for name in ("inputs", "outputs")}
    return record | moved | {"source": ""}


def visible(directory: Path) -> set[str]:
    """The names in a directory, but for hidden ones."""
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def snapshot(directory: Path) -> Snapshot:
    """Size, mtime and contents of every file below a directory, by relative path."""
    found: Snapshot = {}
    for folder, _, files in os.walk(directory):
        for name in files:
            path = Path(folder) / name
            status = path.stat()
            found[str(path.relative_to(directory))] = (status.st_size, status.st_mtime_ns, path.read_bytes())
    return found
