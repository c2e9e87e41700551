"""Cells: one text for one value, whole, wherever it came from."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import os
import subprocess
import sys
import types
from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from llmframe.errors import TemplateError
from llmframe.messages import well_formed
from llmframe.prompts import Missing, Prompts

WORDS = [f"word {number}" for number in range(1200)]
DAY = pd.Timestamp("2024-05-06")
Point = namedtuple("Point", ["x", "y"])


def texts(frame: pd.DataFrame, prompt: Any, **keywords: Any) -> list[str]:
    rows = list(Prompts(frame, prompt, **keywords).render())
    return [row.reason if isinstance(row, Missing) else row[-1]["content"] for row in rows]


def column(cell: Any) -> pd.DataFrame:
    frame = pd.DataFrame({"x": pd.Series([None], dtype=object)})
    frame.at[0, "x"] = cell
    return frame


def written(cell: Any, prompt: Any = "{x}") -> str:
    (text,) = texts(column(cell), prompt)
    return text


ALIKE = pytest.mark.parametrize("prompt", ["{x}", lambda row: f"{row.x}", jinja2.Template("{{ x }}")])
"""A template, a function and a Jinja2 template: the three that write a cell."""


# ---- arrays


@pytest.mark.parametrize(
    "array",
    [
        pd.Index(WORDS),
        pd.array(WORDS, dtype="string[pyarrow]"),
        pd.Categorical(WORDS),
        pa.array(WORDS),
        pa.chunked_array([WORDS[:5], WORDS[5:]]),
        np.array(WORDS, dtype=object),
    ],
    ids=lambda array: type(array).__name__,
)
@ALIKE
def test_an_array_of_any_kind_in_a_cell_is_written_whole_as_the_list(array: Any, prompt: Any) -> None:
    assert written(array, prompt) == repr(WORDS)


def test_the_unique_values_of_groups_are_written_as_lists() -> None:
    frame = pd.DataFrame({"g": [1, 1, 2], "t": ["a", "b", "c"]})
    assert texts(frame.groupby("g")["t"].unique().reset_index(), "{t}") == ["['a', 'b']", "['c']"]


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (pd.array([1, None], dtype="Int64"), "[1, None]"),
        (pd.array([0.1, None], dtype="Float32"), "[0.1, None]"),
        (pa.array([0.1, None], pa.float32()), "[0.1, None]"),
        (pd.date_range("2024-05-06", periods=1), "['2024-05-06 00:00:00']"),
        ([pd.Series([1]), pa.array([2])], "[[1], [2]]"),
        (pa.scalar([0.1], pa.list_(pa.float32())), "[0.1]"),
        (pa.scalar("a"), "a"),
        (np.array(7), "7"),
        (pd.MultiIndex.from_tuples([(1, "a")]), "[[1, 'a']]"),
        (np.ma.masked_array([1, 2], mask=[False, True]), "[1, None]"),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
@ALIKE
def test_what_an_array_holds_is_written_as_plain_python(cell: Any, shown: str, prompt: Any) -> None:
    assert written(cell, prompt) == shown


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (pd.Series(WORDS), repr(WORDS)),
        (pd.Series(WORDS, dtype="string[pyarrow]"), repr(WORDS)),
        (pd.Series([DAY]), "['2024-05-06 00:00:00']"),
        (pd.Series([2, 1], index=["slow", "clean"]), "{'slow': 2, 'clean': 1}"),
        (pd.Series([2, 1], index=["slow", "slow"]), "[['slow', 2], ['slow', 1]]"),
        (pd.DataFrame({"a": [1, 2], "b": ["c", None]}), "[{'a': 1, 'b': 'c'}, {'a': 2, 'b': None}]"),
        (pd.DataFrame({"n": [3]}, index=["red"]), "[{'index': 'red', 'n': 3}]"),
        (pd.DataFrame([["home", "away"]], columns=["team", "team"]), "[['team', 'team'], ['home', 'away']]"),
    ],
)
def test_a_series_or_frame_in_a_cell_is_written_whole_with_its_labels(cell: Any, shown: str) -> None:
    assert written(cell) == shown


@pytest.mark.parametrize("prompt", [lambda row: row.x.to_csv(), jinja2.Template("{{ x.to_csv() }}")])
def test_a_function_and_a_renderer_are_given_a_series_as_it_is(prompt: Any) -> None:
    assert written(pd.Series([2], index=["slow"]), prompt) == ",0\nslow,2\n"


def test_what_cannot_be_taken_apart_is_an_error_only_where_it_is_written() -> None:
    class Closed(UserDict[str, int]):
        def __getitem__(self, key: str) -> int:
            raise RuntimeError("closed")

    assert written(Closed(a=1), lambda row: f"{len(row)} column") == "1 column"
    with pytest.raises(TemplateError, match=r"row 0.*Closed that cannot be read \(RuntimeError: closed\)"):
        written(Closed(a=1))


def test_an_array_of_pandas_may_be_a_message_array_as_one_of_numpy_may() -> None:
    message = {"role": "user", "content": "a"}
    (made,) = Prompts(column(pd.Series([message])), "x").render()
    assert made == [message]


# ---- sets and what has no text of its own


def test_a_set_has_one_text_in_every_process() -> None:
    program = (
        "import pandas as pd\n"
        "from llmframe.prompts import Prompts\n"
        "frame = pd.DataFrame({'g': [1] * 4, 't': ['pear', 'apple', 'fig', 'plum']}).groupby('g').agg(set)\n"
        "frame['f'] = [[frozenset('cab')]]\n"
        "for prompt in ('{t} {f}', lambda row: f'{row.t} {row.f}', lambda row: ' '.join(row.t)):\n"
        "    print(*(row[0]['content'] for row in Prompts(frame, prompt).render()))\n"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    both = "{'apple', 'fig', 'pear', 'plum'} [{'a', 'b', 'c'}]"
    assert made == {f"{both}\n{both}\napple fig pear plum\n"}


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ({10, 9, np.int64(2)}, "{2, 9, 10}"),
        (set(), "set()"),
        (frozenset({2, 1}), "{1, 2}"),
        ({"b", 2, ("a", np.int64(1)), None}, "{2, 'b', ('a', 1), None}"),
        ({frozenset({"b", "a"})}, "{{'a', 'b'}}"),
        ({DAY}, "{'2024-05-06 00:00:00'}"),
        ({2.5, float("nan"), 1.5}, "{1.5, 2.5, None}"),
        ({"b": 1, "a": 2}.keys(), "{'a', 'b'}"),
    ],
)
@ALIKE
def test_a_set_is_written_in_order(cell: Any, shown: str, prompt: Any) -> None:
    assert written(cell, prompt) == shown


def test_a_set_is_still_a_set_to_a_function() -> None:
    assert written({"b", "a"}, lambda row: str([*(row.x - {"a"}), isinstance(row.x, set)])) == "['b', True]"


class Thing:
    """An object with the text that Python gives it."""


@pytest.mark.parametrize("cell", [Thing(), [Thing()], {"a": Thing()}, lambda: None, (each for each in "a")])
@pytest.mark.parametrize("prompt", ["{x}", lambda row: f"It is {row.x}", jinja2.Template("{{ x }}")])
def test_what_has_only_an_address_for_a_text_is_refused_with_its_row(cell: Any, prompt: Any) -> None:
    frame = pd.concat([column("a"), column(cell)], ignore_index=True)
    with pytest.raises(TemplateError, match=r"row 1 \(label 1\): .*a value of type .* address in memory"):
        texts(frame, prompt)


def test_a_column_whose_texts_are_addresses_is_named() -> None:
    for prompt in ("x", "{x}", lambda row: f"It is {row.x}"):
        with pytest.raises(TemplateError, match="column 'x' holds a value of type Thing whose text is its address"):
            written(Thing(), prompt)


def test_a_function_may_read_what_has_only_an_address_and_write_of_addresses() -> None:
    frame = column(Thing()).assign(log="<Thing object at 0x7f00>", raw=b"\xff at 0x7f00>", tags=[{"at 0x7f00>"}])
    assert texts(frame, lambda row: f"{row.x.__class__.__name__}: {row.log} {row.raw} {row.tags}") == [
        f"Thing: <Thing object at 0x7f00> {frame['raw'][0]} {{'at 0x7f00>'}}"
    ]


def test_an_address_in_a_text_is_text() -> None:
    assert written("<Thing object at 0x7f00>") == "<Thing object at 0x7f00>"
    assert written(["<Thing object at 0x7f00>"]) == "['<Thing object at 0x7f00>']"


# ---- objects with fields, and members of enums


@dataclasses.dataclass(frozen=True)
class Order:
    number: Any
    marks: Any = ()
    secret: str = dataclasses.field(default="s", repr=False)


class Ticket(BaseModel):
    number: Any
    marks: Any = ()


class Named(Order):
    def __str__(self) -> str:
        return f"No. {self.number.item()}"


class Mood(str, enum.Enum):  # noqa: UP042
    good = "g"


class Level(int, enum.Enum):
    high = 3


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (Order(np.int64(1), {"b", "a"}), "Order(number=1, marks={'a', 'b'})"),
        ([Order(Order(np.float32(0.1)))], "[Order(number=Order(number=0.1, marks=[]), marks=[])]"),
        (Ticket(number=np.int64(1), marks={"b", "a"}), "number=1 marks={'a', 'b'}"),
        (Named(np.int64(1)), "No. 1"),
    ],
)
def test_the_fields_of_an_object_are_written_plain(cell: Any, shown: str) -> None:
    assert written(cell) == shown


def test_a_function_is_given_an_object_as_it_is() -> None:
    assert written(Order(np.array([1, 2])), lambda row: str(row.x.number.sum())) == "3"


@pytest.mark.parametrize("field", [Thing(), [Thing()]])
def test_an_object_whose_field_has_only_an_address_is_refused(field: Any) -> None:
    with pytest.raises(TemplateError, match=r"row 0 .* column 'x' holds a value of type .* address in memory"):
        written(Order(field))


@pytest.mark.parametrize("cell", [Mood.good, [Mood.good], {"a": Mood.good}, Level.high, [Level.high]], ids=repr)
def test_a_member_that_is_text_or_a_number_too_is_written_as_parquet_has_it(tmp_path: Path, cell: Any) -> None:
    frame = column(cell)
    frame.to_parquet(tmp_path / "x.parquet")
    assert texts(frame, "{x}") == texts(pd.read_parquet(tmp_path / "x.parquet"), "{x}")


# ---- dicts, tuples and times


@pytest.mark.parametrize(
    "cell",
    [
        Counter({"a": 1, "b": 2}),
        OrderedDict(a=1, b=2),
        defaultdict(list, {"a": 1, "b": 2}),
        types.MappingProxyType({"a": 1, "b": 2}),
        {"a": np.int64(1), "b": np.int64(2)},
    ],
    ids=lambda cell: type(cell).__name__,
)
def test_a_mapping_of_any_kind_is_written_as_the_dict(cell: Any) -> None:
    assert written(cell) == "{'a': 1, 'b': 2}"


def test_a_function_is_given_a_mapping_as_it_is() -> None:
    assert written(Counter("aab"), lambda row: row.x.most_common(1)[0][0]) == "a"


def test_a_list_with_a_text_of_its_own_keeps_it() -> None:
    class Names(list[str]):
        def __str__(self) -> str:
            return " and ".join(self)

    assert written(Names(["Ann", "Bob"])) == "Ann and Bob"


def test_a_text_that_speaks_of_addresses_is_no_address() -> None:
    assert "0x7f00" in written(ValueError("bad <Thing object at 0x7f00>"))


@ALIKE
def test_the_values_of_a_namedtuple_are_written_plain(prompt: Any) -> None:
    assert written(Point(np.int64(1), np.float32(0.1)), prompt) == "Point(x=1, y=0.1)"


@pytest.mark.parametrize(
    "cell",
    [
        [datetime.datetime(2024, 5, 6, 7, 8, 9, 1000)],
        [DAY, None],
        [datetime.date(2024, 5, 6)],
        [datetime.time(7, 8)],
        [datetime.timedelta(days=1, seconds=2)],
        {"a": datetime.datetime(2024, 5, 6), "b": [datetime.timedelta(1)]},
        datetime.timedelta(days=1),
        (1, 2),
        [(1, 2), (3, 4)],
        [1.5, None],
        [1.5, float("nan")],
        [[None, 0.5], [1.5]],
        {"a": None, "b": 1.5},
    ],
    ids=repr,
)
@ALIKE
def test_a_cell_read_back_from_parquet_has_its_text(tmp_path: Path, cell: Any, prompt: Any) -> None:
    frame = column(cell)
    frame.to_parquet(tmp_path / "x.parquet")
    assert texts(pd.read_parquet(tmp_path / "x.parquet"), prompt) == texts(frame, prompt)


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ([datetime.datetime(2024, 5, 6)], "['2024-05-06 00:00:00']"),
        ({"a": DAY}, "{'a': '2024-05-06 00:00:00'}"),
        ([datetime.date(2024, 5, 6)], "['2024-05-06']"),
        (datetime.timedelta(days=1), "1 days 00:00:00"),
        (np.timedelta64(1, "D"), "1 days 00:00:00"),
        (np.datetime64("2024-05-06"), "2024-05-06 00:00:00"),
        ([1, float("nan")], "[1, None]"),
        ([pd.NA, pd.NaT, np.datetime64("NaT")], "[None, None, None]"),
        ({"a": float("nan")}, "{'a': None}"),
        (np.array([1.0, np.nan]), "[1.0, None]"),
        ((1, 2), "[1, 2]"),
        ({("a", 1): (1,)}, "{('a', 1): [1]}"),
        (datetime.timedelta(days=999_999_999), "999999999 days, 0:00:00"),
    ],
)
@ALIKE
def test_a_time_or_what_is_missing_is_written_in_a_cell_as_it_reads(cell: Any, shown: str, prompt: Any) -> None:
    assert written(cell, prompt) == shown


def test_a_tuple_is_still_one_to_a_function() -> None:
    assert written((1, 2), lambda row: str({row.x: "a"}[1, 2])) == "a"


def test_a_time_in_a_list_is_still_one_to_a_function() -> None:
    assert written([datetime.date(2024, 5, 6)], lambda row: str(row.x[0].year)) == "2024"


@pytest.mark.parametrize("cell", [[1, "a", 0.5, None], {"a": [1, {"b": True}]}, ["a"], {}, []], ids=repr)
def test_a_cell_of_plain_python_is_handed_on_as_it_is(cell: Any) -> None:
    (made,) = texts(column(cell), lambda row: f"{type(row.x) is type(cell)} {row.x}")
    assert made == f"True {cell}"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.lists(PLAIN, min_size=1) | st.dictionaries(st.text(), PLAIN))
def test_lists_and_dicts_of_plain_python_are_written_as_python_writes_them(cell: Any) -> None:
    # Their texts are in the keys of all that has been paid for.
    assert written(cell) == well_formed(repr(cell))
    assert written(cell, lambda row: str(row.x)) == well_formed(repr(cell))


# ---- floats


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([[0.1, 2.0]], pa.list_(pa.float32())),
        ([[0.1, 2.0]], pa.large_list(pa.float32())),
        ([[0.1, 2.0]], pa.list_(pa.float32(), 2)),
        ([{"a": 0.1}], pa.struct([("a", pa.float32())])),
        ([[("a", 0.1)]], pa.map_(pa.string(), pa.float32())),
        ([{"a": [{"b": 0.1}]}], pa.struct([("a", pa.list_(pa.struct([("b", pa.float32())])))])),
        ([0.1, None], pa.dictionary(pa.int8(), pa.float32())),
    ],
    ids=lambda value: str(value) if isinstance(value, pa.DataType) else "",
)
def test_a_float32_in_a_type_of_arrow_is_written_as_it_reads(values: list[Any], kind: pa.DataType) -> None:
    if pa.types.is_dictionary(kind):
        array = pa.array(values, kind.value_type).dictionary_encode()
    else:
        array = pa.array(values, kind)
    (text, *_) = texts(pd.DataFrame({"x": pd.Series(array, dtype=pd.ArrowDtype(array.type))}), "{x}")
    assert text == str(values[0]).replace("(", "[").replace(")", "]")


@pytest.mark.parametrize("value", [0.1, 1.0, 1e16, 1e-5, 123456.79, float("inf"), -0.0, 1e20, 65504.0])
def test_the_text_of_a_float_does_not_hang_on_numpys_print_options(value: float) -> None:
    cells = [np.float64(value), np.array([value]), [np.float32(value)], np.float32(value)]
    frame = pd.DataFrame({"x": pd.Series(cells, dtype=object)})
    frame["y"] = np.full(len(cells), value, "float32")
    before = texts(frame, "{x} {y}")
    assert before[0] == f"{value} {value}"
    with np.printoptions(legacy="1.13"):  # type: ignore[arg-type,unused-ignore]
        assert texts(frame, "{x} {y}") == before


@pytest.mark.parametrize("dtype", ["Float64", pd.ArrowDtype(pa.float64()), pd.ArrowDtype(pa.float32())])
def test_a_nan_beside_the_missing_values_of_a_column_is_missing(dtype: Any) -> None:
    zeros = pd.Series([0.0, 1.0, None], dtype=dtype)
    frame = pd.DataFrame({"x": zeros / zeros})
    missing = "missing value in column 'x'"
    assert texts(frame, "{x}") == [missing, "1.0", missing]


# ---- bytes


@pytest.mark.parametrize("cell", ["café".encode(), bytearray("café".encode()), memoryview("café".encode())])
@pytest.mark.parametrize("prompt", ["x", "{x}", "{x:}"])
def test_bytes_are_written_as_the_text_they_hold(cell: Any, prompt: str) -> None:
    assert written(cell, prompt) == "café"


def test_bytes_take_a_format_spec_and_stand_in_lists_as_text() -> None:
    assert written(b"ab", "{x:>4}") == "  ab"
    assert written([b"ab", {"a": b"c"}]) == "['ab', {'a': 'c'}]"


def test_a_binary_column_of_parquet_is_written_as_text(tmp_path: Path) -> None:
    pd.DataFrame({"x": ["café".encode(), None]}).to_parquet(tmp_path / "x.parquet")
    for read in (
        pd.read_parquet(tmp_path / "x.parquet"),
        pd.read_parquet(tmp_path / "x.parquet", dtype_backend="pyarrow"),
    ):
        assert texts(read, "{x}") == ["café", "missing value in column 'x'"]


@pytest.mark.parametrize(
    ("cell", "prompt"), [(b"\xff\xd8", "x"), (b"\xff\xd8", "{x}"), (b"\xff\xd8", "{x:>4}"), ([b"\xff\xd8"], "{x}")]
)
def test_bytes_that_are_no_text_are_refused_with_their_row(cell: Any, prompt: str) -> None:
    with pytest.raises(TemplateError, match=r"row 0 \(label 0\): column 'x' holds .*not UTF-8 text; decode them first"):
        written(cell, prompt)


def test_a_function_is_given_bytes_as_they_are() -> None:
    assert written(b"\xff", lambda row: row.x.hex()) == "ff"


# ---- endless


def endless() -> list[Any]:
    cell: list[Any] = []
    cell.append(cell)
    return cell


def deep() -> list[Any]:
    cell: list[Any] = []
    for _ in range(3000):
        cell = [cell]
    return cell


@pytest.mark.parametrize("cell", [endless, deep])
@pytest.mark.parametrize("prompt", ["x", "{x}", lambda row: f"{row.x}", jinja2.Template("{{ x }}")])
def test_a_cell_that_holds_itself_or_is_nested_too_deep_is_named_with_its_row(cell: Any, prompt: Any) -> None:
    with pytest.raises(TemplateError, match=r"row 0 \(label 0\): .*nested too deep"):
        written(cell(), prompt)


@pytest.mark.parametrize("cell", [endless, deep])
def test_a_cell_without_an_end_is_no_error_where_it_is_not_written(cell: Any) -> None:
    frame = column(cell()).assign(y="a")
    assert texts(frame, "{y}") == texts(frame, lambda row: row.y) == ["a"]
