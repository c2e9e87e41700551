"""Replies: what either API's JSON says, in one form, before any schema reads it.

Pure. A server may leave out or misspell anything: what cannot be read is None, never an exception from inside.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from llmframe.messages import well_formed
from llmframe.results import Usage

Finish = Literal["length", "content_filter"]

_OPEN = "<think>"
_CLOSED = re.compile(r"\s*</think>\s*")
_BARE = re.compile(r"\n\s*</think>\s*\n")  # where the prompt's own template has opened the tag (DeepSeek's, Qwen's)

_EARLY: dict[str, Finish] = {
    "length": "length",
    "max_tokens": "length",
    "MAX_TOKENS": "length",  # Gemini's own, through some gateways
    "model_length": "length",  # Mistral, at the end of the context
    "SAFETY": "content_filter",
}
# How OpenRouter, vLLM and DeepSeek name an answer that broke off for no reason of its own.
_BROKEN = frozenset({"error", "abort", "insufficient_system_resource"})

_CALLS = ("function_call", "custom_tool_call")  # of tools, in the Responses API


@dataclass(frozen=True, slots=True)
class Said:
    """One answer of a reply.

    Attributes
    ----------
    text : str or None
        What is meant for the reader, without the thinking before it.
    finish : str or None
        Why it ended, as the endpoint named it.
    cut : {"length", "content_filter"} or None
        Why it ended too early, under the chat API's names.
    refusal : str or None
        Why the model would not answer, in its words.
    calls : list
        The calls of tools that it asks for, in the chat API's form.
    reasoning : str or None
        What it thought before it answered, or a summary of it.
    """

    text: str | None
    finish: str | None = None
    cut: Finish | None = None
    refusal: str | None = None
    calls: tuple[Any, ...] = ()
    reasoning: str | None = None


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
    """Read what a reply says it cost, under either API's names; None where it does not say."""
    usage = item(payload, "usage")
    if not isinstance(usage, dict):
        return None
    before, after = ("prompt", "completion") if usage.get("input_tokens") is None else ("input", "output")
    prompt, completion = count(usage.get(f"{before}_tokens")), count(usage.get(f"{after}_tokens"))
    if prompt is None and completion is None:
        return None
    total = count(usage.get("total_tokens"))
    if prompt is not None and total is not None:  # Gemini's thoughts and xAI's are billed, and are in the total alone
        completion = max(completion or 0, total - prompt)
    cached = count(item(usage, f"{before}_tokens_details", "cached_tokens")) or 0
    return Usage(
        prompt or 0,
        completion or 0,
        min(cached, prompt or 0),  # a part of the prompt; more of it would make a price negative
        count(item(usage, f"{after}_tokens_details", "reasoning_tokens")) or 0,
    )


def read_choices(payload: Any) -> list[Said] | None:
    """Read a chat completion; None where it holds no choice at all, and so is none."""
    choices = item(payload, "choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        return None
    return [_read_choice(choice) for choice in choices]


def broken_off(payload: Any) -> Any:
    """Give the error of a chat completion that broke off on the server's side; None where none did.

    Examples
    --------
    >>> broken_off({"choices": [{"finish_reason": "error", "error": {"code": 502, "message": "Gone"}}]})
    {'code': 502, 'message': 'Gone'}
    >>> broken_off({"choices": [{"finish_reason": "abort"}]})
    {'message': 'the answer broke off (finish_reason abort)'}
    """
    for choice in _list(payload.get("choices") if isinstance(payload, dict) else None):
        if error := error_of(choice):
            return error
        finish = choice.get("finish_reason") if isinstance(choice, dict) else None
        if isinstance(finish, str) and finish in _BROKEN:
            return {"message": f"the answer broke off (finish_reason {finish})"}
    return None


def error_of(value: Any) -> Any:
    """Give the ``error`` that a reply or a choice holds; None where it has none, or one that says nothing."""
    if isinstance(value, list):  # Gemini's
        value = value[0] if value else None
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict):
        return error if any(error.values()) else None  # an answer may come with a code 0 and no message
    return error or None


