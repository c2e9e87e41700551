"""A language model over the rows of a DataFrame: frame -> prompts -> requests -> engine -> results -> frame.

``import llmframe`` gives every DataFrame the accessor ``df.llm``, a Dask DataFrame too.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from llmframe.accessor import LLMFrame, LLMSeries
from llmframe.arrivals import await_dask
from llmframe.checkpoint_frame import read_checkpoint
from llmframe.errors import (
    BudgetExceeded,
    CheckpointError,
    ConfigurationError,
    EndpointError,
    Interrupted,
    LLMFrameError,
    LLMFrameWarning,
    RowFailed,
    SchemaError,
    TemplateError,
)
from llmframe.estimate import Estimate
from llmframe.lists import acomplete, complete
from llmframe.options import configure
from llmframe.report import Run
from llmframe.results import Completion, Usage
from llmframe.runner import last_run
from llmframe.vectors import similarity

if TYPE_CHECKING:
    from llmframe import local
    from llmframe.batch import BatchJob
    from llmframe.jobs import JobResult, run
    from llmframe.review import Review

__all__ = [
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

# What most calls do without is imported when it is named: together a third of the time that the rest takes.
_LATER = {
    "BatchJob": "llmframe.batch",
    "JobResult": "llmframe.jobs",
    "Review": "llmframe.review",
    "local": "llmframe.local",
    "run": "llmframe.jobs",
}

if not TYPE_CHECKING:  # a checker would take it that any name is there

    def __getattr__(name: str) -> object:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(_LATER[name])
        globals()[name] = found = module if name == "local" else getattr(module, name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER})


await_dask()
