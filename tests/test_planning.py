"""Planning: which rows a call is about, what each of them sends, and which columns may be written."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.errors import ConfigurationError, TemplateError
from llmframe.messages import user
from llmframe.options import call_options, embed_options
from llmframe.planning import Plan, check_columns, make_plan, output_dtypes, rows_of, select
from llmframe.prompts import Prompts
from llmframe.requests import Requests
from llmframe.results import STATUSES, column_names, text_dtype
from llmframe.schemas import Labels

REQUESTS = Requests("http://localhost/v1", "m", {})
FRAME = pd.DataFrame({"x": ["a", "b", "c"]}, index=[7, 7, 9])


def plan(values: list[Any], selected: Any = None, *, dedupe: bool = True, na: Any = "skip") -> Plan:
    frame = pd.DataFrame({"x": pd.Series(values, dtype=object)}).set_axis([0] * len(values))
    mask = np.ones(len(values), dtype=bool) if selected is None else np.array(selected, dtype=bool)
    return make_plan(Prompts(frame, "x", na=na), REQUESTS, mask, dedupe=dedupe)


def check(frame: pd.DataFrame, schema: Labels | None = None, **keywords: Any) -> None:
    options = call_options(**keywords)
    check_columns(frame, options, schema, select(frame, options))


# ---- where


@pytest.mark.parametrize(
    "where",
    [
        [True, False, True],
        (True, False, True),
        np.array([True, False, True]),
        np.array([True, False, True], dtype=object),
        pd.array([True, False, True], dtype="boolean"),
        pd.Index([True, False, True]),
        pd.Series([True, False, True], index=[7, 7, 9]),
        pd.Series([True, False, True], index=[7, 7, 9], dtype="boolean"),
        pd.Series([True, False, True], index=[7, 7, 9], dtype="bool[pyarrow]"),
        pd.Series([True, False, True], index=[7, 7, 9], dtype=object),
        FRAME.x != "b",
    ],
)
def test_a_boolean_mask_of_any_kind_selects_by_position(where: Any) -> None:
    selected = select(FRAME, call_options(where=where))
    assert selected.dtype == bool
    assert selected.tolist() == [True, False, True]


def test_without_where_every_row_is_meant() -> None:
    assert select(FRAME, call_options()).tolist() == [True, True, True]
    assert select(FRAME.head(0), call_options()).tolist() == []


@pytest.mark.parametrize("where", [[], np.array([]), pd.Series([], dtype=object), pd.Series([], dtype=bool), "missing"])
def test_an_empty_frame_takes_an_empty_mask(where: Any) -> None:
    frame = FRAME.reset_index(drop=True).head(0)
    where = where.set_axis(frame.index) if isinstance(where, pd.Series) else where
    assert select(frame, call_options(where=where)).dtype == bool


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ([True, False], "has 2 values for 3 rows"),
        ([], "has 0 values for 3 rows"),
        (np.ones(4, dtype=bool), "has 4 values for 3 rows"),
        (pd.Series([True, False, True]), r"another index than the frame; .* where=mask\.to_numpy\(\)"),
        (pd.Series([True, False, True], index=[7, 9, 7]), "another index"),
        ([True, None, False], r"has 1 nulls; fill them with \.fillna\(False\)"),
        (pd.array([True, None, None], dtype="boolean"), "has 2 nulls"),
        ([1, 0, 1], "values of type int64; it has to be a boolean mask"),
        (["yes", "no", "yes"], "it has to be a boolean mask"),
        ([True, 0, "x"], "it has to be a boolean mask"),
        ("misssing", "where='misssing' is not known; it is 'missing' or a boolean mask"),
        (True, "where= is of type bool; it has to be 'missing' or a boolean mask, one value a row"),
        (5, "where= is of type int"),
        (FRAME == "b", "where= is of type DataFrame"),
        (np.ones((3, 1), dtype=bool), "where= is of type ndarray"),
        (np.zeros(3, dtype=[("x", bool)]), "where= is of type ndarray"),
        (lambda frame: frame.x == "a", "where= is of type function"),
        ({7: True}, "where= is of type dict"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(where: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        select(FRAME, call_options(where=where))


def test_missing_selects_the_rows_without_an_answer() -> None:
    frame = FRAME.assign(response=pd.Series(["yes", None, ""], index=FRAME.index))
    assert select(frame, call_options(where="missing")).tolist() == [False, True, False]
    assert select(frame.assign(response=[["a"], None, [None]]), call_options(where="missing")).tolist() == [
        False,
        True,
        False,
    ]
    assert select(FRAME, call_options(where="missing")).tolist() == [True, True, True]
    assert select(frame, call_options(where="missing", output="other")).tolist() == [True, True, True]


@pytest.mark.parametrize("dtype", ["object", "category", "string", "str"])
def test_a_row_that_is_ok_is_not_missing_though_it_holds_no_text(dtype: str) -> None:
    statuses = pd.Series(["ok", "refused", None], index=FRAME.index).astype(dtype)
    frame = FRAME.assign(response=pd.Series(None, FRAME.index, object), response_status=statuses)
    assert select(frame, call_options(where="missing")).tolist() == [False, True, True]


# ---- columns in the way


@pytest.mark.parametrize("name", column_names("response", details=False))
def test_a_column_in_the_way_is_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"has a column '{name}' already; pass where='missing'.*or output="):
        check(FRAME.assign(**{name: "x"}))
    check(FRAME.assign(**{name: "x"}), output="answer")


def test_a_detail_column_is_in_the_way_only_where_details_are_written() -> None:
    frame = FRAME.assign(response_source="x", response_length=3)
    check(frame)
    with pytest.raises(ConfigurationError, match="'response_source'"):
        check(frame, details=True)


@pytest.mark.parametrize(
    ("name", "kept", "schema"),
    [
        ("response", [1, 2, 3], None),
        ("response", ["positive", 5, "negative"], None),
        ("response", ["positive", "neutral", "negative"], Labels(("positive", "negative"))),
        ("response", [["a"], ["b"], ["c"]], Labels(("positive", "negative"))),
        ("response", ["1", "2", "1"], Labels((1, 2))),
        ("response_status", ["ok", "done", "ok"], None),
        ("response_error", [1.5, 2.5, 3.5], None),
        ("response_prompt_tokens", ["5", "6", "7"], None),
        ("response_prompt_tokens", [1.5, 2.5, 3.5], None),
        ("response_prompt_tokens", ["many", "few", "none"], None),
    ],
)
def test_what_a_column_cannot_keep_as_it_is_stops_the_call(name: str, kept: list[Any], schema: Labels | None) -> None:
    with pytest.raises(
        ConfigurationError, match=f"column '{name}' holds values of type .*, which a column of .* output="
    ):
        check(FRAME.assign(**{name: kept}), schema, where=[True, False, True])
    check(FRAME.assign(**{name: kept}), schema, where=[True, True, True])  # every one is written anew


@pytest.mark.parametrize(
    ("name", "kept", "schema"),
    [
        ("response", ["yes", None, "no"], None),
        ("response", pd.Categorical(["a", None, "a"]), None),
        ("response", pd.Categorical(["b", None, "a"], categories=["b", "a", "old"]), Labels(("a", "b", "new"))),
        ("response", [1.0, None, 2.0], Labels((1, 2))),
        ("response_status", ["ok", None, "failed"], None),
        ("response_prompt_tokens", [5.0, np.nan, 6.0], None),
        ("response_completion_tokens", [1, 2, 3], None),
    ],
)
def test_what_a_column_can_keep_is_let_in(name: str, kept: Any, schema: Labels | None) -> None:
    check(FRAME.assign(**{name: kept}), schema, where=[True, False, False])


@pytest.mark.parametrize("kept", [["a", "b"], [], np.array([1, 2]), {"a": 1}, Decimal("1.10"), None])
def test_a_list_column_keeps_lists_and_dicts(kept: Any) -> None:
    check(FRAME.assign(response=[kept, None, 5]), where=[False, False, True], n=2)


@pytest.mark.parametrize("kept", ["['a', 'b']", 5, 1.5, np.float64(1.5), True])
def test_a_list_column_does_not_keep_the_text_or_the_number_that_csv_made_of_a_list(kept: Any) -> None:
    with pytest.raises(ConfigurationError, match="which a column of lists and dicts cannot keep; pass output="):
        check(FRAME.assign(response=pd.Series([kept, None, None], FRAME.index, object)), where="missing", n=2)


def test_vectors_of_another_length_than_those_kept_are_refused_where_it_is_known() -> None:
    frame = FRAME.assign(embedding=[np.zeros(3, np.float32), None, None])
    options = embed_options(dimensions=4, where="missing")
    with pytest.raises(ConfigurationError, match="vectors of 4 numbers do not fit beside those of 3 in column 'embed"):
        check_columns(frame, options, None, select(frame, options))
    for fits in (embed_options(dimensions=3, where="missing"), embed_options(where="missing")):
        check_columns(frame, fits, None, select(frame, fits))


def test_two_columns_of_one_name_cannot_be_filled() -> None:
    frame = pd.DataFrame([["a", "b", "c"]], columns=["x", "response", "response"])
    with pytest.raises(ConfigurationError, match="more than one column 'response'"):
        check(frame, where="missing")


def test_the_columns_and_their_types_follow_from_the_call_alone() -> None:
    text = text_dtype()
    plain = {
        "a": text,
        "a_status": pd.CategoricalDtype(list(STATUSES)),
        "a_error": text,
        "a_prompt_tokens": pd.Int64Dtype(),
        "a_completion_tokens": pd.Int64Dtype(),
    }
    details = {
        "a_cached_tokens": pd.Int64Dtype(),
        "a_reasoning_tokens": pd.Int64Dtype(),
        "a_cost_usd": pd.Float64Dtype(),
        "a_latency_s": pd.Float64Dtype(),
        "a_attempts": pd.Int64Dtype(),
        "a_finish_reason": text,
        "a_model": text,
        "a_source": pd.CategoricalDtype(["request", "checkpoint", "duplicate"]),
        "a_request_id": text,
        "a_tool_calls": text,
        "a_reasoning": text,
    }
    assert output_dtypes(call_options(output="a"), None) == plain
    made = output_dtypes(call_options(output="a", details=True), None)
    assert made == plain | details
    assert list(made) == [*plain, *details]
    labels = Labels(("b", "a"))
    assert output_dtypes(call_options(), labels)["response"] == pd.CategoricalDtype(["b", "a"])
    assert output_dtypes(call_options(n=3), None)["response"] is object
    assert output_dtypes(call_options(n=1), None)["response"] == text


# ---- the plan


VALUES = st.lists(st.sampled_from(["a", "b", "c", None]), max_size=12)


@settings(deadline=None)
@given(VALUES, st.data())
def test_a_row_sends_its_own_request_once_for_all_that_send_the_same(values: list[Any], data: st.DataObject) -> None:
    selected = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    made = plan(values, selected)
    for position, (value, chosen) in enumerate(zip(values, selected, strict=True)):
        number = made.request_of[position]
        if not chosen or value is None:
            assert number == -1
            assert (position in made.skipped) == chosen
        else:
            assert made.keys[number].tobytes() == REQUESTS.key(user(value))
            assert made.first[number] <= position
            assert values[made.first[number]] == value
    assert len(set(made.keys.tolist())) == len(made.keys) == len(made.first)
    assert [made.request_of[position] for position in made.first] == list(range(len(made.keys)))
    assert rows_of(made).tolist() == [Counter(made.request_of.tolist())[number] for number in range(len(made.keys))]


@settings(deadline=None)
@given(VALUES, st.data())
def test_without_dedupe_each_row_has_a_key_of_its_own_that_no_mask_changes(
    values: list[Any], data: st.DataObject
) -> None:
    selected = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    whole, part = plan(values, dedupe=False), plan(values, selected, dedupe=False)
    assert len(set(whole.keys.tolist())) == len(whole.keys) == sum(value is not None for value in values)
    for position, number in enumerate(part.request_of):
        if number >= 0:
            assert selected[position]
            assert part.keys[number] == whole.keys[whole.request_of[position]]
            assert part.keys[number].tobytes() == REQUESTS.key(
                user(values[position]), values[:position].count(values[position])
            )


@pytest.mark.parametrize("dedupe", [True, False])
def test_a_row_that_is_left_out_may_be_one_that_cannot_be_rendered(dedupe: bool) -> None:
    made = plan([None, "a", "a"], [False, False, True], dedupe=dedupe, na="raise")
    assert made.request_of.tolist() == [-1, -1, 0]
    assert made.skipped == {}
    with pytest.raises(TemplateError, match=r"row 0 \(label 0\)"):
        plan([None, "a"], dedupe=dedupe, na="raise")


def test_a_row_with_missing_input_says_why_it_is_skipped() -> None:
    assert plan(["a", None]).skipped == {1: "missing value in column 'x'"}
