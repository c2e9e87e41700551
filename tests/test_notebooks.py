"""The notebooks run from top to bottom, as committed, on the embedded model or the simulated endpoint.

What the model itself says differs from one kind of processor to the next, and what the clock says from run to run: the
cells tagged so are run, and not compared.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.notebooks import ROOT, execute
from tests.server import SimulatedServer

VARY = {"the-model-speaks", "the-clock-speaks"}
VOLATILE = {"execution", "widgets", "ExecuteTime", "collapsed", "scrolled"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell gave back, as text; what it printed about its progress left out."""
    given = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and not VARY & set(cell.metadata.get("tags", [])):
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    given.append(output.data["text/plain"])
                elif output.output_type == "stream" and output.name == "stdout":
                    given.append(output.text)
    return given


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_what_it_shows(path: Path, tmp_path: Path) -> None:
    """Run in a copy, so that nothing of an earlier run is there to answer from."""
    shown = nbformat.read(path, as_version=4)
    fresh = nbformat.from_dict(shown)
    execute(fresh, tmp_path)
    assert texts(fresh) == texts(shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs_and_nothing_that_changes_by_itself(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    for metadata in (notebook.metadata, *(cell.metadata for cell in notebook.cells)):
        assert not VOLATILE & set(metadata)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_what_its_reader_will_be_able_to_do(path: Path) -> None:
    opening = nbformat.read(path, as_version=4).cells[0]
    assert opening.cell_type == "markdown"
    assert "After this notebook you can" in opening.source


@pytest.mark.parametrize("widgets", [True, False], ids=["widgets", "text"])
def test_a_cell_has_its_bar_with_and_without_ipywidgets(server: SimulatedServer, tmp_path: Path, widgets: bool) -> None:
    call = f'pd.DataFrame({{"a": ["x", "y"]}}).llm.complete("{{a}}", model="m", base_url={server.base_url!r}).shape'
    cell = nbformat.v4.new_code_cell(f"import pandas as pd, llmframe\n{call}")
    execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path, widgets=widgets)
    said = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    drawn = [output.data for output in cell.outputs if output.output_type == "display_data"]
    assert ("2/2" in said) is not widgets
    assert any("application/vnd.jupyter.widget-view+json" in data for data in drawn) is widgets
    assert "Warning" not in said
