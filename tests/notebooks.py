"""Run the notebooks in place, and keep nothing in them that changes by itself: ``python -m tests.notebooks [NAME]``.

The bars are kept as text, which a reader sees without a kernel; times of execution, widgets' states and the version of
the Python that ran it are left out, so that a diff shows what changed.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
WITHOUT_WIDGETS = "--InteractiveShellApp.exec_lines=import sys; sys.modules['ipywidgets'] = None"
CELL_S = 180  # what a cell may take
BESIDE = ("data", "tests")  # what a notebook finds beside its directory, as in a clone
LEFT_OUT = (
    "__pycache__",
    ".*",
    "test_*",
    "conftest.py",
    "attacks",
    "bench",
)  # of these: they hold what looks like keys


def execute(notebook: nbformat.NotebookNode, directory: Path, *, widgets: bool = True) -> None:
    """Run a notebook from top to bottom in an empty directory, so that nothing of an earlier run answers for it."""
    for name in BESIDE:
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    place = directory / "notebooks"
    place.mkdir()
    NotebookClient(
        notebook,
        timeout=CELL_S,
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
        extra_arguments=[] if widgets else [WITHOUT_WIDGETS],
        resources={"metadata": {"path": str(place)}},
    ).execute()


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leave out what a second run would give otherwise without anything having changed."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02}"
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags"}


def main() -> None:
    """Run those named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the beginning of a file's name: 01")
    names = tuple(parser.parse_args().names) or ("",)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if path.name.startswith(names):
            print(path.name, flush=True)
            notebook = nbformat.read(path, as_version=4)
            with tempfile.TemporaryDirectory() as directory:
                execute(notebook, Path(directory), widgets=False)
            clean(notebook)
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
