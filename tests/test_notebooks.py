"""The notebooks run from top to bottom on CPU."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.quick import QUICK_FLAGS

NOTEBOOKS = sorted((Path(__file__).parents[1] / "colab").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPT_JAX_NOTEBOOK_STEPS", "20")
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
    monkeypatch.setenv("XLA_FLAGS", QUICK_FLAGS)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    before, after = (line for line in printed.splitlines() if line.startswith(("soft prompt", "accuracy after")))
    assert before.split()[3] == after.split()[-1], "a reloaded prompt scores as it did before it was saved"
    assert (tmp_path / "topic_prompt" / "prompt.safetensors").stat().st_size > 20 * 256 * 4
