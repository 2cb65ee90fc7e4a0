"""What a shell is told when somebody presses Tab, asked as the scripts ask that `ckavg --show-completion` prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.screens import run_in_pipe


def in_bash(line: str, directory: Path) -> list[str]:
    """What bash is offered, which takes colons and equals signs for words of their own."""
    words = [word for word in re.split(r"\s+|([:=])", line) if word]
    words += [""] if line.endswith(" ") else []
    asked = {
        "_CKAVG_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    return run_in_pipe(environment=asked, cwd=directory)[0].text.splitlines()


def in_others(shell: str, line: str, directory: Path) -> str:
    asked = {
        "_CKAVG_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    return run_in_pipe(environment=asked, cwd=directory)[0].text


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("runs/a/checkpoint-1", "runs/b", "results", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "readme.txt").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ckavg pe", ["pema"]),
        ("ckavg pema --zero-", ["--zero-sigma"]),
        ("ckavg pema --help-", ["--help-all"]),
        ("ckavg pema --dtype ", ["source", "float32", "bfloat16", "float16"]),
        ("ckavg bema --form=", ["paper", "author"]),
        ("ckavg mean --device c", ["cpu", "cuda", "cuda:0"]),
        ("ckavg mean ", ["results", "runs"]),
        ("ckavg mean runs/", ["runs/a", "runs/b"]),
        ("ckavg mean runs/a", []),  # the shell goes on into it by itself
        ("ckavg sweep . me", ["mean", "mean:decay=", "mean:every=", "mean:last=", "mean:from-step=", "mean:to-step="]),
        ("ckavg sweep . pema:g", ["gamma=", "gamma=0.15"]),
        ("ckavg sweep . pema:scope=", ["global", "tensor"]),
        ("ckavg sweep . pema:gamma=0.1,0.2,sc", ["0.1,0.2,scope=", "0.1,0.2,scope=global", "0.1,0.2,scope=tensor"]),
        ("ckavg watch runs ema:momentum-per=s", ["step"]),
        ("ckavg sweep . nothing:", []),
    ],
)
def test_bash(line: str, offered: list[str], directory: Path) -> None:
    assert [each for each in in_bash(line, directory) if each] == offered


def test_a_first_word_may_be_a_directory(directory: Path) -> None:
    offered = in_bash("ckavg sweep ", directory)
    assert {"pema", "last", "runs", "results"} <= {*offered}
    assert "weights" not in offered, "which is no word of a sweep"
    assert "readme.txt" not in offered


def test_zsh_and_fish(directory: Path) -> None:
    told = in_others("zsh", "ckavg sweep . pema:scope=g", directory)
    assert told == "_arguments '*: :((\"pema\\\\:scope=global\"))'\n"
    assert "bfloat16" in in_others("zsh", "ckavg pema --dtype ", directory)
    assert in_others("fish", "ckavg sweep . pema:ga", directory).split() == ["pema:gamma=", "pema:gamma=0.15"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_can_be_installed(shell: str, tmp_path: Path) -> None:
    asked = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    out, _ = run_in_pipe("--install-completion", shell, environment=asked)
    assert out.status == 0
    script = next(path for path in tmp_path.rglob("*ckavg*") if path.is_file())
    assert f"complete_{shell}" in script.read_text(encoding="utf-8")
