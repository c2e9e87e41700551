"""Cells: what a column holds as plain Python, with one text for one value wherever it came from.

The text is what a request's key is made of: a frame, the same frame read back from parquet and the same frame in
another process have to give the same, and two values that differ never do. So no text is cut, an address, or in the
order of a hash.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from llmframe.errors import TemplateError
from llmframe.messages import NARROW, plain_scalar

PLAIN = frozenset({str, int, bool, type(None)})  # nothing in these is written otherwise than Python does
ALIKE = PLAIN | {float, list, dict}  # nor in these, where what they hold is of these
TIMES = (datetime.date, datetime.time, datetime.timedelta)  # a Timestamp is a date, a Timedelta a timedelta
BYTES = (bytes, bytearray, memoryview)
ARROW = (pa.Array, pa.ChunkedArray)
PANDAS = (pd.Series, pd.Index, pd.api.extensions.ExtensionArray)
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+>")


def values(column: pd.Series[Any], *, pictures: bool = False) -> list[Any]:
    """Give a column's values as Python objects, a missing one as None; a picture may be an array."""
    found: list[Any] = column.tolist()
    held: Any = column.dtype.categories.dtype if isinstance(column.dtype, pd.CategoricalDtype) else column.dtype
    dtype: Any = getattr(held, "numpy_dtype", held)
    arrow = getattr(held, "pyarrow_dtype", None)
    if dtype in NARROW:
        found = [value if value is pd.NA else plain_scalar(dtype.type(value)) for value in found]
    elif arrow is not None and (pa.types.is_nested(arrow) or pa.types.is_dictionary(arrow)) and not pictures:
        found = [unpacked(_as_typed(value, arrow)) for value in found]
    elif isinstance(held, np.dtype) and held.kind == "O" and not pictures and not PLAIN.issuperset(map(type, found)):
        found = list(map(unpacked, found))
    if held is not dtype and getattr(dtype, "kind", None) == "f":  # where pandas 2 has NaN beside its own missing value
        found = [None if value is pd.NA or value != value else value for value in found]
    for place in np.flatnonzero(column.isna().to_numpy()):
        found[place] = None
    return found


def unpacked(value: Any) -> Any:
    """Give a cell as plain Python: an array as a list, as it was before parquet, and numpy's scalars as Python's own.

    What is not written as Python writes it comes as a list, dict or set that knows its text, so that a function and a
    template write it alike.

    Examples
    --------
    >>> import numpy as np
    >>> unpacked(np.array([1.5, np.nan])), unpacked({"b", "a"}), unpacked((1, 2))
    ([1.5, None], {'a', 'b'}, [1, 2])
    """
    try:
        return _plain(value)
    except RecursionError:
        return Endless()


def as_text(value: Any) -> str:
    """Give a cell's text.

    Raises
    ------
    TemplateError
        It has none, or one that another process would not give.
    """
    if type(value) in ALIKE:
        return str(value)
    if isinstance(value, BYTES):
        return _decoded(value)
    return _without_address(str(value), value)


def refuse_address(text: str, row: Mapping[Hashable, Any]) -> None:
    """Refuse what a function or a renderer made of a row if it wrote the address of a value.

    Raises
    ------
    TemplateError
        Naming the column.
    """
    if not ADDRESS.search(text):  # nearly always
        return
    for column, value in row.items():
        try:
            shown = "" if isinstance(value, BYTES) else str(value)
        except Exception:  # its own __str__ may raise anything, and then is not in the text
            continue
        if _is_address(shown, value) and shown in text:
            raise TemplateError(f"column {column!r} holds {_address(value)}")


class Listed(list[Any]):
    """A list whose items are written as cells are."""

    def __repr__(self) -> str:
        return f"[{', '.join(map(_item, self))}]"


class Tupled(tuple[Any, ...]):
    """A tuple that is written as the list that parquet makes of it, and still is one to a function."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(Listed(self))


class Keyed(dict[Any, Any]):
    """A dict whose items are written as cells are."""

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{_item(key)}: {_item(value)}' for key, value in self.items())}}}"


class OrderedSet(set[Any]):
    """A set in a stable order: Python's own is another in every process."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=_rank))

    def __repr__(self) -> str:
        return f"{{{', '.join(map(_item, self))}}}" if self else "set()"


