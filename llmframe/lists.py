"""A list of message arrays in one call: answers in order.

The API itself takes one message array a request, and refuses a list of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from llmframe import runner
from llmframe.errors import ConfigurationError, TemplateError
from llmframe.messages import check_messages, kind
from llmframe.options import FRAME_ONLY, Options, call_options, gather, takes_options
from llmframe.prompts import Prompts
from llmframe.results import Completion, typed

COLUMN = "messages"


@takes_options(call_options)
def complete(messages: Iterable[Any], **keywords: Any) -> list[Completion]:
    """Ask a model once for each message array of a list.

    Parameters
    ----------
    messages : list of list of dict
        Message arrays, each as the chat API takes it.
    **keywords
        Those of `LLMFrame.complete`, but ``system``, ``examples``, ``history``, ``images``, ``output``, ``details``,
        ``where`` and ``na``, which are about a frame and its columns.

    Returns
    -------
    list of Completion
        One for each message array, in the order of the list.

    Raises
    ------
    TemplateError
        A message array that is none; nothing was sent.
    ConfigurationError, SchemaError, CheckpointError
        Before any request.
    EndpointError, BudgetExceeded, RowFailed, Interrupted
        While it runs; ``.completions`` holds the answers so far.

    Examples
    --------
    >>> questions = [[{"role": "user", "content": "Is water wet?"}], [{"role": "user", "content": "Is fire cold?"}]]
    >>> [one.status for one in llmframe.complete(questions, schema=["yes", "no"], model="local")]
    ['ok', 'ok']
    """
    return runner.complete(*_call(messages, keywords), listed=True).completions()


@takes_options(call_options)
async def acomplete(messages: Iterable[Any], **keywords: Any) -> list[Completion]:
    """Do as `complete` does, for a caller that has an event loop.

    Examples
    --------
    >>> async def ask():
    ...     return await llmframe.acomplete([[{"role": "user", "content": "Hello"}]], model="local", max_tokens=8)
    >>> len(asyncio.run(ask()))
    1
    """
    state = await runner.acomplete(*_call(messages, keywords), listed=True)
    return state.completions()


def _call(messages: Iterable[Any], keywords: Mapping[str, Any]) -> tuple[Prompts, Options]:
    for name in FRAME_ONLY:
        if name in keywords:
            raise ConfigurationError(f"{name}= is about a frame's columns; a list of message arrays has none")
    options = gather(keywords)
    arrays = _check(messages)
    frame = pd.DataFrame({COLUMN: typed(arrays, object)})
    return Prompts(frame, COLUMN), options


def _check(messages: Any) -> list[Any]:
    if isinstance(messages, pd.DataFrame):
        raise TemplateError("messages is a DataFrame; write df.llm.complete(column), with the column of message arrays")
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise TemplateError(f"messages is {kind(messages)}; it has to be a list of message arrays")
    arrays = list(messages)
    if arrays and all(isinstance(one, Mapping) for one in arrays):
        raise TemplateError(
            "messages is one message array, and llmframe.complete takes a list of them; "
            "for one conversation write llmframe.complete([messages])"
        )
    for number, one in enumerate(arrays):
        name = f"messages[{number}]"
        if isinstance(one, str):
            raise TemplateError(f"{name} is a string ({one!r:.40}); write [{{'role': 'user', 'content': {one!r:.40}}}]")
        if isinstance(one, Mapping):
            raise TemplateError(f"{name} is a message, not a message array; put it in a list of its own")
        if not isinstance(one, list | tuple | np.ndarray):
            raise TemplateError(f"{name} is {kind(one)}, not a message array")
        arrays[number] = check_messages(one, name)
    return arrays
