"""The exceptions of llmframe, and the wording of each in one place.

Failures of a row are values in the status column; what is here is a failure of the whole call.

LLMFrameError
 |- ConfigurationError    the call cannot be made as it was written      (before any request)
 |- TemplateError         the prompt does not fit the frame              (before any request)
 |- SchemaError           the schema cannot be asked for                 (before any request)
 |- CheckpointError       the store cannot be read or written            (before, or half way)
 |- EndpointError         the endpoint will not answer any row           (stops the run)
 |- BudgetExceeded        the next request could pass the budget         (stops the run)
 '- RowFailed             a row failed for good under on_error="raise"   (stops the run)
KeyboardInterrupt
 '- Interrupted           Ctrl-C, or a kernel's stop button              (stops the run)

UserWarning
 '- LLMFrameWarning       something a user should know, and can filter by its class
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from llmframe.results import Completion

__all__ = [
    "BudgetExceeded",
    "CheckpointError",
    "ConfigurationError",
    "EndpointError",
    "Interrupted",
    "LLMFrameError",
    "LLMFrameWarning",
    "RowFailed",
    "SchemaError",
    "TemplateError",
]


class LLMFrameError(Exception):
    """Any failure that llmframe raises, `Interrupted` aside.

    Attributes
    ----------
    frame : pandas.DataFrame or None
        The rows done so far, the rest `pending`, where the run had begun.
    completions : list of Completion or None
        The same for a list call (`llmframe.complete`).

    Examples
    --------
    >>> try:
    ...     df.llm.complete("Translate to French: {texd}", model="local")
    ... except llmframe.LLMFrameError as error:
    ...     print(type(error).__name__, error, sep=": ")
    TemplateError: no column 'texd'; did you mean 'text'?
    """

    frame: pd.DataFrame | None = None
    completions: list[Completion] | None = None


class LLMFrameWarning(UserWarning):
    """Something that llmframe noticed and went on from."""


class ConfigurationError(LLMFrameError):
    """The call cannot be made as it was written; nothing was sent."""


class TemplateError(LLMFrameError):
    """The prompt does not fit the frame; nothing was sent."""

    @classmethod
    def unknown_column(cls, name: str, columns: Iterable[Hashable]) -> TemplateError:
        """Build the error for a name that is no column, with the nearest one that is."""
        known = [str(column) for column in columns]
        if known == [""]:  # what `series.llm` makes of its values
            return cls(f"no column {name!r}; the value of a Series is {{}}")
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the columns are {', '.join(map(repr, known)) or 'none'}"
        return cls(f"no column {name!r}; {hint}")


class SchemaError(LLMFrameError):
    """The schema cannot be asked for; nothing was sent."""


class CheckpointError(LLMFrameError):
    """The checkpoint directory cannot be read or written."""


class EndpointError(LLMFrameError):
    """The endpoint will not answer any row: a bad key, no quota, no such model, or it is gone."""


class BudgetExceeded(LLMFrameError):
    """The next request could pass the budget of this call."""


class RowFailed(LLMFrameError):
    """A row failed for good under ``on_error="raise"``.

    Attributes
    ----------
    position : int
        The row's place in the frame, from 0.
    label : object
        The row's index label.

    Examples
    --------
    >>> try:
    ...     df.head(1).llm.complete("{text}", model="local", response_format={"type": "none"}, on_error="raise")
    ... except llmframe.RowFailed as error:
    ...     print(error.position, error.frame["response_status"].tolist()[0])
    0 failed
    """

    def __init__(self, message: str, *, position: int, label: object) -> None:
        super().__init__(message)
        self.position = position
        self.label = label

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is made again from its `args` alone, and a process pool hands it on as a pickle.
        return partial(RowFailed, position=self.position, label=self.label), self.args, self.__dict__


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; what was answered is kept.

    Attributes
    ----------
    frame : pandas.DataFrame or None
        The rows done so far, the rest `pending`.
    completions : list of Completion or None
        The same for a list call (`llmframe.complete`).
    """

    frame: pd.DataFrame | None = None
    completions: list[Completion] | None = None
