"""What a reply says: the answer's text and status, and what it cost.

Pure. A server may leave out or misspell anything: what cannot be read is None, never an exception from inside.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from llmframe.messages import well_formed
from llmframe.prices import PriceOf
from llmframe.results import STATUSES, Completion, Status, Usage
from llmframe.schemas import Labels, Schema, Unfit

QUOTED = 200  # characters of an answer in an error


def read_json(body: bytes) -> Any:
    """Read a body as JSON; None where it is none.

    The strict reader first, for its speed; the lenient one takes NaN, lone surrogates and bytes that are no UTF-8.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(body.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return None


def read_usage(payload: Any) -> Usage | None:
    """Read what a reply says it cost; None where it does not say."""
    usage = _item(payload, "usage")
    prompt, completion = _count(_item(usage, "prompt_tokens")), _count(_item(usage, "completion_tokens"))
    if prompt is None and completion is None:
        return None
    cached = _count(_item(usage, "prompt_tokens_details", "cached_tokens")) or 0
    return Usage(
        prompt or 0,
        completion or 0,
        min(cached, prompt or 0),  # a part of the prompt; more of it would make a price negative
        _count(_item(usage, "completion_tokens_details", "reasoning_tokens")) or 0,
    )


def read_chat(
    payload: Any,
    *,
    schema: Schema | None,
    price: PriceOf | None,
    several: bool,
    latency_s: float,
    attempts: int,
    request_id: str | None,
) -> Completion | None:
    """Read a chat completion.

    Parameters
    ----------
    payload : object
        The reply's JSON.
    schema : Schema, optional
        What the answer has to fit.
    price : callable, optional
        Gives what the usage costs.
    several : bool
        Whether ``n=`` asked for a list of answers, however many came.
    latency_s : float
        What the attempt took.
    attempts : int
        Requests sent for the row.
    request_id : str, optional
        As the endpoint named it.

    Returns
    -------
    Completion or None
        None where the reply holds no choice at all, and so is no chat completion.
    """
    choices = _item(payload, "choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        return None
    usage = read_usage(payload)
    read = [_read_choice(choice, schema) for choice in choices]
    text: Any
    text, parsed, status, error = read[0]
    if several:
        text, parsed = [one[0] for one in read], [one[1] for one in read]
        status = max((one[2] for one in read), key=STATUSES.index)
        error = next(one[3] for one in read if one[2] == status)
    finish = choices[0].get("finish_reason")
    model = _item(payload, "model")
    return Completion(
        text=text,
        status=status,
        error=error,
        prompt_tokens=usage.prompt_tokens if usage else None,
        completion_tokens=usage.completion_tokens if usage else None,
        parsed=parsed,
        cached_tokens=usage.cached_tokens if usage else None,
        reasoning_tokens=usage.reasoning_tokens if usage else None,
        cost_usd=price(usage) if price and usage else None,
        latency_s=latency_s,
        attempts=attempts,
        finish_reason=well_formed(finish) if isinstance(finish, str) else None,
        model=well_formed(model) if isinstance(model, str) else None,
        source="request",
        request_id=None if request_id is None else well_formed(request_id),
    )


def _read_choice(choice: dict[str, Any], schema: Schema | None) -> tuple[str | None, Any, Status, str | None]:
    """Give a choice's text, what the schema reads in it, its status and its error."""
    content = _item(choice, "message", "content")
    if isinstance(content, list):  # content parts, which some servers answer with
        texts = [text for part in content if isinstance(text := _item(part, "text"), str)]
        content = "".join(texts) if texts else None
    finish = choice.get("finish_reason")
    refusal = _item(choice, "message", "refusal")
    if finish == "content_filter":
        return None, None, "filtered", "the endpoint's content filter withheld the answer"
    if isinstance(refusal, str) and refusal:
        return None, None, "refused", well_formed(f"the model refused: {refusal:.{QUOTED}}")
    if not isinstance(content, str):
        if finish == "length":  # all of it spent on thinking
            return None, None, "truncated", "the token limit was reached before any text (finish_reason length)"
        calls = _item(choice, "message", "tool_calls")
        said = f"{len(calls)} tool call(s) and no text" if isinstance(calls, list) and calls else "no text"
        return None, None, "invalid", f"the answer holds {said}"
    content = well_formed(content)
    if isinstance(schema, Labels):
        if finish == "length":
            return None, None, "truncated", f"the answer was cut at the token limit: {content!r:.{QUOTED}}"
        try:
            label = schema.read(content)
        except Unfit as error:
            return None, None, "invalid", str(error)
        return str(label), label, "ok", None
    if finish == "length":
        return content, None, "truncated", "the answer was cut at the token limit (finish_reason length)"
    if schema is None:
        return content, None, "ok", None
    try:
        return content, schema.read(content), "ok", None
    except Unfit as error:
        return content, None, "invalid", str(error)


def _item(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _count(value: Any) -> int | None:
    """Read a number of tokens, also from a server that writes numbers as text."""
    if isinstance(value, bool):
        return None
    try:
        count = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return count if 0 <= count < 2**53 else None
