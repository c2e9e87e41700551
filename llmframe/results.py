"""What comes back for a row: its completion, its usage, its status; and results as typed columns.

A column's type never depends on the data: an empty frame, a frame of failures and a full one are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

Status = Literal["ok", "truncated", "filtered", "refused", "invalid", "failed", "skipped", "pending"]
Source = Literal["request", "checkpoint", "duplicate"]

INT64 = range(-(1 << 63), 1 << 63)  # what a column of whole numbers can hold
SOURCES: tuple[Source, ...] = ("request", "checkpoint", "duplicate")

STATUSES: tuple[Status, ...] = (
    "ok",
    "truncated",
    "filtered",
    "refused",
    "invalid",
    "failed",
    "skipped",
    "pending",
)
"""Every status, from the best to the one furthest from an answer."""

PANDAS_3 = int(pd.__version__.split(".")[0]) >= 3

PAID: frozenset[Status] = frozenset({"ok", "truncated", "filtered", "refused", "invalid"})
"""The statuses of an answer that was paid for: a checkpoint gives it back and never asks again."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that one or more requests cost, as the endpoint counted them.

    Examples
    --------
    >>> llmframe.Usage(prompt_tokens=10, completion_tokens=2) + llmframe.Usage(prompt_tokens=5)
    Usage(prompt_tokens=15, completion_tokens=2, cached_tokens=0, reasoning_tokens=0)
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )

    @classmethod
    def of(cls, paid: Completion) -> Usage:
        """Give the tokens of one answer; what the endpoint did not count is 0."""
        return cls(
            paid.prompt_tokens or 0, paid.completion_tokens or 0, paid.cached_tokens or 0, paid.reasoning_tokens or 0
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """One row's answer, or why there is none.

    Attributes
    ----------
    text : str, list of str or None
        The answer as the model wrote it (a list under ``n=``); None where there is none.
    status : str
        One of `STATUSES`.
    error : str or None
        What was wrong; None exactly where the status is ``ok``.
    prompt_tokens, completion_tokens : int or None
        As the endpoint counted them; None where it did not say.
    parsed : object
        The answer read by the schema: a label, a pydantic model's instance, or a dict; None without a schema.
    cached_tokens, reasoning_tokens : int or None
        The parts of the two above that were read from a cache and spent on thinking.
    cost_usd : float or None
        None where the model has no known price.
    latency_s : float or None
        Seconds of the attempt that answered, waiting in this process left out.
    attempts : int
        Requests sent for this row.
    finish_reason, model, request_id : str or None
        As the endpoint named them.
    source : {"request", "checkpoint", "duplicate"} or None
        Where the answer came from; None where there is none.
    tool_calls : str or None
        The calls of tools that the model asks for, as JSON in the chat API's form.
    reasoning : str or None
        What a thinking model thought, where the endpoint tells it; never a part of `text`.

    Examples
    --------
    >>> question = [{"role": "user", "content": "Is water wet?"}]
    >>> (answer,) = llmframe.complete([question], schema=["yes", "no"], model="local")
    >>> answer.status, answer.text == answer.parsed, answer.source
    ('ok', True, 'request')
    """

    text: str | list[str] | None = None
    status: Status = "pending"
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    parsed: Any = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost_usd: float | None = None
    latency_s: float | None = None
    attempts: int = 0
    finish_reason: str | None = None
    model: str | None = None
    source: Source | None = None
    request_id: str | None = None
    tool_calls: str | None = None
    reasoning: str | None = None


SUFFIXES = ("_status", "_error", "_prompt_tokens", "_completion_tokens")
DETAILS = (
    "_cached_tokens",
    "_reasoning_tokens",
    "_cost_usd",
    "_latency_s",
    "_attempts",
    "_finish_reason",
    "_model",
    "_source",
    "_request_id",
    "_tool_calls",
    "_reasoning",
)
EMBEDDING_SUFFIXES = ("_status", "_error", "_prompt_tokens")
EMBEDDING_DETAILS = ("_cost_usd", "_latency_s", "_attempts", "_model", "_source", "_request_id")


def suffixes(details: bool, embedding: bool = False) -> tuple[str, ...]:
    """Give what follows the output's name in the columns beside the answer's own, in order."""
    if embedding:
        return (*EMBEDDING_SUFFIXES, *(EMBEDDING_DETAILS if details else ()))
    return (*SUFFIXES, *(DETAILS if details else ()))


def column_names(output: str, details: bool, embedding: bool = False) -> tuple[str, ...]:
    """Give the names of the columns a call writes, those of a schema's properties aside, in order."""
    return (output, *(output + suffix for suffix in suffixes(details, embedding)))


def property_column(output: str, name: str) -> str:
    """Give the name of a property's column.

    Examples
    --------
    >>> property_column("response", "stars"), property_column("response", "status")
    ('response_stars', 'response_status_')
    """
    return f"{output}_{name}" + ("_" if f"_{name}" in (*SUFFIXES, *DETAILS) else "")


def text_dtype() -> Any:
    """Give pandas' own string type: `str` on pandas 3, ``string[pyarrow]`` before it."""
    return pd.Series([""]).dtype if PANDAS_3 else pd.StringDtype("pyarrow")


def column_dtype(suffix: str, answer_dtype: Any) -> Any:
    """Give a column's type by what follows the output's name; it never depends on the data."""
    if suffix == "":
        return answer_dtype
    if suffix == "_status":
        return pd.CategoricalDtype(list(STATUSES))
    if suffix == "_source":
        return pd.CategoricalDtype(list(SOURCES))
    if suffix in ("_cost_usd", "_latency_s"):
        return pd.Float64Dtype()
    if suffix.endswith("_tokens") or suffix == "_attempts":
        return pd.Int64Dtype()
    return text_dtype()


def twin(completion: Completion) -> Completion:
    """Give the same answer for a row that sends the same request again: it costs nothing more."""
    if completion.source is None:
        return replace(completion, attempts=0)
    return replace(
        completion,
        prompt_tokens=0,
        completion_tokens=0,
        cached_tokens=0,
        reasoning_tokens=0,
        cost_usd=None if completion.cost_usd is None else 0.0,
        attempts=0,
        source="duplicate",
    )


def after(unfit: Completion, completion: Completion) -> Completion:
    """Give an answer with what an earlier one cost that was asked again."""
    costs: dict[str, Any] = {
        name: None if one is None and other is None else (one or 0) + (other or 0)
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost_usd")
        for one, other in [(getattr(unfit, name), getattr(completion, name))]
    }
    return replace(completion, **costs)


def typed(values: Sequence[Any] | npt.NDArray[np.object_], dtype: Any) -> Any:
    """Make one column's values an array of its type."""
    if dtype is object:
        if isinstance(values, np.ndarray):
            return values
        cells = np.empty(len(values), dtype=object)
        for place, value in enumerate(values):  # as one assignment numpy would make lists of a length a matrix
            cells[place] = value
        return cells
    if isinstance(dtype, pd.CategoricalDtype):
        return pd.Categorical(values, dtype=dtype)
    return pd.array(values, dtype=dtype)
