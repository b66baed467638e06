"""The notebook in docs/ runs from its first cell to its last, on fewer pictures and in one epoch."""

import nbformat
import pytest
from nbclient import NotebookClient

from helpers.drawn import ROOT

SHORTER = {"EPOCHS = 60": "EPOCHS = 1", 'draw("train", 48)': 'draw("train", 4)', 'draw("test", 12)': 'draw("test", 2)'}


@pytest.mark.slow
def test_the_notebook_goes_from_a_folder_to_a_drawn_prediction(monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    for cell in notebook.cells:
        for text, short in SHORTER.items():
            cell.source = cell.source.replace(text, short)
    assert all(any(short in cell.source for cell in notebook.cells) for short in SHORTER.values())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT / "docs"}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "image/jpeg" in shown[-1] and "<Found: " in shown[-1]["text/plain"]
    assert any("no errors" in output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
