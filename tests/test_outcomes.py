"""Outcomes: completions kept in columns come out as they went in, alone or as a frame's columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.outcomes import NOT_ASKED, NOT_SELECTED, Outcomes, by_row
from llmframe.results import DETAILS, SOURCES, STATUSES, SUFFIXES, Completion, column_dtype, text_dtype, twin, typed

COUNT = st.none() | st.integers(0, 2**53)
TEXT = st.none() | st.text()
COMPLETIONS = st.builds(
    Completion,
    text=TEXT | st.lists(TEXT, max_size=3),
    status=st.sampled_from([status for status in STATUSES if status not in ("pending", "skipped")]),
    error=TEXT,
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    parsed=TEXT | st.integers(0, 9),
    cached_tokens=COUNT,
    reasoning_tokens=COUNT,
    cost_usd=st.none() | st.floats(0, 1e6),
    latency_s=st.none() | st.floats(0, 1e6),
    attempts=st.integers(0, 99),
    finish_reason=TEXT,
    model=TEXT,
    source=st.none() | st.sampled_from(SOURCES[:2]),
    request_id=TEXT,
)


@given(st.lists(COMPLETIONS, max_size=5), st.randoms())
@settings(deadline=None)
def test_a_completion_comes_out_as_it_went_in(completions: list[Completion], chance: Any) -> None:
    outcomes = Outcomes(len(completions))
    for number in chance.sample(range(len(completions)), len(completions)):
        outcomes.put(number, completions[number])
    assert [outcomes[number] for number in range(len(outcomes))] == completions


@given(st.lists(COMPLETIONS | st.none(), max_size=4), st.data())
@settings(deadline=None)
def test_the_columns_say_of_each_row_what_its_completion_says(
    completions: list[Completion | None], data: st.DataObject
) -> None:
    count = len(completions)
    request_of = np.array(data.draw(st.lists(st.integers(-1, count - 1), min_size=count, max_size=8)), np.intp)
    first = np.array([next(iter(np.flatnonzero(request_of == number)), 0) for number in range(count)], np.intp)
    outcomes = Outcomes(count)
    for number, completion in enumerate(completions):
        if completion is not None:
            outcomes.put(number, completion)
    skipped = dict.fromkeys(np.flatnonzero(request_of < 0)[1:].tolist(), "no value")

    values = outcomes.columns(request_of, first, skipped, details=True)

    said = []
    for position, number in enumerate(request_of.tolist()):
        if number < 0:
            said.append(Completion(status="skipped", error=skipped.get(position, NOT_SELECTED)))
        else:
            own = completions[number] or Completion(status="pending", error=NOT_ASKED)
            said.append(own if first[number] == position else twin(own))
    assert values[""].tolist() == [completion.text for completion in said]
    for suffix in (*SUFFIXES, *DETAILS):
        cells = [None if cell is None or pd.isna(cell) else cell for cell in values[suffix]]
        wanted = [getattr(completion, suffix[1:]) for completion in said]
        assert cells == wanted
        assert values[suffix].dtype == column_dtype(suffix, None)


def test_types_never_depend_on_the_data() -> None:
    nothing, some = Outcomes(0), Outcomes(1)
    some.put(0, Completion(text="a", status="ok", prompt_tokens=1, cost_usd=0.5, source="request"))
    for outcomes in (nothing, some):
        rows = np.arange(len(outcomes))
        for suffix, cells in outcomes.columns(rows, rows, {}, details=True).items():
            dtype = column_dtype(suffix, text_dtype())
            assert pd.Series(typed(cells, dtype)).dtype == dtype


def test_a_labelled_column_holds_what_the_schema_read() -> None:
    outcomes = Outcomes(2)
    outcomes.put(0, Completion(text="1", parsed=1, status="ok"))
    outcomes.put(1, Completion(status="invalid", error="no"))
    rows = np.arange(2)
    assert outcomes.columns(rows, rows, {}, details=False, answer="parsed")[""].tolist() == [1, None]
    assert outcomes.columns(rows, rows, {}, details=False)[""].tolist() == ["1", None]


def test_rows_of_one_request_have_lists_and_dicts_of_their_own() -> None:
    outcomes = Outcomes(1)
    outcomes.put(0, Completion(text=["a", "b"], status="ok"))
    request_of, first = np.array([0, -1, 0]), np.array([0])
    made = outcomes.columns(request_of, first, {}, details=False)[""]
    made[0].append("c")
    assert made.tolist() == [["a", "b", "c"], None, ["a", "b"]]
    nested = by_row(np.array([{"tags": [{"name": "x"}]}, None], object), request_of, first)
    nested[2]["tags"][0]["name"] = "y"
    assert nested.tolist() == [{"tags": [{"name": "x"}]}, None, {"tags": [{"name": "y"}]}]


def test_what_has_no_outcome_is_pending() -> None:
    outcomes = Outcomes(3)
    outcomes.put(1, Completion(text="a", status="ok"))
    assert outcomes.pending().tolist() == [0, 2]
    assert outcomes[0] == Completion(status="pending", error=NOT_ASKED)
