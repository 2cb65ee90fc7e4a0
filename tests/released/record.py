"""Carries the commands out and notes what came of them; as a program, writes it down as what is expected from now on.

    python -m tests.released.record [DIRECTORY]

The package is that of DIRECTORY, by default the one beside the tests. The program imports it once, and every command
is a fork of it: a second or so is saved each time.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tests.hub.server import TOKEN, serving
from tests.released.commands import COMMANDS, flip, write_inputs
from tests.storage.published import publish_revisions
from tests.storage.stores import fronting, storing

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXPECTED, TEXTS = HERE / "expected.json", HERE / "texts.json"
VERBS = (
    "pema",
    "bema",
    "ema",
    "ouema",
    "dema",
    "mean",
    "sweep",
    "path",
    "inspect",
    "verify",
    "ls",
    "diff",
    "push",
    "demo",
)
VOLATILE = {
    *("ckavg_version", "seconds", "memory_bytes", "room_bytes", "path_kernel"),
    *("source_fingerprints", "own_fingerprints", "made_at"),
}
WORDED = {"warnings", "problems", "problem", "message"}
"""What holds sentences; of lists of them, the number must stay."""
PRESENT = {".svg", ".png", ".md"}
"""Endings of files whose bytes are a matter of other packages, or of words."""
WORDS = (
    (r"(?m)^.*: (step \d+ of \d+,|\d+ %, .* left$).*\n", ""),  # how far a pass had come meanwhile
    (r"http://127\.0\.0\.1:\d+", "SERVER"),
    (r"\b[\d.]+ ([kMGT]?B|bytes)/s", "SPEED"),
    (r"\b(in|after) [\d.]+ (ms|s|min)\b", "in TIME"),
    (r"(room for|about) [\d.]+ [kMG]?B\b", r"\1 SIZE"),
    (r"\bckavg \d+\.\d+\.\d+", "ckavg VERSION"),
    (r"\b([0-9a-f]{16})[0-9a-f]{48}\b", r"\1"),
    (r"─+", "─"),
    (r" +(│?)$", r"\1"),
)

Outcome = dict[str, Any]


def observe(package: Path = ROOT) -> dict[str, Any]:
    """What comes of all commands: of each scenario, a list in their order, and the options of each verb.

    Args:
        package: the directory that `ckavg` is imported from.
    """
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        write_inputs(work / "inputs")
        hub = stack.enter_context(serving())
        store = stack.enter_context(fronting(stack.enter_context(storing())))
        publish_revisions(hub, "lab/run", work / "inputs/plain")
        store.upload(work / "inputs/sharded")
        inherited = ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR")
        environment = {name: os.environ[name] for name in inherited if name in os.environ} | {
            "HOME": str(work),
            "PYTHONUTF8": "1",
            "NO_COLOR": "1",
            "COLUMNS": "160",
            "XDG_CACHE_HOME": str(work / "cache"),
            "HF_HOME": str(work / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": "AKIASTANDIN",
            "AWS_SECRET_ACCESS_KEY": "SecretOfTheStore",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        words = [sys.executable, "-m", "tests.released.record", "--in", str(work), str(package)]
        ran = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stderr
        observed: dict[str, Any] = json.loads(ran.stdout)
        pushed = {
            f"{name}/{path}": _content(path, data, work)
            for name in ("lab/pushed", "lab/second")
            for path, data in hub.files(name).items()
        }
    return observed | {"pushed": [{"command": "push", "files": pushed}]}


def carry_out(work: Path) -> dict[str, Any]:
    """In a process whose environment is that of the commands: carry them out."""
    import huggingface_hub
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import s3fs
    import safetensors.torch
    import torch
    import yaml

    import ckavg

    assert all((huggingface_hub, matplotlib, s3fs, safetensors, torch, yaml))
    for module in pkgutil.walk_packages(ckavg.__path__, "ckavg."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    observed: dict[str, Any] = {
        "options": [{"command": verb, "options": _options(work, verb)} for verb in VERBS],
    }
    for scenario, commands in COMMANDS.items():
        directory = work / scenario.replace(" ", "-")
        directory.mkdir()
        named = {word.partition("/")[0] for command in commands for word in command.split()}
        for path in (work / "inputs").iterdir():
            if path.name in named:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, directory / path.name)
        observed[scenario] = [_outcome(work, directory, command) for command in commands]
    return observed


def _outcome(work: Path, directory: Path, command: str) -> Outcome:
    before = _files(directory)
    verb, *rest = words = shlex.split(command)
    if verb == "flip":
        flip(directory / rest[0])
        return {"command": command}
    status, out, err = _forked(work, directory, words)
    after = _files(directory)
    changed = {name: data for name, data in after.items() if before.get(name) != data}
    if status < 0:  # killed: what is left is hidden
        changed = {name: data for name, data in changed.items() if not _is_hidden(Path(name))}
    removed = [name for name in before.keys() - after.keys() if not _is_hidden(Path(name))]
    outcome: Outcome = {"command": command, "status": status}
    if "--json" in words and out.startswith("{"):
        outcome["json"] = _steady(json.loads(out), work)
        if verb == "push":
            del outcome["json"]["bytes"]  # among them the digits of a time
        out = ""
    outcome["files"] = {name: _content(name, data, work) for name, data in changed.items()} | dict.fromkeys(removed)
    texts = {"stdout": out, "stderr": err}
    if "--quiet" not in words and "--json" not in words:
        texts |= {name: data.decode() for name, data in changed.items() if name.endswith(".md")}
    outcome["texts"] = {name: _plain(text, work).splitlines() for name, text in texts.items() if text}
    return outcome


def _forked(work: Path, directory: Path, words: list[str]) -> tuple[int, str, str]:
    """A command in a process of its own: its status and what it printed."""
    streams = [work / "stdout", work / "stderr"]
    pid = os.fork()
    if not pid:
        for number, stream in enumerate(streams, 1):
            os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(directory)
        try:
            _run(words)
        finally:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = (stream.read_text() for stream in streams)
    return status, out, err


def _run(words: list[str]) -> None:
    import ckavg.cli
    import ckavg.demo

    if words[0] == "kill":
        _, stage, source = words

        def kill(progress: ckavg.Progress) -> None:
            if progress.stage == stage and progress.done > 0:
                os.kill(os.getpid(), signal.SIGKILL)

        ckavg.average(ckavg.open_run(source), ckavg.PEMA(), on_progress=kill)
    if words[0] == "demo":
        shape = ckavg.demo.LlamaShape(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
        ckavg.demo.train = partial(ckavg.demo.train, steps=20, save_every=5, pretraining_steps=10, shape=shape)
    sys.argv = ["ckavg", *words]
    ckavg.cli.main()


def _options(work: Path, verb: str) -> list[str]:
    _, out, _ = _forked(work, work, [verb, "--help-all"])
    starts = re.findall(r"^  ((?:--?[a-z][\w-]*[ ,/]*)+)", out, re.MULTILINE)
    found = {option for start in starts for option in re.findall(r"--?[a-z][\w-]*", start)}
    return sorted(found | {"-h", "--help"})


def _files(directory: Path) -> dict[str, bytes]:
    """All files below a directory, by relative path."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def _content(name: str, data: bytes, work: Path) -> Any:
    """What must stay of a file: its digest, or its values where it tells of time and place."""
    path = Path(name)
    if path.name in ("ckavg.json", ".ckavg-local.json"):
        return _steady(json.loads(data), work)
    if path.suffix in PRESENT or path.name == "path.json" or _is_hidden(path):
        return "present"
    if path.suffix == ".csv":
        return [[_number(each) for each in line.split(",")] for line in data.decode().splitlines()]
    return hashlib.sha256(data).hexdigest()[:16]


