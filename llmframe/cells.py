"""Cells: what a column holds as plain Python, with one text for one value wherever it came from.

The text is what a request's key is made of: a frame, the same frame read back from parquet and the same frame in
another process have to give the same, and two values that differ never do. So no text is cut, an address, or in the
order of a hash.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import enum
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import BaseModel

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
    template write it alike. What can more than that (a Series, a frame, a Counter, an object with fields) is handed on
    as it is: a function may need what it can, and `as_text` writes it.

    Examples
    --------
    >>> import numpy as np
    >>> unpacked(np.array([1.5, np.nan])), unpacked({"b", "a"}), unpacked((1, 2))
    ([1.5, None], {'a', 'b'}, [1, 2])
    """
    return value if _can_more(value) else _written_out(value)


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
    if _can_more(value):
        value = _written_out(value)
    elif isinstance(value, enum.Enum) and type(value).__str__ is enum.Enum.__str__:
        value = _unmixed(value)
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
        return repr(_list(self))


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


class Unwritable:
    """In the place of a value that cannot be taken apart, for who writes it."""

    def __init__(self, words: str) -> None:
        self._words = words

    def __repr__(self) -> str:
        raise TemplateError(self._words)


def _can_more(value: Any) -> bool:
    """Whether a value is a Series, a frame, has fields, or is another kind of list or dict than Python's own."""
    if isinstance(value, pd.Series | pd.DataFrame) or _has_fields(value):
        return True
    if isinstance(value, list):
        return type(value) is not list
    return isinstance(value, Mapping) and type(value) is not dict


def _written_out(value: Any) -> Any:
    try:
        return _plain(value)
    except RecursionError:
        return Unwritable("a value that holds itself, or is nested too deep to be written as text")
    except TemplateError:
        raise
    except Exception as error:  # what a lazy mapping or an odd type of Arrow raises, though nobody may ask for its text
        return Unwritable(
            f"a value of type {type(value).__name__} that cannot be read ({type(error).__name__}: {error})"
        )


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
        if type(value) is list and _is_plain(value):
            return value
        own_text = type(value).__repr__ is not list.__repr__ or type(value).__str__ is not object.__str__
        return value if own_text and type(value) is not Listed else _list(map(_plain, value))
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, tuple):
        return _tuple(value)
    if isinstance(value, Set):
        return (OrderedSet if isinstance(value, set) else OrderedFrozenset)(map(_key, value))
    if isinstance(value, datetime.timedelta):
        return _timedelta(value)
    return _with_plain_fields(value) if _has_fields(value) else _array(value)


def _array(value: Any) -> Any:
    """Give an array of numpy, pandas or Arrow as a list; their own text leaves out all but a few values."""
    if isinstance(value, np.ndarray):
        return _ndarray(value)
    if isinstance(value, pd.Series):
        return _series(value)
    if isinstance(value, pd.MultiIndex):
        return _list(map(_plain, value))
    if isinstance(value, PANDAS):
        return _list(map(_plain, values(pd.Series(value))))
    if isinstance(value, ARROW):
        return _list(_plain(_as_typed(each, value.type)) for each in value.to_pylist())
    if isinstance(value, pa.Scalar):
        return _plain(_as_typed(value.as_py(), value.type))
    if isinstance(value, pd.DataFrame):
        return _frame(value)
    return value


def _series(value: pd.Series[Any]) -> Any:
    """Give a Series as the list of its values, with their labels where it has any."""
    found = [_plain(each) for each in values(value)]
    if _is_unlabelled(value.index):
        return _list(found)
    labels = [_key(label) for label in value.index]
    if value.index.is_unique:
        return _mapping(dict(zip(labels, found, strict=True)))
    return _list(_list(pair) for pair in zip(labels, found, strict=True))


def _frame(value: pd.DataFrame) -> Any:
    """Give a frame as its rows; as its columns' names and its rows' values where names repeat."""
    columns = [[_plain(each) for each in values(value.iloc[:, place])] for place in range(value.shape[1])]
    names = [_key(name) for name in value.columns]
    if not _is_unlabelled(value.index):
        columns.insert(0, [_key(label) for label in value.index])
        names.insert(0, value.index.name or "index")
    rows = list(zip(*columns, strict=True))
    if len(set(names)) < len(names):
        return _list([_list(names), *map(_list, rows)])
    return _list(_mapping(dict(zip(names, row, strict=True))) for row in rows)


def _is_unlabelled(index: pd.Index[Any]) -> bool:
    return isinstance(index, pd.RangeIndex) and index.equals(pd.RangeIndex(len(index)))


def _ndarray(value: np.ndarray[Any, Any]) -> Any:
    value = np.ma.asarray(value) if isinstance(value, np.ma.MaskedArray) else np.asarray(value)  # a matrix has no rows
    if value.ndim == 0:
        return _plain(value[()])
    if value.ndim > 1 or value.dtype == object or value.dtype in NARROW or isinstance(value, np.ma.MaskedArray):
        return _list(map(_plain, value))
    if value.dtype.kind in "mM":
        return _list(map(_plain, pd.Series(value).tolist()))  # ndarray.tolist gives times as ints
    found = value.tolist()
    return found if _is_plain(found) else _list(map(_plain, found))


def _has_fields(value: Any) -> bool:
    return isinstance(value, BaseModel) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _with_plain_fields(value: Any) -> Any:
    """Give a dataclass or a pydantic model with its fields as plain Python, where its text is made of theirs.

    A set in a field is in another order in every process, as it is in a cell. A text of the class's own may need the
    fields as they are.
    """
    kind: Any = type(value)
    if isinstance(value, BaseModel):
        own = (kind.__repr__, kind.__str__, kind.__repr_args__)
        if own != (BaseModel.__repr__, BaseModel.__str__, BaseModel.__repr_args__) or kind.model_computed_fields:
            return value
        return value.model_copy(update={name: _plain(held) for name, held in value})
    fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    shown = [f"{each.name}={fields[each.name]!r}" for each in dataclasses.fields(value) if each.repr]
    if str(value) != f"{kind.__qualname__}({', '.join(shown)})":
        return value
    made = copy.copy(value)
    for name, held in fields.items():
        object.__setattr__(made, name, _plain(held))  # it may be frozen
    return made


def _unmixed(value: Any) -> Any:
    """Give a member of an enum that is text or a number too as that, which is what parquet makes of it."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, float) else value


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
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
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
    value = _unmixed(value) if isinstance(value, enum.Enum) else value
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
    """Whether a value's text tells where it, or what it holds, lies in memory; text may speak of other addresses."""
    # What is in a container has been looked at one by one.
    if isinstance(value, str | list | dict | set | Tupled | OrderedFrozenset) or ADDRESS.search(text) is None:
        return False
    held = [value, getattr(value, "__self__", None), getattr(value, "__func__", None)]
    held += getattr(value, "__dict__", {}).values()
    return any(f"{id(each):x}" in text.lower() for each in held if each is not None)


def _address(value: Any) -> str:
    return (
        f"a value of type {type(value).__name__} whose text is its address in memory, another in every process; "
        "make the column text first, or pass a function as the prompt that writes what the value holds"
    )
