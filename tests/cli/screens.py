"""What a person sees: the program in a real terminal of some width, as the text on its screen.

    python -m tests.cli.screens

records anew, in `tests/cli/screens/`, what the tests of `test_*_screens.py` compare.
"""

from __future__ import annotations

import difflib
import io
import os
import pty
import re
import subprocess
import sys
import termios
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.cells import cell_len

from ckavg.cli import main

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).with_suffix("")
RECORDING = "RECORD_SCREENS"
ROWS = 50

NO_COLOUR = {"NO_COLOR": "1"}
DUMB = {"TERM": "dumb"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}

_VOLATILE = (
    (r"\b\d+\.\d (s|ms|min)\b", r"TIME \1"),
    (r"(?m)^.*: \d+ %, .* left\n", ""),  # how far a slow machine had come after ten seconds
    (r"\b\d+(\.\d+)? ([kMGT]?B|bytes)/s", "RATE"),
    (r"\bRead [\d.]+ kB", "Read SIZE"),  # with a record, in which times have more digits or fewer
    (r"\b(about|room for) [\d.]+ [kMGT]?B\b", r"\1 SIZE"),
    (r"\b\d{4}-\d\d-\d\d \d\d:\d\d\b", "DATE"),
)
"""What differs from time to time and from machine to machine, and what stands for it."""

_TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Shown:
    """What came of a command.

    Attributes:
        text: the screen when it has ended, without spaces at the ends of lines; of a pipe, what went through it.
        raw: all that was printed, with escape sequences.
        status: the exit status; negative for a signal.
    """

    text: str
    raw: str
    status: int


def run_in_terminal(
    *words: str | Path,
    columns: int = 80,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    interrupt_at: str = "",
    warm: bool = False,
) -> Shown:
    """Run `ckavg` in a pseudo-terminal that has nothing but the command on its screen.

    Args:
        words: the command line, without `ckavg`.
        columns: width of the terminal.
        environment: variables beside those of a plain UTF-8 terminal with colours.
        cwd: where it is run.
        interrupt_at: press Ctrl-C once this text was printed.
        warm: fork this process, which has the program imported, instead of starting another.
    """
    words = ("-m", "ckavg", *words)
    pid, terminal = pty.fork()
    if not pid:
        try:
            os.chdir(cwd or ROOT)
            termios.tcsetwinsize(0, (ROWS, columns))
            if warm:
                _run_here(words[2:], _environment(environment))
            os.execve(sys.executable, [sys.executable, *map(str, words)], _environment(environment))
        finally:
            os._exit(99)
    data = b""
    while more := _read(terminal):
        data += more
        if interrupt_at and interrupt_at.encode() in data:
            os.write(terminal, b"\x03")
            interrupt_at = ""
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    raw = data.decode(errors="replace")
    return Shown(render(raw, columns), raw, status)


def run_in_pipe(
    *words: str | Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> tuple[Shown, Shown]:
    """Run `ckavg` where stdout and stderr are pipes; what went through each."""
    ran = subprocess.run(
        [sys.executable, "-m", "ckavg", *map(str, words)],
        cwd=cwd or ROOT,
        env=_environment(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    out, err = (stream.decode(errors="replace") for stream in (ran.stdout, ran.stderr))
    return Shown(out, out, ran.returncode), Shown(err, err, ran.returncode)


def render(raw: str, columns: int) -> str:
    """The screen of a terminal to which `raw` was printed; lines that have gone over its top edge included."""
    lines: list[list[str]] = [[]]
    row = column = 0
    for found in _TOKEN.finditer(raw):
        arguments, command, char = found.groups()
        if command:
            number = int(arguments) if arguments.isdecimal() else 0
            if command in "ABCD":
                row += {"A": -1, "B": 1}.get(command, 0) * max(number, 1)
                column += {"C": 1, "D": -1}.get(command, 0) * max(number, 1)
            elif command == "K":
                kept = lines[row][:column] if number == 0 else []
                lines[row] = ([" "] * column + lines[row][column:]) if number == 1 else kept
            elif command == "J":
                lines[row:] = [lines[row][:column]]
            row, column = max(row, 0), max(column, 0)
        elif char == "\r":
            column = 0
        elif char == "\b":
            column = max(column - 1, 0)
        elif char == "\n":
            row += 1
        elif char:
            width = cell_len(char)
            if column + width > columns:
                row, column = row + 1, 0
            lines += [[] for _ in range(row + 1 - len(lines))]
            line = lines[row]
            line += [" "] * (column + width - len(line))
            line[column : column + width] = [char, *[""] * (width - 1)]
            column += width
        lines += [[] for _ in range(row + 1 - len(lines))]
    return "\n".join("".join(line).rstrip() for line in lines).rstrip("\n") + "\n"


def compare(name: str, text: str, *, places: Mapping[Path, str] | None = None) -> None:
    """Compare a text with the recorded one as a whole, but for times, rates and places; or record it.

    Args:
        name: of the file, without `.txt`.
        text: a screen.
        places: what stands for directories that are others each time.
    """
    for place, word in (places or {}).items():
        text = text.replace(str(place), word)
    for pattern, word in _VOLATILE:
        text = re.sub(pattern, word, text)
    file = HERE / f"{name}.txt"
    if os.environ.get(RECORDING):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    recorded = file.read_text(encoding="utf-8")
    assert text == recorded, "\n".join(difflib.unified_diff(recorded.splitlines(), text.splitlines(), lineterm=""))


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """That of a plain terminal, whatever that of the tests is."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    plain = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT), "TZ": "UTC"}
    return kept | plain | {"HF_HUB_OFFLINE": "1"} | dict(more or {})


def _run_here(words: Sequence[str | Path], environment: Mapping[str, str]) -> None:
    """Become the program, whose terminal is the standard streams."""
    warnings.resetwarnings()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["ckavg", *map(str, words)]
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, mode, closefd=False), encoding="utf-8", line_buffering=True)
        for number, mode in enumerate("rww")
    )
    main()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # on Linux, how the other end says that it is closed
        return b""


def record() -> None:
    """Record all screens anew."""
    os.environ[RECORDING] = "1"
    sys.exit(pytest.main(["-q", *map(str, sorted(HERE.parent.glob("test_*_screens.py")))]))


if __name__ == "__main__":
    record()
