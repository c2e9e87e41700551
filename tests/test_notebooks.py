"""The notebooks run from top to bottom, as committed, on the embedded model.

What the model itself says (the cells tagged so) differs from one kind of processor to the next, and is not compared.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
SPEAKS = "the-model-speaks"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell gave back, as text; what it printed about its progress left out."""
    given = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and SPEAKS not in cell.metadata.get("tags", []):
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    given.append(output.data["text/plain"])
                elif output.output_type == "stream" and output.name == "stdout":
                    given.append(output.text)
    return given


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_what_it_shows(path: Path, tmp_path: Path) -> None:
    """Run in a copy, so that nothing of an earlier run is there to answer from."""
    shutil.copytree(ROOT / "data", tmp_path / "data")
    (tmp_path / "notebooks").mkdir()
    shown = nbformat.read(path, as_version=4)
    fresh = nbformat.from_dict(shown)
    NotebookClient(
        fresh, timeout=180, coalesce_streams=True, resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    ).execute()
    assert texts(fresh) == texts(shown)
