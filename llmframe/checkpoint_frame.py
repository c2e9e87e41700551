"""Everything a checkpoint holds, as one frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from llmframe.errors import CheckpointError
from llmframe.origins import Origin
from llmframe.parts import COLUMNS, NotAPart, Part, renumbered
from llmframe.results import STATUSES, text_dtype
from llmframe.shelf import Shelf
from llmframe.storage import storage_at
from llmframe.winners import Candidates, winners


def read_checkpoint(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read everything a checkpoint holds, as one frame.

    Parameters
    ----------
    path : str or path
        The directory or fsspec URL that was given as ``checkpoint=``.

    Returns
    -------
    pandas.DataFrame
        One row a request, in the order they were answered; a failure where there is no answer. Its columns:

        - ``key``, hexadecimal, and ``status``;
        - ``text``, the answer, or ``texts``, a list, under ``n=``; and ``error``, null where the status is ``ok``;
        - ``prompt_tokens``, ``completion_tokens``, and what ``details=True`` adds to a frame, all but ``source``:
          ``cached_tokens``, ``reasoning_tokens``, ``cost_usd``, ``latency_s``, ``attempts``, ``finish_reason``,
          ``model``, ``request_id``, ``tool_calls`` and ``reasoning``;
        - ``embedding``, a float32 array where embeddings were asked for, and ``answered_at``;
        - what it was asked with: ``endpoint``, ``api``, ``asked_model``, ``template`` and ``parameters`` (JSON).

    Raises
    ------
    CheckpointError
        If there is no such directory, or it holds a part of a newer format.

    Examples
    --------
    >>> import tempfile
    >>> from llmframe import read_checkpoint
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     answers = read_checkpoint(directory)
    >>> len(answers)
    0
    >>> answers["prompt_tokens"].dtype
    Int64Dtype()
    """
    where = os.fspath(path)
    if not where:  # as a path it would be the working directory
        raise CheckpointError("'' is no checkpoint; name its directory or URL")
    shelf = Shelf(storage_at(path), where)
    while True:
        candidates = [Candidates.of(name, heads) for name, heads in shelf.read(Part.heads)]
        tables, origins = [], dict[Origin, int]()
        for name, rows, _ in winners(candidates):
            try:
                with shelf.open(name) as part:
                    numbers = [origins.setdefault(origin, len(origins)) for origin in part.origins]
                    tables += [renumbered(table, numbers) for table in part.take(rows)]
            except (FileNotFoundError, NotAPart) as error:
                shelf.lost(name, error)
                break
        else:
            return _frame(pa.concat_tables([COLUMNS.empty_table(), *tables]), list(origins))


def _frame(table: pa.Table, origins: Sequence[Origin]) -> pd.DataFrame:
    text = text_dtype()
    dtypes = {pa.string(): text, pa.int64(): pd.Int64Dtype(), pa.float64(): pd.Float64Dtype()}
    table = table.sort_by("answered_at")
    plain = table.drop_columns(["key", "texts", "embedding", "origin"])
    frame: pd.DataFrame = plain.to_pandas(types_mapper=dtypes.get)
    frame.insert(0, "key", pd.Series([key.hex() for key in table["key"].to_pylist()], dtype=text))
    frame.insert(3, "texts", pd.Series(table["texts"].to_pylist(), dtype=object))
    vectors = [_vector(raw) for raw in table["embedding"].to_pylist()]
    frame.insert(len(frame.columns) - 1, "embedding", pd.Series(vectors, dtype=object))
    frame["status"] = pd.Categorical(frame["status"], categories=list(STATUSES))
    codes = table["origin"].fill_null(-1).to_numpy()
    for field in fields(Origin):
        values = [getattr(origin, field.name) for origin in origins]
        categories = pd.Index(sorted(set(values)), dtype=text)
        places = categories.get_indexer([*values, None])  # the last, -1, is where a code of -1 points
        name = "asked_model" if field.name == "model" else field.name
        frame[name] = pd.Categorical.from_codes(places[codes], categories=categories)
    return frame


def _vector(raw: bytes | None) -> npt.NDArray[np.float32] | None:
    return None if raw is None else np.frombuffer(raw[: len(raw) // 4 * 4], "<f4")
