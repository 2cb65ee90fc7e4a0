"""The public names, and what importing them costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ckavg

PACKAGE = Path(ckavg.__file__).parent
STAGES = {
    "run": set(),
    "schemes": set(),
    "engine": {"run"},
    "path": {"run", "engine"},
    "replay": {"run", "engine", "schemes"},
    "health": {"run", "engine", "path"},
    "result": {"run", "schemes"},
    "verify": {"run", "engine", "schemes", "path", "result", "plan", "fetching"},
    "demo": {"engine"},
}
"""Which stages each stage may import: the values passed to it, and the engine that the passes run on."""

ALWAYS = {"atomic", "cache", "errors", "journal", "redaction", "storage", "untrusted", "version"}
VALUES_OF_RUN = {
    f"ckavg.run.{name}"
    for name in ("values", "checkpoint", "layouts", "contents", "foreign", "metadata", "stamps", "statistics")
}


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module} | {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }


def test_public_names() -> None:
    assert ckavg.__all__ == [
        "BEMA",
        "DEMA",
        "EMA",
        "OUEMA",
        "PEMA",
        "Averaged",
        "CkavgError",
        "Last",
        "Mean",
        "MomentumEMA",
        "PathLength",
        "Progress",
        "Pushed",
        "Run",
        "Verified",
        "__version__",
        "all_ranks",
        "average",
        "measure_path",
        "open_run",
        "plan_average",
        "push_result",
        "verify_result",
    ]
    assert all(getattr(ckavg, name) is not None for name in ckavg.__all__)


@pytest.mark.parametrize("stage", STAGES)
def test_stages_know_only_the_values_passed_to_them(stage: str) -> None:
    for path in (*(PACKAGE / stage).rglob("*.py"), *PACKAGE.glob(f"{stage}.py")):
        for module in imports_of(path):
            if not module.startswith("ckavg."):
                continue
            other = module.split(".")[1]
            assert other in STAGES[stage] | ALWAYS | {stage}, f"{path.name} of {stage} imports {module}"
            if other == "run" and stage != "run":
                assert module in VALUES_OF_RUN, f"{path.name} of {stage} imports {module}"


def test_schemes_are_pure_numbers() -> None:
    for path in (PACKAGE / "schemes").rglob("*.py"):
        roots = {module.split(".")[0] for module in imports_of(path)}
        assert roots <= {"__future__", "abc", "collections", "dataclasses", "itertools", "math", "typing", "ckavg"}


@pytest.mark.parametrize(
    ("module", "users"), [("rich", {"report", "cli"}), ("typer", {"report", "cli"}), ("matplotlib", {"report"})]
)
def test_terminal_libraries_stay_at_the_edge(module: str, users: set[str]) -> None:
    for path in PACKAGE.rglob("*.py"):
        if module in {name.split(".")[0] for name in imports_of(path)}:
            assert path.relative_to(PACKAGE).parts[0] in users


def test_few_modules_know_the_client_of_the_hub() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any("huggingface_hub" in name for name in imports_of(path))
    }
    assert users == {"hub/client.py", "hub/sending.py", "hub/transfer.py", "storage/hub.py", "storage/hub_errors.py"}


def test_importing_is_light() -> None:
    heavy = "torch", "numpy", "rich", "huggingface_hub", "safetensors", "matplotlib"
    code = f"import sys, ckavg; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_inspecting_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    code = (
        "import sys, ckavg.cli.app as a\n"
        f"try: a.app(['inspect', {str(tmp_path)!r}])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "1 False"