def _is_hidden(path: Path) -> bool:
    """Whether a file is none of a result: what is unfinished, say."""
    return any(part.startswith(".") for part in path.parts) and path.name != ".ckavg-local.json"


def _number(text: str) -> str | float:
    try:
        return float(f"{float(text):.12g}")
    except ValueError:
        return text


def _steady(value: Any, work: Path) -> Any:
    """JSON without what differs from time to time; floats to 12 digits, and of sentences their number."""
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if name not in VOLATILE and Path(name).suffix not in PRESENT}
        return {
            name: (len(each) if isinstance(each, list) else bool(each)) if name in WORDED else _steady(each, work)
            for name, each in kept.items()
        }
    if isinstance(value, list):
        return [_steady(each, work) for each in value]
    if isinstance(value, float):
        return float(f"{value:.12g}")
    return _plain(value, work) if isinstance(value, str) else value


def _plain(text: str, work: Path) -> str:
    """Text without times, speeds, versions and places."""
    text = text.replace(str(work), "WORK")
    for pattern, word in WORDS:
        text = re.sub(pattern, word, text, flags=re.MULTILINE)
    return text


def parts(observed: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must stay, and texts, which may be improved; each by scenario and command."""
    behaviour: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for scenario, outcomes in observed.items():
        behaviour[scenario] = [{name: value for name, value in each.items() if name != "texts"} for each in outcomes]
        texts[scenario] = [{"command": each["command"]} | each.get("texts", {}) for each in outcomes]
    return behaviour, texts


def main() -> None:
    if sys.argv[1:2] == ["--in"]:
        sys.path.insert(0, sys.argv[3])
        print(json.dumps(carry_out(Path(sys.argv[2]))))  # noqa: T201
        return
    observed = observe(Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT)
    for path, part in zip((EXPECTED, TEXTS), parts(observed), strict=True):
        path.write_text(_lines(part, 4) + "\n")


def _lines(value: Any, depth: int, indent: str = "") -> str:
    """JSON that is laid out down to a depth, and beneath that in one line."""
    if not (depth and value and isinstance(value, dict | list)):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + " "
    if isinstance(value, dict):
        each = [f"{json.dumps(name)}: {_lines(inner, depth - 1, deeper)}" for name, inner in value.items()]
    else:
        each = [_lines(inner, depth - 1, deeper) for inner in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{deeper}" + f",\n{deeper}".join(each) + f"\n{indent}{closing}"


if __name__ == "__main__":
    main()
