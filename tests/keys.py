"""What looks like a key, and whether the suite has left one anywhere: every key of its own begins with ``sk-``.

A key belongs into the header of a request and nowhere else: not into a file, an output, a log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

A_KEY = re.compile(r"(?<![A-Za-z0-9_-])sk-[A-Za-z0-9_-]{4,}")
"""Of the suite's keys those that are long enough to be told from words."""

LARGE_BYTES = 8 << 20  # no test writes so much but to see that it can be written


def keys_in(text: str) -> set[str]:
    """Find what looks like a key."""
    return set(A_KEY.findall(text))


def keys_under(place: Path) -> Iterator[tuple[str, str]]:
    """Find the keys in the names and bytes of all files of a directory; of a parquet file also in what it holds."""
    for directory, _, names in os.walk(place):
        for name in names:
            path = Path(directory, name)
            try:
                if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGE_BYTES:
                    continue
                data = path.read_bytes()
            except OSError:  # not for us to read, or gone
                continue
            told = f"{path.relative_to(place)}\n{data.decode('latin-1')}\n{_held(data)}"
            yield from ((str(path), key) for key in keys_in(told))


def _held(data: bytes) -> str:
    """Write what a parquet file holds, which is compressed in it; nothing of any other."""
    if data[:4] != b"PAR1":
        return ""
    try:
        return str(pq.read_table(pa.BufferReader(data)).to_pydict())
    except (pa.ArrowException, OSError, ValueError):  # a damaged one, as some tests make them
        return ""
