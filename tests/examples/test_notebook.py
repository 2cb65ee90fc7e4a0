"""The notebook runs from first to last cell, and its averages are better than the last checkpoint."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.mark.exhaustive
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    losses = ast.literal_eval(notebook.cells[-1].outputs[0]["data"]["text/plain"])
    assert len(losses) == 4
    assert losses["pema-gamma0.15"] < losses["last checkpoint"]
    assert (tmp_path / "quickstart-run" / "averaged" / "pema-gamma0.15" / "model.safetensors").exists()
