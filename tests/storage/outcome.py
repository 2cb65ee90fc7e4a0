"""The required outcome of a command on a remote run, after success or failure."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable
from pathlib import Path

from typer.testing import Result

from ckavg.storage.atomic import cache_directory
from tests.cli.runner import run_cli
from tests.hub.server import TOKEN

SECRETS = (TOKEN, "SignedSigned", "SecretOfTheStore")
"""What no output holds: the token, the key in the address of a large file, and that of the object store."""


def weights_of(result: Path) -> dict[str, bytes]:
    """The weight files of a result, and their index."""
    return {path.name: path.read_bytes() for path in result.iterdir() if ".safetensors" in path.name}


def size_of(run: Path) -> int:
    """Bytes of the weight files of a run on this machine."""
    return sum(path.stat().st_size for path in run.rglob("*.safetensors"))


def cached_objects() -> list[str]:
    """Names of all files that were downloaded from object stores."""
    return sorted(path.name for path in (cache_directory() / "files").rglob("*") if path.is_file())


def wait_for_fetching() -> None:
    """Connections that were busy when something failed end by themselves."""
    for thread in threading.enumerate():
        if thread.name.startswith("ckavg-fetch"):
            thread.join(60)


def nothing_is_busy() -> None:
    """No connection is left."""
    wait_for_fetching()
    gc.collect()  # an exception that was caught may hold a run until then


def served_of(served: dict[str, int], ending: str = ".safetensors") -> int:
    """Bytes that were served of files with this ending."""
    return sum(size for name, size in served.items() if name.endswith(ending))


def refused(*command: str | Path, named: str, status: int = 1) -> str:
    """Run a command that ends with one message, which names the place and says what to do next; nothing is left.

    Returns:
        The message.
    """
    told = told_once(run_cli(*command), named, status=status)
    nothing_is_busy()
    return told


def told_once(done: Result, named: str, *, status: int = 1) -> str:
    """Exactly one message, with the address as typed and what to do next; no secrets, no internals.

    Returns:
        The message.
    """
    assert done.exit_code == status, done.output
    told = done.stderr[done.stderr.index("error: ") :]
    assert done.stderr.count("error: ") == 1, done.stderr
    assert named in told, told
    assert len([line for line in told.splitlines() if line.strip()]) >= 2, f"nothing to do next: {told}"
    keeps_to_itself(done.output)
    return told


def keeps_to_itself(text: str, *, also: Iterable[str] = ()) -> None:
    """No traceback and no secret."""
    for unwanted in ("Traceback", *SECRETS, *also):
        assert unwanted not in text, text
