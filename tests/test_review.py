"""The review of answers: what it shows of a row, and that nothing of a row or an answer acts in it."""

from __future__ import annotations

import pandas as pd
import pytest

import llmframe
from llmframe.errors import ConfigurationError
from tests.server import SimulatedServer

EVIL = "<img src=x onerror=alert(1)>"


def answered(server: SimulatedServer, texts: list[str | None]) -> pd.DataFrame:
    frame = pd.DataFrame({"text": texts}, index=[7] * len(texts))
    return frame.llm.complete("Say: {text}", model="m", base_url=server.base_url, progress=False)


def test_a_row_is_shown_as_it_was_sent_beside_its_answer_and_status(server: SimulatedServer) -> None:
    out = answered(server, ["[[echo=hello]] now"])
    page = out.llm.review("response", "Say: {text}", system="You talk.")._repr_html_()
    for part in ("system: You talk.\n\nuser: Say: [[echo=hello]] now", out.response.iloc[0], ">ok<"):
        assert part in page


def test_without_a_prompt_the_columns_are_shown(server: SimulatedServer) -> None:
    assert answered(server, ["good"]).llm.review().rows[0].sent == "text: good"


def test_an_error_is_shown_where_there_is_no_answer(server: SimulatedServer) -> None:
    out = answered(server, ["[[status=400]]"])
    (row,) = out.llm.review().rows
    assert (row.answer, row.status, row.error) == (None, "failed", out.response_error.iloc[0])


def test_text_of_rows_and_models_is_escaped() -> None:
    frame = pd.DataFrame(
        {"text": [EVIL], "response": [EVIL], "response_status": ["ok"], "response_error": [EVIL]}, index=[EVIL]
    )
    page = frame.llm.review()._repr_html_()
    assert "<img" not in page
    assert page.count("&lt;img") == 4


def test_the_sample_is_in_order_and_another_seed_gives_another() -> None:
    frame = pd.DataFrame({"text": range(500), "response": "a"})
    taken = [row.label for row in frame.llm.review().rows]
    assert len(taken) == 20
    assert taken == sorted(taken, key=int)
    assert taken == [row.label for row in frame.llm.review().rows]
    assert taken != [row.label for row in frame.llm.review(seed=1).rows]


def test_rows_that_were_not_asked_are_left_out(server: SimulatedServer) -> None:
    shown = answered(server, ["a", None]).llm.review()
    assert (shown.of, len(shown.rows)) == (1, 1)


def test_the_properties_of_an_object_are_part_of_the_answer() -> None:
    frame = pd.DataFrame({"form": ['{"n": 1}'], "form_n": [1], "form_status": ["ok"], "form_prompt_tokens": [3]})
    assert frame.llm.review("form").rows[0].answer == '{"n": 1}\n\nform_n: 1'


def test_columns_of_one_name_are_shown_each(server: SimulatedServer) -> None:
    out = pd.DataFrame([["good", 1, 2]], columns=["text", "n", "n"]).llm.complete(
        "Say: {text}", model="m", base_url=server.base_url, progress=False
    )
    assert out.llm.review().rows[0].sent == "text: good\nn: 1\nn: 2"
    twice = pd.concat([out, out[["response_status"]]], axis=1)
    with pytest.raises(ConfigurationError, match="more than one column 'response_status'"):
        twice.llm.review()


def test_an_embedding_or_a_long_text_does_not_make_the_page_heavy() -> None:
    frame = pd.DataFrame({"text": ["x" * 1_000_000], "response": [[1.0] * 100_000]})
    assert len(frame.llm.review()._repr_html_()) < 10_000


def test_a_mistyped_column_is_named_with_the_one_that_was_meant() -> None:
    frame = pd.DataFrame({"response": ["a"]})
    with pytest.raises(ConfigurationError, match="no column 'respons'; did you mean 'response'"):
        frame.llm.review("respons")
    with pytest.raises(ConfigurationError, match="rows=0"):
        frame.llm.review(rows=0)
    with pytest.raises(ConfigurationError, match="system="):
        frame.llm.review(system="You talk.")


def test_an_empty_frame_has_a_review_too() -> None:
    assert repr(llmframe.LLMFrame(pd.DataFrame({"response": []})).review()) == "<Review: 0 of 0 rows>"
