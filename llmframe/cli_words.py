"""What the verbs of the command line share: exit statuses, and the types of arguments."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import suppress
from typing import Any, TypeAlias

OK, WRONG_USE, ROWS_LEFT, STOPPED = 0, 2, 3, 4

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def report(text: str) -> None:
    """Print what came of a verb whose work is done, which it stays where nobody takes what is printed."""
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError as error:  # PYTHONIOENCODING=ascii, and a file of another name
            print(text.encode(error.encoding, "backslashreplace").decode(error.encoding), flush=True)
    except OSError as error:
        # What is buffered would be written again at the end of the process, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        complain(f"standard output could not be written: {error.strerror}")


def complain(text: str) -> None:
    """Print to standard error, where there is one."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(f"llmframe: {text}", file=sys.stderr, flush=True)


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