def _read_choice(choice: dict[str, Any]) -> Said:
    message = choice.get("message")
    if not isinstance(message, dict):
        message = {}
    content = message.get("content")
    if isinstance(content, list):  # content parts, which some servers answer with
        content = _joined(item(part, "text") for part in content)
    text = content if isinstance(content, str) else None
    # DeepSeek, vLLM and llama.cpp say `reasoning_content`; OpenRouter, Ollama and newer vLLM `reasoning`.
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    thought = reasoning if isinstance(reasoning, str) else None
    if text is not None and "think>" in text:
        text, own = without_thinking(text)
        thought = thought or own
    said, refusal, calls = choice.get("finish_reason"), message.get("refusal"), message.get("tool_calls")
    finish = said if isinstance(said, str) else None
    return Said(
        text=text,
        finish=finish,
        cut=None if finish is None else _early(finish),
        refusal=refusal if isinstance(refusal, str) and refusal else None,
        calls=tuple(call for call in _list(calls) if isinstance(call, dict)),
        reasoning=thought,
    )


def _early(finish: str) -> Finish | None:
    if finish.startswith("content_filter"):  # Gemini says which: "content_filter: SAFETY"
        return "content_filter"
    return _EARLY.get(finish)


def read_output(payload: Any) -> list[Said] | None:
    """Read a reply of the Responses API; None where it is none, or has not ended."""
    output, status = item(payload, "output"), item(payload, "status")
    if not isinstance(output, list) or status not in ("completed", "incomplete", None):
        return None
    if not output and status != "incomplete":
        return None
    parts = [part for one in output if item(one, "type") == "message" for part in _list(item(one, "content"))]
    thoughts = [one for one in output if item(one, "type") == "reasoning"]
    summaries = [part for one in thoughts for part in _list(item(one, "summary")) + _list(item(one, "content"))]
    reason = item(payload, "incomplete_details", "reason")
    cut = None
    if status == "incomplete":
        cut = (_early(reason) if isinstance(reason, str) else None) or "length"
    text = _joined(item(part, "text") for part in parts if item(part, "type") != "refusal")
    own = None
    if text is not None and "think>" in text:
        text, own = without_thinking(text)
    finish = reason if isinstance(reason, str) else status
    return [
        Said(
            text=text,
            finish=finish,
            cut=cut,
            refusal=_joined(item(part, "refusal") for part in parts) or None,
            calls=tuple(_as_tool_call(one) for one in output if item(one, "type") in _CALLS),
            reasoning=_joined((item(part, "text") for part in summaries), "\n\n") or own,
        )
    ]


def _as_tool_call(call: dict[str, Any]) -> dict[str, Any]:
    if call["type"] == "custom_tool_call":
        custom = {"name": call.get("name"), "input": call.get("input")}
        return {"id": call.get("call_id"), "type": "custom", "custom": custom}
    function = {"name": call.get("name"), "arguments": call.get("arguments")}
    return {"id": call.get("call_id"), "type": "function", "function": function}


def without_thinking(text: str) -> tuple[str | None, str | None]:
    r"""Part a text into the answer and the thinking before it, where a model writes both.

    Examples
    --------
    >>> without_thinking("<think>\nTwo and two.\n</think>\n\nFour.")
    ('Four.', 'Two and two.')
    >>> without_thinking("HTML has no <think> tag.")
    ('HTML has no <think> tag.', None)
    """
    start = text.lstrip()
    if start.startswith(_OPEN):
        thought, *rest = _CLOSED.split(start.removeprefix(_OPEN), maxsplit=1)
        return (rest[0] if rest else None), (thought.strip() or None)
    bare = _BARE.search(text)
    if bare is not None and _OPEN not in text:
        return text[bare.end() :].lstrip(), (text[: bare.start()].strip() or None)
    return text, None


def item(value: Any, *names: str) -> Any:
    """Give what is under these names, one in the other; None where there is nothing."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def count(value: Any) -> int | None:
    """Read a number of tokens, also from a server that writes numbers as text."""
    if isinstance(value, bool):
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < 2**53 else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _joined(texts: Any, between: str = "") -> str | None:
    found = [text for text in texts if isinstance(text, str)]
    return between.join(found) if found else None


def as_text(calls: tuple[Any, ...]) -> str | None:
    """Give tool calls as JSON text; None where there are none."""
    if not calls:
        return None
    try:
        return orjson.dumps(calls).decode()
    except (TypeError, orjson.JSONEncodeError):  # lone surrogates, numbers beyond 64 bits
        return well_formed(json.dumps(calls, ensure_ascii=False))
