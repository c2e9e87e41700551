"""The package as a whole: what is public, which way its imports point, what its pages say."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import llmframe

ROOT = Path(__file__).parent.parent
PACKAGE = Path(llmframe.__file__).parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a module imports when it is imported, those for types alone left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in tree.body:
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "llmframe":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmframe."):
            found.add((node.module or "").split(".")[1])
    return found - {"__init__"}


def test_what_is_public_is_pinned() -> None:
    assert sorted(llmframe.__all__) == [
        "BatchJob",
        "BudgetExceeded",
        "CheckpointError",
        "Completion",
        "ConfigurationError",
        "EndpointError",
        "Estimate",
        "Interrupted",
        "JobResult",
        "LLMFrame",
        "LLMFrameError",
        "LLMFrameWarning",
        "LLMSeries",
        "Review",
        "RowFailed",
        "Run",
        "SchemaError",
        "TemplateError",
        "Usage",
        "acomplete",
        "complete",
        "configure",
        "last_run",
        "local",
        "read_checkpoint",
        "run",
        "similarity",
    ]


def test_imports_point_one_way() -> None:
    arrows = {path.stem: imports_of(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    done: set[str] = set()
    while left := arrows.keys() - done:
        free = {module for module in left if arrows[module] <= done}
        assert free, f"a circle among {sorted(left)}"
        done |= free


def test_every_module_says_what_it_is_for_in_its_first_line() -> None:
    for path in PACKAGE.glob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, path.name
        assert docstring.splitlines()[0].endswith((".", ":")) or len(docstring.splitlines()) > 1, path.name


def test_every_module_has_its_place_in_the_map_of_the_house() -> None:
    if not (ROOT / "CONTRIBUTING.md").exists():
        pytest.skip("the suite runs away from its clone")
    named = set(re.findall(r"\b\w+\.py\b", (ROOT / "CONTRIBUTING.md").read_text().split("## The house")[1]))
    assert {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"} <= named


def public() -> dict[str, Any]:
    """What a user names: the public functions and classes, and the verbs of the accessors."""
    named = {name: getattr(llmframe, name) for name in llmframe.__all__ if name != "local"}
    for name in ("LLMFrame", "LLMSeries"):
        verbs = vars(named[name]).items()
        named |= {f"{name}.{verb}": method for verb, method in verbs if not verb.startswith("_")}
    return named


def has_its_example_elsewhere(what: object) -> bool:
    """Exceptions are caught as their root is; a job's result is what `run` gives."""
    leaf = isinstance(what, type) and issubclass(what, BaseException) and what is not llmframe.LLMFrameError
    return leaf or what is llmframe.JobResult


@pytest.mark.parametrize("name", [name for name, what in public().items() if not has_its_example_elsewhere(what)])
def test_what_is_public_shows_an_example_that_runs(name: str) -> None:
    assert ">>> " in (inspect.getdoc(public()[name]) or "")


def test_the_reference_of_complete_fits_two_screens() -> None:
    assert len((inspect.getdoc(llmframe.LLMFrame.complete) or "").splitlines()) <= 2 * 50


def test_every_public_name_is_shown_before_it_is_used_and_there_when_it_is() -> None:
    code = "import llmframe; assert set(llmframe.__all__) <= set(dir(llmframe)); from llmframe import *; BatchJob, run"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_it_does_not_import_what_most_calls_do_without() -> None:
    later = ["llmframe.batch", "llmframe.jobs", "llmframe.job_work", "llmframe.local", "llmframe.review", "dask"]
    code = f"import llmframe, sys; assert not set({later}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_none_is_refused_as_that_of_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'llmframe' has no attribute 'runn'"):
        llmframe.runn  # type: ignore[attr-defined]  # noqa: B018


def test_importing_it_says_nothing_and_patches_no_loop() -> None:
    code = "import asyncio, llmframe, sys; assert 'nest_asyncio' not in sys.modules; print(asyncio.run.__module__)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("asyncio.runners\n", "")


def test_every_frame_and_series_has_the_accessor() -> None:
    assert isinstance(pd.DataFrame().llm, llmframe.LLMFrame)
    assert isinstance(pd.Series(["a"]).llm, llmframe.LLMSeries)


def test_the_package_is_typed_and_says_its_licence() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert metadata("llmframe-pandas")["License-Expression"] == "MIT"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = "python -m pip install -c constraints.txt -e '.[dev]' && python -m pytest"
    assert command in README
    as_ci_says_it = command.replace("pip install", "pip install -q --no-compile")
    assert as_ci_says_it in (ROOT / ".ci" / "run").read_text()


def test_the_readme_starts_with_the_main_job() -> None:
    commands = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    assert commands[0] == "python -m pip install '.[local]' && llmframe demo\n"


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_the_readmes_links_lead_somewhere(link: str) -> None:
    if not (ROOT / "LICENSE").exists():
        pytest.skip("the suite runs away from its clone")
    assert (ROOT / link).exists()


@pytest.fixture
def readmes_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names in an empty directory after the first call of the README, with nothing configured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmframe.options._configured", {})
    names: dict[str, Any] = {}
    exec(PYTHON[0], names)
    return names


def test_the_first_call_of_the_readme_gives_what_it_shows(readmes_names: dict[str, Any]) -> None:
    """The labels aside, which differ with the processor."""
    out = readmes_names["out"]
    head, _, *rows = re.findall(r"^\|.*\|$", README.split(PYTHON[0])[1].split("\n\n![")[0], flags=re.MULTILINE)
    shown = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    assert out.columns.tolist() == shown[0]
    for name in ("review", "sentiment_status", "sentiment_error", "sentiment_prompt_tokens"):
        cells = ["" if pd.isna(cell) else str(cell) for cell in out[name]]
        assert cells == [row[shown[0].index(name)] for row in shown[1:]], name


@pytest.mark.parametrize("number", range(1, len(PYTHON)))
def test_the_python_of_the_readme_runs(readmes_names: dict[str, Any], number: int) -> None:
    exec(PYTHON[number], readmes_names)


def test_every_kind_of_prompt_has_a_type_that_mypy_takes(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    (tmp_path / "script.py").write_text(
        "import pandas as pd\nimport llmframe\n\nrows = llmframe.LLMFrame(pd.DataFrame({'text': ['a']}))\n"
        "rows.complete('text', model='m')\nrows.complete(0, model='m')\n"
        "rows.complete(lambda row: f'{row.text}', model='m')\n"
        "rows.complete([{'role': 'user', 'content': '{text}'}], model='m')\n"
        "prompt = [{'role': 'user', 'content': '{text}'}]\nrows.complete(prompt, model='m')\n"
    )
    said, _, status = api.run(["--strict", "--config-file=", str(tmp_path / "script.py")])
    assert status == 0, said
