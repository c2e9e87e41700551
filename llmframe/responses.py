"""The Responses API's side of a request: a row's messages as its input, and a schema as its text format.

Pure. Messages are written once, in the chat API's form, whichever API is asked; `replies` reads what comes back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llmframe.messages import Message, Messages


def as_input(messages: Messages, *, keep: bool = False) -> tuple[str | None, list[Any]]:
    """Give messages as the instructions and the input of a request.

    Parameters
    ----------
    messages : list of dict
        In the chat API's form.
    keep : bool
        Keep a system message in the input, since there are instructions already.

    Examples
    --------
    >>> as_input([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    ('Be brief.', [{'role': 'user', 'content': 'Hello'}])
    """
    first, *rest = messages
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    custom = [call.get("id") for call in calls if isinstance(call.get("custom"), Mapping)]
    if not keep and first["role"] in ("system", "developer") and isinstance(first.get("content"), str) and rest:
        return first["content"], [one for message in rest for one in _items(message, custom)]
    return None, [one for message in messages for one in _items(message, custom)]


def _items(message: Message, custom: Collection[Any]) -> list[Message]:
    """Give a message's items; `custom` are the ids of calls of custom tools, whose outputs have a name of their own."""
    role, content = message["role"], message.get("content")
    if role == "tool":
        called = message.get("tool_call_id")
        kind = "custom_tool_call_output" if called in custom else "function_call_output"
        return [{"type": kind, "call_id": called, "output": content}]
    made: list[Message] = []
    if content is not None:
        parts = [_part(part, role) for part in content] if isinstance(content, list) else content
        made.append({"role": role, "content": parts})
    for call in message.get("tool_calls") or ():
        if isinstance(call.get("custom"), Mapping):
            made.append({"type": "custom_tool_call", "call_id": call.get("id"), **call["custom"]})
            continue
        function = call.get("function") or {}
        made.append({"type": "function_call", "call_id": call.get("id"), **function})
    return made


def _part(part: Any, role: str) -> Any:
    """Give a content part under the names of this API; what it does not know goes as it is."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return {"type": "output_text" if role == "assistant" else "input_text", "text": part["text"]}
    if kind == "image_url" and isinstance(part.get("image_url"), Mapping):
        image = part["image_url"]
        return {"type": "input_image", "image_url": image.get("url"), "detail": image.get("detail", "auto")}
    if kind == "file" and isinstance(part.get("file"), Mapping):
        return {"type": "input_file", **part["file"]}
    return part


def text_format(response_format: Mapping[str, Any]) -> dict[str, Any]:
    """Give a chat ``response_format`` as the ``text.format`` of this API.

    Examples
    --------
    >>> text_format({"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": {}}})
    {'type': 'json_schema', 'name': 'answer', 'strict': True, 'schema': {}}
    """
    return {"type": response_format["type"], **response_format.get("json_schema", {})}
