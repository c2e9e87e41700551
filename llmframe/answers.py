"""What an answer is worth: its text, its status, what the schema reads in it, and what it cost.

Pure: what either API said comes in one form from `replies`.
"""

from __future__ import annotations

from typing import Any

from llmframe.messages import well_formed
from llmframe.prices import PriceOf
from llmframe.repair import QUOTED, json_text
from llmframe.replies import Said, as_text, item, read_choices, read_output, read_usage
from llmframe.requests import Api
from llmframe.results import STATUSES, Completion, Status
from llmframe.schemas import Labels, Schema, Unfit

NO_ANSWER = "the reply holds no answer"


def read_reply(
    payload: Any,
    *,
    api: Api = "chat",
    schema: Schema | None,
    price: PriceOf | None,
    several: bool,
    latency_s: float | None,
    attempts: int,
    request_id: str | None,
) -> Completion | None:
    """Read a reply.

    Parameters
    ----------
    payload : object
        The reply's JSON.
    api : {"chat", "responses"}
        Whose reply it is.
    schema : Schema, optional
        What the answer has to fit.
    price : callable, optional
        Gives what the usage costs.
    several : bool
        Whether ``n=`` asked for a list of answers, however many came.
    latency_s : float or None
        What the attempt took; None where nobody knows.
    attempts : int
        Requests sent for the row.
    request_id : str, optional
        As the endpoint named it.

    Returns
    -------
    Completion or None
        None where the reply holds no answer at all; one that is ``failed`` where it says that it cost something.
    """
    answers = read_output(payload) if api == "responses" else read_choices(payload)
    usage = read_usage(payload)
    read: list[tuple[Any, Any, Status, str | None]]
    if answers is not None:
        read = [_read(said, schema) for said in answers]
    elif usage is not None and (usage.prompt_tokens or usage.completion_tokens):
        answers, read, several = [Said(None)], [(None, None, "failed", NO_ANSWER)], False
    else:
        return None
    text: Any
    text, parsed, status, error = read[0]
    first = answers[0]
    calls, reasoning = first.calls, first.reasoning
    if several:
        text, parsed = [one[0] for one in read], [one[1] for one in read]
        status = max((one[2] for one in read), key=STATUSES.index)
        error = next(one[3] for one in read if one[2] == status)
        calls = tuple(call for said in answers for call in said.calls)
        reasoning = "\n\n".join(said.reasoning for said in answers if said.reasoning) or None
    model = item(payload, "model")
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
        finish_reason=None if first.finish is None else well_formed(first.finish),
        model=well_formed(model) if isinstance(model, str) else None,
        source="request",
        request_id=None if request_id is None else well_formed(request_id),
        tool_calls=as_text(calls),
        reasoning=None if reasoning is None else well_formed(reasoning),
    )


def _read(said: Said, schema: Schema | None) -> tuple[str | None, Any, Status, str | None]:
    """Give an answer's text, what the schema reads in it, its status and its error."""
    if said.cut == "content_filter":
        return None, None, "filtered", "the endpoint's content filter withheld the answer"
    if said.refusal is not None:
        return None, None, "refused", well_formed(f"the model refused: {said.refusal:.{QUOTED}}")
    if said.text is None:
        if said.cut == "length":  # all of it spent on thinking
            return None, None, "truncated", "the token limit was reached before any text (finish_reason length)"
        if said.calls and schema is None:  # what `tools=` asks for
            return None, None, "ok", None
        what = f"{len(said.calls)} tool call(s) and no text" if said.calls else "no text"
        return None, None, "invalid", f"the answer holds {what}"
    content = well_formed(said.text)
    if isinstance(schema, Labels):
        if said.cut == "length":
            return None, None, "truncated", f"the answer was cut at the token limit: {content!r:.{QUOTED}}"
        try:
            label = schema.read(content)
        except Unfit as error:
            return None, None, "invalid", str(error)
        return str(label), label, "ok", None
    if said.cut == "length":
        return content, None, "truncated", "the answer was cut at the token limit (finish_reason length)"
    if schema is None:
        return content, None, "ok", None
    try:
        return json_text(content), schema.read(content), "ok", None
    except Unfit as error:
        return content, None, "invalid", str(error)