class OrderedFrozenset(frozenset[Any]):
    """A frozenset in a stable order."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=_rank))

    def __repr__(self) -> str:
        return repr(OrderedSet(self))


class Endless:
    """In the place of a value that holds itself, or is nested deeper than Python goes."""

    def __repr__(self) -> str:
        raise TemplateError("a value that holds itself, or is nested too deep to be written as text")


def _plain(value: Any) -> Any:
    if type(value) in PLAIN:
        return value
    if type(value) is float:
        return None if value != value else value
    if _is_missing(value):
        return None
    if isinstance(value, np.generic):
        return _scalar(value)
    if isinstance(value, list):
        return value if type(value) is list and _is_plain(value) else _list(map(_plain, value))
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, tuple):
        return _tuple(value)
    if isinstance(value, Set):
        return (OrderedSet if isinstance(value, set) else OrderedFrozenset)(map(_key, value))
    if isinstance(value, datetime.timedelta):
        return _timedelta(value)
    return _array(value)


def _array(value: Any) -> Any:
    """Give an array of numpy, pandas or Arrow as a list; their own text leaves out all but a few values."""
    if isinstance(value, np.ndarray):
        return _ndarray(value)
    if isinstance(value, PANDAS):
        return _list(map(_plain, values(pd.Series(value))))
    if isinstance(value, ARROW):
        return _list(_plain(_as_typed(each, value.type)) for each in value.to_pylist())
    if isinstance(value, pa.Scalar):
        return _plain(_as_typed(value.as_py(), value.type))
    if isinstance(value, pd.DataFrame):
        columns = [_plain(value.iloc[:, place]) for place in range(value.shape[1])]
        return _list(_mapping(dict(zip(value.columns, row, strict=True))) for row in zip(*columns, strict=True))
    return value


def _ndarray(value: np.ndarray[Any, Any]) -> Any:
    if value.ndim == 0:
        return _plain(value[()])
    if value.ndim > 1 or value.dtype == object or value.dtype in NARROW or isinstance(value, np.ma.MaskedArray):
        return _list(map(_plain, value))
    if value.dtype.kind in "mM":
        return _list(map(_plain, pd.Series(value).tolist()))  # ndarray.tolist gives times as ints
    found = value.tolist()
    return found if _is_plain(found) else _list(map(_plain, found))


def _list(items: Iterable[Any]) -> list[Any]:
    made = list(items)
    return made if ALIKE.issuperset(map(type, made)) else Listed(made)


def _mapping(value: Mapping[Any, Any]) -> dict[Any, Any]:
    made = {_key(key): _plain(each) for key, each in value.items()}
    alike = ALIKE.issuperset(map(type, made)) and ALIKE.issuperset(map(type, made.values()))
    return made if alike else Keyed(made)


def _tuple(value: tuple[Any, ...]) -> Any:
    if type(value) is tuple:
        return Tupled(map(_plain, value))
    if hasattr(value, "_fields"):  # a namedtuple; other kinds of tuple have a text of their own
        return tuple.__new__(type(value), map(_plain, value))
    return value


def _is_plain(items: Iterable[Any]) -> bool:
    kinds = set(map(type, items))
    if float in kinds and any(item != item for item in items):
        return False
    return kinds - {float} <= PLAIN


def _is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return bool(value != value)
    return value is pd.NaT or value is pd.NA or value is np.ma.masked


def _key(value: Any) -> Any:
    """Give what is in a set, or the key of a dict, as plain Python that hashes as it did."""
    if _is_missing(value):
        return None
    if isinstance(value, np.generic):
        return _scalar(value)
    if type(value) is tuple:
        return tuple(map(_key, value))
    if isinstance(value, frozenset):
        return OrderedFrozenset(map(_key, value))
    return _timedelta(value) if isinstance(value, datetime.timedelta) else value


def _scalar(value: np.generic) -> Any:
    try:
        if isinstance(value, np.datetime64):
            return None if np.isnat(value) else pd.Timestamp(value)
        if isinstance(value, np.timedelta64):
            return None if np.isnat(value) else pd.Timedelta(value)
    except (ValueError, OverflowError):  # beyond what pandas holds
        return value
    item = plain_scalar(value)
    return item if isinstance(item, np.generic) else _plain(item)  # a long double gives itself


def _timedelta(value: datetime.timedelta) -> datetime.timedelta:
    try:
        return pd.Timedelta(value)  # as a column of durations, or parquet, has it
    except (ValueError, OverflowError):  # beyond what pandas holds
        return value


def _as_typed(value: Any, kind: pa.DataType) -> Any:
    """Give what Arrow widened as the narrow float that it is."""
    if value is None or value is pd.NA:
        return None
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return plain_scalar(kind.to_pandas_dtype()(value))
    if "float" not in str(kind):  # else every word of a long list would be looked at
        return value
    if pa.types.is_struct(kind):
        return {field.name: _as_typed(value[field.name], field.type) for field in kind}
    if pa.types.is_map(kind):
        return [(_as_typed(key, kind.key_type), _as_typed(each, kind.item_type)) for key, each in value]
    if pa.types.is_dictionary(kind):
        return _as_typed(value, kind.value_type)
    if pa.types.is_nested(kind) and hasattr(kind, "value_type"):
        return [_as_typed(each, kind.value_type) for each in value]
    return value


def _rank(value: Any) -> tuple[int, Any, str]:
    if isinstance(value, int | float):
        return (0, value, "")
    return (1, 0, value) if isinstance(value, str) else (2, 0, _item(value))


def _item(value: Any) -> str:
    """Give the text of what is in a list, a dict or a set."""
    if isinstance(value, TIMES):
        return repr(str(value))
    if isinstance(value, BYTES):
        return repr(_decoded(value))
    return _without_address(repr(value), value)


def _decoded(value: bytes | bytearray | memoryview) -> str:
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        raise TemplateError(
            "bytes that are not UTF-8 text; decode them first, or name the column in images= if they are a file"
        ) from None


def _without_address(text: str, value: Any) -> str:
    """Give the text if every process gives it."""
    if _is_address(text, value):
        raise TemplateError(_address(value))
    return text


def _is_address(text: str, value: Any) -> bool:
    # Text may speak of addresses, and what is in a container has been looked at one by one.
    looked_at = isinstance(value, str | list | dict | set | Tupled | OrderedFrozenset)
    return not looked_at and ADDRESS.search(text) is not None


def _address(value: Any) -> str:
    return (
        f"a value of type {type(value).__name__} whose text is its address in memory, another in every process; "
        "make the column text first, or pass a function as the prompt that writes what the value holds"
    )
