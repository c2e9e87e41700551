"""Planning: which rows a call is about, which request each of them sends, and which columns it writes.

Pure, and done for every row before anything is asked: a row that cannot be rendered, a mask that does not fit or
a column in the way costs nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from llmframe.errors import ConfigurationError, SchemaError
from llmframe.messages import kind
from llmframe.options import Options
from llmframe.prompts import Missing, Prompt, Prompts, Unreadable
from llmframe.requests import Requests, packed
from llmframe.results import column_dtype, column_names, property_column, text_dtype, typed
from llmframe.schemas import Schema


@dataclass(frozen=True, slots=True)
class Plan:
    """Which row sends what.

    Attributes
    ----------
    request_of : array of int
        Each row's request by number; -1 for a row that sends none.
    first : array of int
        Each request's first row.
    keys : array of void
        Each request's key, of 32 bytes.
    skipped : dict of int to str
        Why a row sends none, by position.
    selected : array of bool
        The rows that the call is about.
    unreadable : dict of int to str
        Requests, by number, that cannot be sent, and why: they fail, and cost nothing.
    """

    request_of: npt.NDArray[np.intp]
    first: npt.NDArray[np.intp]
    keys: npt.NDArray[np.void]
    skipped: dict[int, str]
    selected: npt.NDArray[np.bool_]
    unreadable: dict[int, str] = field(default_factory=dict)


def prompts_of(frame: pd.DataFrame, prompt: Prompt, options: Options) -> Prompts:
    """Give what the rows of a frame send, by the keywords of a call.

    Raises
    ------
    ConfigurationError, TemplateError
        The prompt does not fit the frame.
    """
    return Prompts(
        frame,
        prompt,
        system=options.system,
        examples=options.examples,
        history=options.history,
        images=options.images,
        na=options.na,
    )


def select(frame: pd.DataFrame, options: Options) -> npt.NDArray[np.bool_]:
    """Give the rows that a call is about.

    Raises
    ------
    ConfigurationError
        A mask of another length or index, or with values that are no booleans.
    """
    where = options.where
    if where is None:
        return np.ones(len(frame), dtype=bool)
    if isinstance(where, str):
        if where != "missing":
            raise ConfigurationError(f"where={where!r} is not known; it is 'missing' or a boolean mask")
        if options.output not in frame.columns:
            return np.ones(len(frame), dtype=bool)
        return _unanswered(frame, options)
    if isinstance(where, pd.Series) and not where.index.equals(frame.index):
        raise ConfigurationError(
            "the mask in where= has another index than the frame; "
            "make it from this frame, or pass where=mask.to_numpy()"
        )
    mask = _as_series(where)
    if len(mask) != len(frame):
        raise ConfigurationError(f"the mask in where= has {len(mask)} values for {len(frame)} rows")
    if mask.isna().any():
        raise ConfigurationError(
            f"the mask in where= has {int(mask.isna().sum())} nulls; fill them with .fillna(False)"
        )
    if not all(isinstance(value, bool | np.bool_) for value in mask.tolist()):
        raise ConfigurationError(f"where= holds values of type {mask.dtype}; it has to be a boolean mask")
    return mask.to_numpy(dtype=bool)


def _unanswered(frame: pd.DataFrame, options: Options) -> npt.NDArray[np.bool_]:
    """Tell the rows that hold no answer.

    A plain text that is null may be an answer, where its status says so: a call of tools, or an empty text that csv
    made a null of. A label, an object or a vector never is: somebody took it out to have it asked again.
    """
    missing: npt.NDArray[np.bool_] = frame[options.output].isna().to_numpy(dtype=bool)
    status = f"{options.output}_status"
    if options.embeds or options.schema is not None or int((frame.columns == status).sum()) != 1:
        return missing
    return missing & ~frame[status].isin(["ok"]).to_numpy(dtype=bool)


def _as_series(where: Any) -> pd.Series[Any]:
    known = isinstance(where, list | tuple | np.ndarray | pd.Series | pd.Index | pd.api.extensions.ExtensionArray)
    if not known or getattr(where, "ndim", 1) != 1 or getattr(getattr(where, "dtype", None), "names", None):
        raise ConfigurationError(f"where= is {kind(where)}; it has to be 'missing' or a boolean mask, one value a row")
    return pd.Series(where if len(where) else np.zeros(0, dtype=bool)).reset_index(drop=True)


def check_columns(
    frame: pd.DataFrame, options: Options, schema: Schema | None, selected: npt.NDArray[np.bool_]
) -> None:
    """Refuse to overwrite what is there, and to mix what does not fit.

    Raises
    ------
    SchemaError
        Two properties that would have one column.
    ConfigurationError
        An output column exists and no ``where=`` says which rows to fill, or holds values of another kind.
    """
    dtypes = output_dtypes(options, schema)
    names: dict[str, str] = {}
    for name in () if schema is None else schema.columns:
        column = property_column(options.output, name)
        if column in names:
            raise SchemaError(
                f"the properties {names[column]!r} and {name!r} would both be the column {column!r}; rename one"
            )
        names[column] = name
    if options.history in dtypes:
        raise ConfigurationError(f"history={options.history!r} is one of the columns to be written; name another")
    existing = [name for name in dtypes if name in frame.columns]
    if not existing:
        return
    if options.where is None:
        raise ConfigurationError(
            f"the frame has a column {existing[0]!r} already; pass where='missing' to fill what it lacks, "
            "or output= to write under another name"
        )
    for name, dtype in dtypes.items():
        if name not in frame.columns:
            continue
        if int((frame.columns == name).sum()) > 1:
            raise ConfigurationError(f"the frame has more than one column {name!r}; give each its own name")
        if not _can_keep(frame[name][~selected].dropna().tolist(), dtype):
            held = "lists and dicts" if dtype is object else dtype
            raise ConfigurationError(
                f"column {name!r} holds values of type {frame[name].dtype}, which a column of {held} cannot keep; "
                "pass output= to write under another name"
            )
    check_length(options.params.get("dimensions"), frame, options, selected)


def check_length(
    dimensions: int | None, frame: pd.DataFrame, options: Options, selected: npt.NDArray[np.bool_]
) -> None:
    """Refuse vectors of another length than the frame keeps of an earlier call.

    Raises
    ------
    ConfigurationError
        Naming both lengths.
    """
    kept = kept_dimensions(frame, options, selected)
    if None not in (kept, dimensions) and kept != dimensions:
        raise ConfigurationError(other_length(dimensions, kept, options))


def kept_dimensions(frame: pd.DataFrame, options: Options, selected: npt.NDArray[np.bool_]) -> int | None:
    """Give the length of the vectors that rows left out keep; None where none keeps any."""
    if not options.embeds or options.output not in frame.columns:
        return None
    return next((len(vector) for vector in frame[options.output][~selected].dropna()), None)


def other_length(given: Any, kept: Any, options: Options) -> str:
    """Say that vectors do not fit beside those of an earlier call."""
    return (
        f"vectors of {given:,} numbers do not fit beside those of {kept:,} in column {options.output!r}; "
        "pass the model and dimensions= that made them, or output= to write under another name"
    )


def _can_keep(values: list[Any], dtype: Any) -> bool:
    """Whether a column of this type holds these values as they are."""
    try:
        if isinstance(dtype, pd.CategoricalDtype):
            return set(values) <= set(dtype.categories)
        if dtype is object:  # lists, dicts and Decimals; csv makes text of the one and numbers of the other
            return not any(isinstance(value, str | bytes | float | int | np.generic) for value in values)
        return bool(typed(values, dtype).tolist() == values)
    except (TypeError, ValueError):
        return False


def make_plan(prompts: Prompts, requests: Requests, selected: npt.NDArray[np.bool_], *, dedupe: bool) -> Plan:
    """Render every row once: its key, and with it whether it shares a request.

    Raises
    ------
    TemplateError
        A row that cannot be rendered.
    """
    request_of = np.full(len(prompts), -1, dtype=np.intp)
    first = array("q")
    skipped: dict[int, str] = {}
    numbers: dict[bytes, int] = {}
    occurrences: dict[bytes, int] = {}
    # Without dedupe the n-th occurrence is counted over the whole frame, so that a mask changes no key.
    positions = np.flatnonzero(selected) if dedupe else np.arange(len(prompts))
    unreadable: dict[int, str] = {}
    rendered = prompts.render(positions, wanted=selected, for_key=True)
    for position, messages in zip(positions.tolist(), rendered, strict=True):
        if isinstance(messages, Unreadable) and selected[position]:
            key = hashlib.sha256(f"unreadable\n{messages.reason}".encode()).digest()
            number = numbers.get(key)
            if number is None:
                number = numbers[key] = len(first)
                first.append(position)
                unreadable[number] = messages.reason
            request_of[position] = number
            continue
        if isinstance(messages, Missing):
            if selected[position]:
                skipped[position] = messages.reason
            continue
        key = requests.key(messages)
        if not dedupe:
            occurrence = occurrences.get(key, 0)
            occurrences[key] = occurrence + 1
            if not selected[position]:
                continue
            if occurrence:
                key = requests.key(messages, occurrence)
        number = numbers.get(key)
        if number is None:
            number = numbers[key] = len(first)
            first.append(position)
        request_of[position] = number
    return Plan(request_of, np.array(first, dtype=np.intp), packed(numbers), skipped, selected, unreadable)


def output_dtypes(options: Options, schema: Schema | None) -> dict[str, Any]:
    """Give the columns that a call writes and their types, in order."""
    answer: Any = text_dtype() if schema is None else schema.dtype
    if options.several or options.embeds:
        answer = object  # a list of answers, or a vector, in each cell
    first, *others = column_names(options.output, options.details, options.embeds)
    made = {first: answer}
    for name, dtype in () if schema is None else schema.columns.items():
        made[property_column(options.output, name)] = dtype
    return made | {name: column_dtype(name[len(first) :], answer) for name in others}


def rows_of(plan: Plan) -> npt.NDArray[np.intp]:
    """Give how many rows share each request."""
    return np.bincount(plan.request_of[plan.request_of >= 0], minlength=len(plan.first))
