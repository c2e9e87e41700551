"""Message arrays: check one that a user wrote, a function returned or parquet gave back.

What comes out is plain lists and dicts of JSON's types, and text that every JSON and Arrow reader takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmframe.errors import LLMFrameError, TemplateError

Message = dict[str, Any]
Messages = list[Message]

NARROW = (np.dtype("float16"), np.dtype("float32"))  # widened as it is, 0.1 would be 0.10000000149011612


def check_messages(value: Any, name: str) -> Messages:
    """Check one message array and copy it as plain lists and dicts.

    Parameters
    ----------
    value : sequence of mappings
        As the chat API takes it, or as parquet gives it back (numpy arrays, absent fields as None).
    name : str
        What the errors call it.

    Raises
    ------
    TemplateError
        Not a list of messages, a message without a role, or without content.

    Examples
    --------
    >>> check_messages(({"role": "user", "content": "Hello", "name": None},), "prompt")
    [{'role': 'user', 'content': 'Hello'}]
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence | np.ndarray):
        raise TemplateError(f"{name} is {kind(value)}, not a message array; write [{{'role': 'user', 'content': ...}}]")
    if len(value) == 0:
        raise TemplateError(f"{name} is an empty message array; it needs at least one message")
    try:
        return [_check_message(message, f"{name}[{number}]") for number, message in enumerate(value)]
    except RecursionError:
        raise TemplateError(f"{name} holds itself, or is nested too deep to be sent") from None


def user(text: str) -> Messages:
    """Give the message array of one user turn."""
    return [{"role": "user", "content": well_formed(text)}]


def well_formed(text: str) -> str:
    """Return the text with each lone surrogate as U+FFFD: JSON, Arrow and pandas' `str` all refuse them."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def plain_json(value: Any, name: str, refused: type[LLMFrameError]) -> Any:
    """Copy a value as JSON's own types, numpy's arrays and scalars undone.

    Parameters
    ----------
    value : object
        What is to be sent.
    name : str
        What the error calls it.
    refused : type
        The error to raise for a value that JSON does not have.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, int):
        if -(2**63) <= value < 2**64:
            return int(value)
        raise refused(f"{name}={value} is beyond 64 bits, which no JSON reader keeps; pass it as text")
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        raise refused(f"{name}={value!r} is not a JSON number; pass a finite one")
    if isinstance(value, Mapping):
        return {well_formed(str(key)): plain_json(item, f"{name}[{key!r}]", refused) for key, item in value.items()}
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        item = plain_scalar(value)
        if not isinstance(item, np.generic):  # a long double gives itself
            return plain_json(item, name, refused)
    if isinstance(value, list | tuple | np.ndarray):
        return [plain_json(item, f"{name}[{number}]", refused) for number, item in enumerate(value)]
    raise refused(
        f"{name}={value!r:.60} is of type {type(value).__name__}, which JSON does not have; "
        "the API takes numbers, text, booleans, lists and dicts"
    )


def plain_scalar(value: Any) -> Any:
    """Give what numpy holds as one value as plain Python; a narrow float as it is written.

    Examples
    --------
    >>> import numpy as np
    >>> plain_scalar(np.float32(0.1)), plain_scalar(np.int64(1))
    (0.1, 1)
    """
    return float(np.format_float_scientific(value)) if value.dtype in NARROW else value.item()


def kind(value: Any) -> str:
    """Say what a value is, as an error message puts it."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"a string ({value!r:.40})"
    return f"of type {type(value).__name__}"


def _check_message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise TemplateError(f"{name} is {kind(message)}, not a message; write {{'role': 'user', 'content': ...}}")
    plain: Message = plain_json(_without_absent(message), name, TemplateError)
    if "content" in message:
        plain.setdefault("content", None)
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise TemplateError(f"{name} has no role; give it one of 'system', 'user', 'assistant'")
    content = plain.get("content")
    if content is None:
        if plain.keys() & {"tool_calls", "function_call", "refusal", "audio"}:
            return plain
        state = "is None" if "content" in plain else "is missing"
        raise TemplateError(f"{name}: its content {state}; give it the text of the message")
    if not isinstance(content, str | list):
        raise TemplateError(f"{name}: its content is {kind(content)}; it has to be text or a list of content parts")
    return plain


def _without_absent(value: Any) -> Any:
    """Leave out fields that are None: Arrow's list<struct> gives every field of the struct to every message."""
    if isinstance(value, Mapping):
        return {key: _without_absent(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple | np.ndarray):
        return [_without_absent(item) for item in value]
    return value
