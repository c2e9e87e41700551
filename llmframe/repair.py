"""Read the JSON in an answer's text, and mend ordinary damage: code fences, prose around it, a stray comma.

What is missing is never made up: an answer that was cut is no JSON, however much of it could be closed.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import orjson

from llmframe.messages import well_formed

QUOTED = 200  # characters of an answer in a reason


class Unfit(Exception):
    """An answer does not fit the schema."""


def json_text(text: str) -> str:
    r"""Give an answer's JSON as text that any reader takes: as it came, or without what was damaged.

    Raises
    ------
    Unfit
        It holds none, or not all of it.

    Examples
    --------
    >>> json_text('{"stars": 4} '), json_text('```json\n{"stars": 4,}\n```')
    ('{"stars": 4} ', '{"stars":4}')
    """
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return orjson.dumps(read_answer(text)).decode()
    return text


def read_answer(text: str) -> Any:
    r"""Read the JSON that an answer holds.

    Raises
    ------
    Unfit
        It holds none, or not all of it.

    Examples
    --------
    >>> read_answer('Here it is:\n```json\n{"stars": 4,}\n```')
    {'stars': 4}
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    # `json_repair` closes what is open, which would pass half a text for the whole.
    if text.count("{") > text.count("}") or text.count("[") > text.count("]"):
        raise Unfit(f"the answer {text!r:.{QUOTED}} ends in the middle of its JSON")
    import json_repair

    try:
        found = json_repair.loads(text)
    except (ValueError, RecursionError):
        found = ""
    if isinstance(found, list) and not text.lstrip("` \n").startswith(("[", "json\n[")):
        found = next((each for each in found if isinstance(each, dict) and each), found)  # prose with braces of its own
    if isinstance(found, dict | list):
        # It reads integers and halves of characters that no other reader takes, and orjson does not write.
        with suppress(ValueError, RecursionError):
            return orjson.loads(well_formed(json.dumps(found, ensure_ascii=False)))
    raise Unfit(f"the answer {text!r:.{QUOTED}} is no JSON")
