"""The rooms of the package: which there are, what each may import, and what is not written here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ckavg

PACKAGE = Path(ckavg.__file__).parent
ROOMS = (
    "errors",
    "schemes",
    "storage",
    "checkpoints",
    "engine",
    "path",
    "output",
    "averaging",
    "verify",
    "hub",
    "callback",
    "demo",
    "cli",
)
"""In the order in which they may import each other: a room imports itself and earlier ones."""

TERMINAL = {"rich": {"cli"}, "typer": {"cli"}, "matplotlib": {"output", "path", "averaging"}}  # the last two: a type


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module} | {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }


def test_there_are_fourteen_entries() -> None:
    entries = {room_of(path) for path in PACKAGE.rglob("*.py")}
    assert entries == {*ROOMS, "__init__", "__main__"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_earlier_ones(room: str) -> None:
    earlier = {*ROOMS[: ROOMS.index(room) + 1]}
    for path in (path for path in PACKAGE.rglob("*.py") if room_of(path) == room):
        own = {module.split(".")[1] for module in imports_of(path) if module.startswith("ckavg.")}
        assert own <= earlier, f"{path} imports {own - earlier}"


def test_schemes_are_pure_numbers() -> None:
    pure = {
        "__future__",
        "abc",
        "ckavg",
        "collections",
        "dataclasses",
        "hashlib",
        "inspect",
        "itertools",
        "math",
        "typing",
    }
    for path in (PACKAGE / "schemes").rglob("*.py"):
        assert {module.split(".")[0] for module in imports_of(path)} <= pure


@pytest.mark.parametrize(("library", "rooms"), TERMINAL.items())
def test_libraries_of_the_terminal_stay_at_the_edge(library: str, rooms: set[str]) -> None:
    users = {room_of(path) for path in PACKAGE.rglob("*.py") if library in {n.split(".")[0] for n in imports_of(path)}}
    assert users <= rooms


OLD_WORDS = {
    *("ahead", "agree", "canvas", "digests", "drawn", "elsewhere", "failing", "fitted", "foreign", "fused", "heads"),
    *("ledger", "mirror", "opening", "picture", "retrying", "settled", "sink", "stamps", "strips", "tidy"),
    *("tries", "unfinished"),
}
"""Words of an earlier house, each of which has a term of the field in its place."""

UNPICKLERS = {"_pickle", "cloudpickle", "copyreg", "dill", "joblib", "marshal", "pickle", "pickletools", "shelve"}
"""What runs a pickle, or its like. `checkpoints/unpickler.py` is a machine of our own, and needs none of them."""


def names_in(path: Path) -> set[str]:
    """What a module is called, and what it defines: classes, functions, constants."""
    tree = ast.parse(path.read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return {path.stem} | defined | {target.id for target in targets if isinstance(target, ast.Name)}


def test_names_are_terms_of_the_field() -> None:
    for path in PACKAGE.rglob("*.py"):
        for name in names_in(path):
            words = {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}
            assert not words & OLD_WORDS, f"{path}: {name}"
            assert not name.lower().lstrip("_").startswith("of_"), f"{path}: {name}"


def test_what_libraries_do_is_not_written_here() -> None:
    for path in PACKAGE.rglob("*.py"):
        used = {module.split(".")[0] for module in imports_of(path)}
        assert "ctypes" not in used or path.name == "compiled.py", path
        assert "socket" not in used, path
        assert "torch.distributed" not in {*imports_of(path)}, path
        assert not used & UNPICKLERS, path
        assert "torch.load" not in path.read_text() or path.name == "unsupported.py", path


def test_the_design_names_files_that_are_there() -> None:
    text = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text) if not name.startswith("tests/")}
    assert len(named) > 15
    assert not [name for name in sorted(named) if not (PACKAGE / name).exists()]
