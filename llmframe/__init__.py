"""A language model over the rows of a DataFrame: frame -> prompts -> requests -> engine -> results -> frame.

``import llmframe`` gives every DataFrame the accessor ``df.llm``, a Dask DataFrame too.
"""

from llmframe import local
from llmframe.accessor import LLMFrame, LLMSeries
from llmframe.arrivals import await_dask
from llmframe.batch import BatchJob
from llmframe.checkpoint import read_checkpoint
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
from llmframe.jobs import JobResult, run
from llmframe.lists import acomplete, complete
from llmframe.options import configure
from llmframe.report import Run
from llmframe.results import Completion, Usage
from llmframe.review import Review
from llmframe.runner import last_run
from llmframe.vectors import similarity

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

await_dask()
