"""Results: completions as columns whose types never depend on the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.results import (
    DETAILS,
    PAID,
    STATUSES,
    SUFFIXES,
    Completion,
    Usage,
    column_names,
    text_dtype,
    twin,
    typed,
)

PANDAS_3 = int(pd.__version__.split(".")[0]) >= 3
ANSWERED = Completion(
    text="yes",
    status="ok",
    prompt_tokens=5,
    completion_tokens=2,
    cached_tokens=1,
    reasoning_tokens=1,
    cost_usd=0.25,
    latency_s=0.5,
    attempts=3,
    finish_reason="stop",
    model="m",
    source="request",
    request_id="r",
)


def test_text_is_pandas_own_string_type() -> None:
    assert text_dtype() == ("str" if PANDAS_3 else pd.StringDtype("pyarrow"))
    assert str(typed(["a"], text_dtype()).dtype) == ("str" if PANDAS_3 else "string")


def test_the_columns_have_their_names_and_their_order() -> None:
    assert column_names("a", details=False) == ("a", "a_status", "a_error", "a_prompt_tokens", "a_completion_tokens")
    assert column_names("a", details=True) == (*column_names("a", details=False), *(f"a{name}" for name in DETAILS))


@settings(deadline=None)
@given(st.lists(st.none() | st.lists(st.none() | st.text(), max_size=3), max_size=4))
def test_an_object_column_holds_lists_as_they_are(cells: list[Any]) -> None:
    made = typed(cells, object)
    assert made.shape == (len(cells),)
    assert made.dtype == object
    assert made.tolist() == cells


@pytest.mark.parametrize("labels", [["b", "a"], [2, 1]])
@pytest.mark.parametrize("places", [[], [None, None], [0, None, 1, 0]])
def test_a_column_of_labels_has_all_of_them_in_their_order(labels: list[Any], places: list[int | None]) -> None:
    cells = [None if place is None else labels[place] for place in places]
    made = typed(cells, pd.CategoricalDtype(labels))
    assert made.categories.tolist() == labels
    assert [None if pd.isna(cell) else cell for cell in made.tolist()] == cells


def test_every_suffix_is_a_field_of_a_completion() -> None:
    assert all(hasattr(ANSWERED, suffix[1:]) for suffix in (*SUFFIXES, *DETAILS))


def test_a_twin_says_the_same_and_costs_nothing() -> None:
    other = twin(ANSWERED)
    assert (other.text, other.status, other.latency_s, other.model) == ("yes", "ok", 0.5, "m")
    assert (other.prompt_tokens, other.completion_tokens, other.cached_tokens, other.reasoning_tokens) == (0, 0, 0, 0)
    assert (other.cost_usd, other.attempts, other.source) == (0.0, 0, "duplicate")
    assert twin(Completion(status="ok", source="request")).cost_usd is None
    failed = Completion(status="failed", error="no", attempts=8)
    assert twin(failed) == Completion(status="failed", error="no", attempts=0)


def test_usage_adds_up() -> None:
    assert Usage(1, 2, 3, 4) + Usage(10, 20, 30, 40) == Usage(11, 22, 33, 44)
    assert sum([Usage(1, 2)] * 3, Usage()) == Usage(3, 6)


def test_what_was_paid_for_is_every_status_that_an_answer_can_have() -> None:
    assert set(STATUSES) - PAID == {"failed", "skipped", "pending"}
    assert np.all(
        np.diff([STATUSES.index(status) for status in ("ok", "truncated", "filtered", "refused", "invalid")]) > 0
    )
