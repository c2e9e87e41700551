"""Which line of a Batch job goes into which file.

No file passes a limit of the provider, lines keep their order, and a line is placed before the next one is
read, so a job of any size is planned while it streams to disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llmframe.requests import KEY_BYTES

__all__ = ["FileLimits", "LineSize", "file_numbers", "input_line", "key_of", "next_to_go", "said_limit"]

Line = bytes  # an alias: inside a class with a field `bytes` the type cannot be named

BYTES_A_TOKEN = 4  # of a body; its JSON makes this a count that is rather too high, and so on the safe side
_START = b'{"custom_id":"'
_LIMIT = re.compile(r"limit(?:\s+of|:)?\s*(?P<number>\d[\d,]*)(?P<unit>[km]?)\b", re.I)


@dataclass(frozen=True, slots=True)
class FileLimits:
    """What one input file may hold; the enqueued tokens are the account's and known only to its owner."""

    requests: int = 50_000
    bytes: int = 200_000_000  # the provider says 200 MB; the decimal reading is the smaller one
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class LineSize:
    """The bytes of a line, its newline included, and the tokens it is counted for while it is enqueued."""

    bytes: int
    tokens: int

    @classmethod
    def of(cls, line: Line) -> LineSize:
        """Measure a line."""
        return cls(len(line), max(1, len(line) // BYTES_A_TOKEN))


def input_line(key: bytes, path: str, body: bytes) -> bytes:
    """One line of an input file; the custom id is the request's key in hex: 64 characters, the most the API takes."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a request's key has {KEY_BYTES} bytes, not {len(key)}")
    return _START + f'{key.hex()}","method":"POST","url":"{path}","body":'.encode() + body + b"}\n"


def key_of(line: bytes) -> bytes:
    """Give the key of the request in a line that `input_line` made."""
    return bytes.fromhex(line[len(_START) : len(_START) + 2 * KEY_BYTES].decode())


def file_numbers(sizes: Iterable[LineSize], limits: FileLimits) -> Iterator[int | None]:
    """Say for each line the number of its file, from 0; None for a line that no file could hold."""
    part = requests = size = tokens = 0
    most = limits.tokens
    for line in sizes:
        if line.bytes > limits.bytes or (most is not None and line.tokens > most):
            yield None
            continue
        full = requests == limits.requests or size + line.bytes > limits.bytes
        if full or (most is not None and tokens + line.tokens > most):
            part += 1
            requests = size = tokens = 0
        requests += 1
        size += line.bytes
        tokens += line.tokens
        yield part


def next_to_go(waiting: Sequence[int], under_way: int, limit: int | None) -> int | None:
    """Choose which file goes out next: the place of the first that fits beside what is under way.

    Parameters
    ----------
    waiting : sequence of int
        The tokens of the files that wait, in their order.
    under_way : int
        The tokens of the batches that have not ended.
    limit : int, optional
        Tokens that may be enqueued at one time, where the provider has said so.

    Returns
    -------
    int or None
        None where the first that waits has to wait on: none overtakes it, or a large one would never go.
    """
    if not waiting:
        return None
    return 0 if limit is None or not under_way or under_way + waiting[0] <= limit else None


def said_limit(message: str) -> int | None:
    """Read the limit that a refusal for enqueued tokens names.

    Examples
    --------
    >>> said_limit("Enqueued token limit reached for gpt-4o-mini. Limit: 2,000,000 enqueued tokens. Please try again.")
    2000000
    >>> said_limit("The number of enqueued tokens has surpassed the configured limit of 30K for the deployment 'a'.")
    30000
    """
    found = _LIMIT.search(message)
    if found is None:
        return None
    return int(found["number"].replace(",", "")) * {"k": 1_000, "m": 1_000_000}.get(found["unit"].lower(), 1)
