"""A part of a checkpoint as bytes, for tests that damage one or put one where no run would."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from llmframe.origins import Origin
from llmframe.parts import Row, Rows, write_rows


def encode(rows: Sequence[Row | Rows], origin: Origin) -> bytes:
    """Give rows as the bytes of one part."""
    sink = pa.BufferOutputStream()
    write_rows(sink, rows, origin)
    data: bytes = sink.getvalue().to_pybytes()
    return data
