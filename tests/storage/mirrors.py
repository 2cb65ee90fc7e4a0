"""Olah, an independent implementation of the Hub, on loopback, as a mirror of another Hub or of a git repository.

It is run by the interpreter of the tests, or by the one that `OLAH_PYTHON` names where it lives in an environment of
its own.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.hub.server import Hub, Repo, pointer_of

PATIENCE_SECONDS = 60
BLOCK = 1 << 18
"""Bytes that the mirror of a Hub takes over at once, and keeps."""


@dataclass(frozen=True, slots=True)
class Olah:
    """Where it answers, and the commits of the repository in it by branch."""

    url: str
    name: str
    branches: dict[str, str]


def missing() -> str:
    """Why it cannot be run here; empty if it can."""
    if "OLAH_PYTHON" not in os.environ and importlib.util.find_spec("olah") is None:
        return "olah is not installed"
    return "" if shutil.which("git") else "olah needs git"


@contextmanager
def mirroring_hub(hub: Hub, name: str, directory: Path) -> Iterator[Olah]:
    """All that the Hub has, taken over file by file in blocks, and served from there."""
    with _running(
        directory,
        f"""
        hf-scheme = "http"
        hf-netloc = "{urlsplit(hub.url).netloc}"
        hf-lfs-netloc = "{urlsplit(hub.storage_url).netloc}"
        cache-block-size = "{BLOCK}"
        cache-chunk-size = "{BLOCK}"
        """,
    ) as url:
        yield Olah(url, name, dict(hub.repos[name].branches))


@contextmanager
def mirroring_git(repo: Repo, name: str, directory: Path) -> Iterator[Olah]:
    """A repository in git, of which Olah makes a Hub by itself. It answers every range with the whole file."""
    branches = as_git(repo, directory / "mirrors" / "models" / name)
    offline = "\n[accessibility]\noffline = true\n"
    with _running(directory, f'mirrors-path = ["{directory / "mirrors"}"]{offline}') as url:
        yield Olah(url, name, branches)


def as_git(repo: Repo, directory: Path) -> dict[str, str]:
    """The commits and branches of a repository, written by git; large files as git-lfs keeps them.

    Returns:
        The commits by branch.
    """
    directory.mkdir(parents=True)
    identity = {f"GIT_{who}_{what}": "ada@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

    def git(*arguments: str) -> str:
        environment = {**os.environ, **identity, **own}
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet", "--initial-branch=main")
    objects = directory / ".git" / "lfs" / "objects"
    made: dict[str, str] = {}
    for (oid, tree), message in zip(repo.commits.items(), repo.messages, strict=True):
        git("rm", "-r", "--quiet", "--ignore-unmatch", ".")
        for path, (data, is_large) in tree.items():
            place = directory / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(pointer_of(data) if is_large else data)
            if is_large:
                digest = hashlib.sha256(data).hexdigest()
                kept = objects / digest[:2] / digest[2:4] / digest
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(data)
        git("add", "--all")
        git("commit", "--quiet", "--allow-empty", "--message", message)
        made[oid] = git("rev-parse", "HEAD")
    for branch, oid in repo.branches.items():
        if branch != "main":
            git("branch", branch, made[oid])
    return {branch: made[oid] for branch, oid in repo.branches.items()}


@contextmanager
def _running(directory: Path, settings: str) -> Iterator[str]:
    """The process, once it answers. What it said is on stdout at the end: pytest shows it if the test has failed."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    directory.mkdir(exist_ok=True)
    config, log = directory / "olah.toml", directory / "said"
    basic = f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{directory / "kept"}"\n'
    config.write_text(basic + "\n".join(line.strip() for line in settings.splitlines()))
    interpreter = os.environ.get("OLAH_PYTHON", sys.executable)
    command = [interpreter, "-m", "olah.server", "--config", str(config)]
    # its own command line counts where the configuration is silent, but for these two
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-path", str(directory / "logs")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {"NO_PROXY": "127.0.0.1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=directory, env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            _wait(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            sys.stdout.write(log.read_text(errors="replace")[-20_000:])


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    pause, deadline = threading.Event(), time.monotonic() + PATIENCE_SECONDS  # time.sleep may be away: see `hub`
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
        try:
            connection.request("GET", "/openapi.json")
            connection.getresponse().read()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            pause.wait(0.05)
        else:
            return
        finally:
            connection.close()
