"""Which line of a Batch job goes into which file.

No file passes a limit of the provider, lines keep their order, and a line is placed before the next one is
read, so a job of any size is planned while it streams to disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmframe.requests import KEY_BYTES

__all__ = ["FileLimits", "LineSize", "input_line", "place"]


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


def input_line(key: bytes, path: str, body: bytes) -> bytes:
    """One line of an input file; the custom id is the request's key in hex: 64 characters, the most the API takes."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a request's key has {KEY_BYTES} bytes, not {len(key)}")
    head = f'{{"custom_id":"{key.hex()}","method":"POST","url":"{path}","body":'
    return head.encode() + body + b"}\n"


def place(sizes: Iterable[LineSize], limits: FileLimits) -> Iterator[int | None]:
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
