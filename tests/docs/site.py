"""What makes pages of the program, as mkdocs finds it: a file that is in no package."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load_hooks() -> ModuleType:
    """`docs/hooks.py`, if mkdocs is installed; else the tests that ask for it are skipped."""
    pytest.importorskip("mkdocs")
    spec = spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(name: str) -> str:
    """A page as it stands on the site."""
    return str(load_hooks().filled((ROOT / "docs" / name).read_text(encoding="utf-8")))
