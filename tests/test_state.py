"""State: the frame that a run gives is the one that came, with the run's columns after its own."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pandas as pd
import pytest

from tests.server import SimulatedServer

BLOCKS = 120  # from 100 on pandas calls a frame fragmented


class Measured(pd.DataFrame):
    """A subclass with something of its own to carry along."""

    _metadata = ("unit",)
    unit: str

    @property
    def _constructor(self) -> Any:
        return Measured

    def _constructor_from_mgr(self, mgr: Any, axes: Any) -> Any:
        return Measured._from_mgr(mgr, axes)


def ask(server: SimulatedServer, frame: pd.DataFrame, **keywords: Any) -> pd.DataFrame:
    defaults = {"model": "m", "base_url": server.base_url, "progress": False}
    return frame.llm.complete("{text}", **defaults | keywords)


def test_a_frame_built_by_many_assignments_comes_back_where_warnings_are_errors(server: SimulatedServer) -> None:
    frame = pd.DataFrame({"text": ["a", "b"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.PerformanceWarning)
        for number in range(BLOCKS):
            frame[f"c{number}"] = number
    out = ask(server, frame, details=True, history="messages")
    assert out["response"].tolist() == ["echo: a", "echo: b"]
    assert list(out.columns[: BLOCKS + 2]) == [*frame.columns, "response"]
    assert out.columns[-1] == "messages"


@pytest.mark.parametrize(
    "columns",
    [
        pd.Index(["text", "n", "n"], name="which"),
        pd.Index(["text", 1, None]),
        pd.CategoricalIndex(["text", "a", "b"]),
    ],
    ids=["named and repeated", "mixed", "category"],
)
def test_the_columns_index_is_what_assigning_one_by_one_gives(server: SimulatedServer, columns: pd.Index) -> None:
    frame = pd.DataFrame([["a", 1, 2.5]]).set_axis(columns, axis=1)
    by_hand = frame.copy()
    out = ask(server, frame)
    for name in out.columns[3:]:
        by_hand[name] = out[name]
    pd.testing.assert_frame_equal(out, by_hand)
    assert out.columns.names == columns.names


def test_attrs_flags_and_a_subclass_with_its_metadata_come_back(server: SimulatedServer) -> None:
    frame = Measured({"text": ["a", "b"]}).set_flags(allows_duplicate_labels=False)
    frame.attrs["from"] = {"file": "a.csv"}
    frame.unit = "kg"
    out = ask(server, frame)
    assert isinstance(out, Measured)
    assert (out.unit, out.attrs) == ("kg", {"from": {"file": "a.csv"}})
    assert not out.flags.allows_duplicate_labels


def test_what_a_column_keeps_goes_with_the_new_values_though_a_file_gave_it_another_type(
    server: SimulatedServer,
) -> None:
    properties = {"sure": {"type": "boolean"}, "n": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["sure", "n"]}
    first = ask(server, pd.DataFrame({"text": ["a", "[[status=400]]", "c"]}), schema=schema)
    read = pd.read_json(io.StringIO(first.to_json(orient="records")), orient="records")
    read["response_n"] = read["response_n"].where([False] * 3).astype("datetime64[ns]")  # what is all null may be any
    assert read["response_sure"].dtype == "float64"  # 1.0 and a null
    second = ask(server, read.assign(text=["a", "b", "c"]), schema=schema, where=[False, True, False])
    assert second["response_sure"].dtype == "boolean"
    kept = ["response", "response_sure", "response_status"]
    pd.testing.assert_frame_equal(second.loc[[0, 2], kept], first.loc[[0, 2], kept])
    assert second["response_n"].isna().tolist() == [True, False, True]
