"""What the verbs of the command line share: exit statuses, and the types of arguments."""

from __future__ import annotations

import argparse
import json
from typing import Any, TypeAlias

OK, WRONG_USE, ROWS_LEFT, STOPPED = 0, 2, 3, 4

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parameter(text: str) -> tuple[str, Any]:
    """Read ``name=value``, the value as JSON, and as text where it is none.

    Examples
    --------
    >>> parameter("temperature=0.2"), parameter("reasoning_effort=low")
    (('temperature', 0.2), ('reasoning_effort', 'low'))
    """
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is no parameter; write name=value, as in temperature=0.2")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
