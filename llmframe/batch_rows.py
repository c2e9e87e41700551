"""The rows of a Batch job on disk: the frame as it came, and which request each row sends.

What is read back is what was written, types and index too; a column that no file keeps as it is, is left out by name.
Nothing in it is code: reading it runs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from llmframe.batch_ledger import Place
from llmframe.errors import ConfigurationError
from llmframe.planning import Plan
from llmframe.requests import KEY_BYTES

ROWS = "rows.parquet"
REQUESTS = "requests.parquet"
PLAIN = frozenset({"string", "bytes", "boolean", "date", "decimal", "empty"})  # objects that parquet gives back

COLUMN = "llmframe column {}"  # whatever it is called: labels may be numbers, or twice the same
OWN = ("llmframe request", "llmframe selected", "llmframe skipped")

_NOTES = b"llmframe.batch"


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a job.

    Attributes
    ----------
    frame : DataFrame
        As it came.
    plan : Plan
        Which row sends what.
    asked : array of bool
        By request: whether the job asks it; the others were in the checkpoint.
    left_out : tuple of str
        Columns that could not be kept.
    """

    frame: pd.DataFrame
    plan: Plan
    asked: npt.NDArray[np.bool_]
    left_out: tuple[str, ...] = ()


def digest_of(plan: Plan) -> str:
    """Name the rows and their requests: the same call has the same digest."""
    digest = hashlib.sha256(plan.keys.tobytes())
    digest.update(plan.request_of.astype(np.int64).tobytes())
    return digest.hexdigest()


def save_rows(place: Place, frame: pd.DataFrame, plan: Plan, asked: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """Keep the rows; the columns that could not be kept."""
    cells_of: dict[str, Any] = {}
    labels: list[Any] = []
    as_json: list[int] = []
    left_out: list[str] = []
    for number, label in enumerate(frame.columns):
        column = frame.iloc[:, number]
        cells, encoded = _storable(column)
        if cells is None or not _is_label(label):
            left_out.append(str(label))
            continue
        name = COLUMN.format(len(labels))
        if encoded:
            as_json.append(len(labels))
        cells_of[name] = cells
        labels.append(label)
    notes = {"labels": labels, "names": _name_of(frame.columns), "json": as_json, "left_out": left_out}
    try:
        table = pa.Table.from_pandas(pd.DataFrame(cells_of, index=frame.index))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the frame's index cannot be kept in the job's directory: {error}; submit df.reset_index()"
        ) from error
    for name, values in zip(OWN, (plan.request_of.astype(np.int64), plan.selected, _reasons(plan)), strict=True):
        table = table.append_column(name, pa.array(values, pa.string() if name == OWN[2] else None))
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _NOTES: json.dumps(notes).encode()})
    keys = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY_BYTES), len(plan.keys), [None, pa.py_buffer(plan.keys.tobytes())]
    )
    requests = pa.table({"key": keys, "first": plan.first.astype(np.int64), "asked": asked})
    unreadable = [plan.unreadable.get(number) for number in range(len(plan.keys))]
    requests = requests.append_column("unreadable", pa.array(unreadable, pa.string()))
    for name, made in ((ROWS, table), (REQUESTS, requests)):
        with place.write(name) as file:
            pq.write_table(made, file)
    return tuple(left_out)


def load_rows(place: Place) -> Rows:
    """Read the rows.

    Raises
    ------
    ConfigurationError
        They are not there, or damaged.
    """
    try:
        table, requests = (pq.read_table(place.path / name) for name in (ROWS, REQUESTS))
    except (OSError, pa.ArrowException) as error:
        raise ConfigurationError(f"the rows of the job in {place.name} cannot be read: {error}") from error
    metadata = table.schema.metadata
    notes = json.loads(metadata[_NOTES])
    request_of, selected, reasons = (table[name].to_numpy() for name in OWN)
    frame = table.drop_columns(list(OWN)).to_pandas()
    for number in notes["json"]:
        name = COLUMN.format(number)
        cells = [json.loads(cell) if isinstance(cell, str) else None for cell in frame[name].tolist()]
        frame[name] = np.fromiter(cells, object, len(cells))
    frame.columns = pd.Index(notes["labels"], name=notes["names"]) if notes["labels"] else pd.Index([])
    frame.attrs = {}
    keys = b"".join(requests["key"].to_pylist())
    plan = Plan(
        request_of.astype(np.intp),
        requests["first"].to_numpy().astype(np.intp),
        np.frombuffer(keys, f"V{KEY_BYTES}"),
        {at: reason for at, reason in enumerate(reasons) if reason is not None},
        selected,
        {at: reason for at, reason in enumerate(requests["unreadable"].to_pylist()) if reason is not None},
    )
    return Rows(frame, plan, requests["asked"].to_numpy(), tuple(notes["left_out"]))


def _storable(column: pd.Series[Any]) -> tuple[Any, bool]:
    """Give a column's cells as parquet gives them back, and whether they are JSON; None where nothing keeps them."""
    if column.dtype != object:
        try:
            table = pa.Table.from_pandas(column.to_frame("c"), preserve_index=False)
            kept = table.to_pandas()["c"]
            same = kept.dtype == column.dtype and kept.equals(column.reset_index(drop=True).rename("c"))
        except (pa.ArrowException, TypeError, ValueError, NotImplementedError):
            return None, False
        return (column.array, False) if same else (None, False)
    if pd.api.types.infer_dtype(column, skipna=True) in PLAIN:
        return column.array, False
    try:
        cells = [None if _is_missing(value) else json.dumps(value) for value in column.tolist()]
        back = [None if cell is None else json.loads(cell) for cell in cells]
    except (TypeError, ValueError):
        return None, False
    alike = all(
        (one is None and _is_missing(other)) or (type(one) is type(other) and one == other)
        for one, other in zip(back, column.tolist(), strict=True)
    )
    return (pd.array(cells, dtype="string"), True) if alike else (None, False)


def _reasons(plan: Plan) -> list[str | None]:
    return [plan.skipped.get(at) for at in range(len(plan.request_of))]


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def _is_label(label: Hashable) -> bool:
    return label is None or isinstance(label, str | bool | int | float)


def _name_of(columns: pd.Index[Any]) -> Any:
    return columns.name if _is_label(columns.name) else None
