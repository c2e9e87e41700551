"""Answers: whatever a server sends becomes a status and an error, and never an exception from inside."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.answers import read_reply
from llmframe.outcomes import Outcomes
from llmframe.prices import Prices
from llmframe.replies import read_choices, read_json, read_usage
from llmframe.results import PAID, Completion, Usage, column_dtype, text_dtype, typed
from llmframe.schemas import Labels

LABELS = Labels(("positive", "negative"))
PRICE = Prices(1.0, 2.0, 0.5)
CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def read(payload: Any, schema: Labels | None = None, several: bool = False) -> Completion | None:
    return read_reply(
        payload, schema=schema, price=PRICE, latency_s=0.5, attempts=2, request_id="req_1", several=several
    )


def answer(*messages: Any, finish: Any = "stop", schema: Labels | None = None, **top: Any) -> Completion:
    choices = [{"index": n, "message": message, "finish_reason": finish} for n, message in enumerate(messages)]
    completion = read({"choices": choices, **top}, schema, several=len(choices) > 1)
    assert completion is not None
    return completion


def say(text: Any, finish: Any = "stop", schema: Labels | None = None, **top: Any) -> Completion:
    return answer({"role": "assistant", "content": text}, finish=finish, schema=schema, **top)


# ---- one answer


def test_an_answer_comes_with_all_that_the_reply_says_of_it() -> None:
    usage = {
        "prompt_tokens": 1000,
        "completion_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 400},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    assert say("Yes.", usage=usage, model="gpt-4o-mini-2024") == Completion(
        text="Yes.",
        status="ok",
        error=None,
        prompt_tokens=1000,
        completion_tokens=10,
        parsed=None,
        cached_tokens=400,
        reasoning_tokens=3,
        cost_usd=(600 * 1.0 + 400 * 0.5 + 10 * 2.0) / 1e6,
        latency_s=0.5,
        attempts=2,
        finish_reason="stop",
        model="gpt-4o-mini-2024",
        source="request",
        request_id="req_1",
    )


@pytest.mark.parametrize(
    ("message", "finish", "text", "status", "error"),
    [
        ({"content": "Yes"}, "stop", "Yes", "ok", None),
        ({"content": ""}, "stop", "", "ok", None),
        ({"content": "Yes"}, None, "Yes", "ok", None),
        (
            {"content": "Ye"},
            "length",
            "Ye",
            "truncated",
            "the answer was cut at the token limit (finish_reason length)",
        ),
        ({"content": None}, "length", None, "truncated", "the token limit was reached before any text"),
        ({"content": "half"}, "content_filter", None, "filtered", "the endpoint's content filter withheld the answer"),
        ({"content": None}, "content_filter", None, "filtered", "content filter"),
        ({"content": "half"}, "content_filter: SAFETY", None, "filtered", "content filter"),  # Gemini
        ({"content": "half"}, "SAFETY", None, "filtered", "content filter"),
        ({"content": "Ye"}, "max_tokens", "Ye", "truncated", "cut at the token limit"),
        ({"content": "Ye"}, "MAX_TOKENS", "Ye", "truncated", "cut at the token limit"),
        ({"content": "Ye"}, "model_length", "Ye", "truncated", "cut at the token limit"),  # Mistral
        ({"content": "Yes"}, "eos_token", "Yes", "ok", None),
        ({"content": None, "refusal": "I cannot."}, "stop", None, "refused", "the model refused: I cannot."),
        ({"content": "Yes", "refusal": ""}, "stop", "Yes", "ok", None),
        (
            {"content": None, "tool_calls": CALLS},
            "tool_calls",
            None,
            "ok",
            None,
        ),
        ({"content": "Yes", "tool_calls": CALLS}, "tool_calls", "Yes", "ok", None),
        ({"content": None}, "stop", None, "invalid", "the answer holds no text"),
        ({"content": None, "tool_calls": [None]}, "stop", None, "invalid", "the answer holds no text"),
        ({"content": 5}, "stop", None, "invalid", "the answer holds no text"),
        ({"content": {"text": "Yes"}}, "stop", None, "invalid", "the answer holds no text"),
        ({}, "stop", None, "invalid", "the answer holds no text"),
        (None, "stop", None, "invalid", "the answer holds no text"),
        ("Yes", "stop", None, "invalid", "the answer holds no text"),
        ({"content": []}, "stop", None, "invalid", "the answer holds no text"),
        ({"content": [{"type": "text", "text": "Ye"}, {"type": "text", "text": "s"}]}, "stop", "Yes", "ok", None),
        ({"content": [{"type": "thinking", "thinking": []}, 5, {"text": "Yes"}]}, "stop", "Yes", "ok", None),
        ({"content": [{"type": "image", "text": None}]}, "stop", None, "invalid", "the answer holds no text"),
        ({"content": "a\ud800b"}, "stop", "a\ufffdb", "ok", None),
        ({"content": None, "refusal": "no \udfff"}, "stop", None, "refused", "the model refused: no \ufffd"),
    ],
)
def test_the_status_says_what_became_of_the_answer(
    message: Any, finish: str | None, text: str | None, status: str, error: str | None
) -> None:
    made = answer(message, finish=finish)
    assert (made.text, made.status) == (text, status)
    assert (error or "") in (made.error or "")
    assert (made.error is None) == (error is None) == (status == "ok")


@pytest.mark.parametrize(
    ("content", "finish", "status", "error"),
    [
        ('{"label": "positive"}', "stop", "ok", None),
        ("negative", "stop", "ok", None),
        ("Positive", "stop", "invalid", "the answer 'Positive' is none of the labels 'positive', 'negative'"),
        ('{"label": "posi', "length", "truncated", """the answer was cut at the token limit: '{"label": "posi'"""),
        ("positive", "length", "truncated", "the answer was cut at the token limit: 'positive'"),
        (None, "stop", "invalid", "the answer holds no text"),
        ("positive", "content_filter", "filtered", "content filter"),
    ],
)
def test_a_label_that_does_not_fit_or_was_cut_is_null_and_quoted(
    content: Any, finish: str, status: str, error: str | None
) -> None:
    made = say(content, finish=finish, schema=LABELS)
    assert made.status == status
    assert (error or "") in (made.error or "")
    assert (made.error is None) == (error is None)
    assert (made.parsed is None) == (made.text is None) == (status != "ok")


def test_a_quoted_answer_is_cut_short() -> None:
    assert len(say("x" * 10_000, schema=LABELS).error or "") < 500
    assert len(say("x" * 10_000, schema=LABELS, finish="length").error or "") < 500
    assert len(answer({"refusal": "x" * 10_000}).error or "") < 500


# ---- several answers


def test_several_answers_are_a_list_with_the_worst_of_their_statuses() -> None:
    good, cut = {"content": "Yes"}, {"content": None}
    assert (answer(good, good, good).text, answer(good, good, good).status) == (["Yes"] * 3, "ok")
    made = answer(good, cut, {"refusal": "no"}, good)
    assert made.text == ["Yes", None, None, "Yes"]
    assert (made.status, made.error) == ("invalid", "the answer holds no text")
    labelled = answer({"content": "positive"}, {"content": "no"}, schema=LABELS)
    assert (labelled.parsed, labelled.status) == (["positive", None], "invalid")


def test_whether_the_answer_is_a_list_is_for_the_call_to_say_and_not_for_the_server() -> None:
    one = {"choices": [{"message": {"content": "a"}}]}
    two = {"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]}
    texts = [made.text for made in (read(one, several=True), read(two, several=False)) if made is not None]
    assert texts == [["a"], "a"]


# ---- no answer at all


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"choices": []},
        {"choices": None},
        {"choices": {}},
        {"choices": "Yes"},
        {"choices": [None]},
        {"choices": ["Yes"]},
        [],
        None,
        "Yes",
        5,
    ],
)
def test_a_reply_without_choices_holds_no_answer(payload: Any) -> None:
    assert read(payload) is None


# ---- usage


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2}, Usage(5, 2)),
        ({"prompt_tokens": "5", "completion_tokens": "2"}, Usage(5, 2)),
        ({"prompt_tokens": 5.0, "completion_tokens": None}, Usage(5, 0)),
        ({"completion_tokens": 2}, Usage(0, 2)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}, Usage(5, 2)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": "many"}, Usage(5, 2)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": float("nan")}, Usage(5, 2)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": -9}, Usage(5, 2)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 0}, Usage(5, 2)),
        ({"completion_tokens": 2, "total_tokens": 9}, Usage(0, 2)),
        ({"prompt_tokens": 5, "total_tokens": 5}, Usage(5)),
        ({"prompt_tokens": 5, "prompt_tokens_details": None, "completion_tokens_details": []}, Usage(5)),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 9}}, Usage(5, 0, 5)),
        ({"prompt_tokens": -5, "completion_tokens": True}, None),
        ({"prompt_tokens": float("nan"), "completion_tokens": float("inf")}, None),
        ({"prompt_tokens": 2**60, "completion_tokens": "many"}, None),
        ({}, None),
        (None, None),
        ([1], None),
        ("5", None),
    ],
)
def test_usage_is_read_as_far_as_it_can_be(usage: Any, read: Usage | None) -> None:
    assert read_usage({"usage": usage}) == read


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 315}, Usage(10, 305)),  # Gemini
        ({"prompt_tokens": 10, "total_tokens": "410"}, Usage(10, 400)),  # Gemini, cut while it thought
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "total_tokens": 315.0,
                "completion_tokens_details": {"reasoning_tokens": 300},
            },
            Usage(10, 305, 0, 300),
        ),  # xAI
        ({"input_tokens": 10, "output_tokens": 5, "total_tokens": 315}, Usage(10, 305)),
    ],
)
def test_thoughts_that_are_in_the_total_alone_are_counted_as_completion(usage: Any, read: Usage) -> None:
    assert read_usage({"usage": usage}) == read


def test_without_usage_tokens_and_cost_are_unknown_and_not_0() -> None:
    made = say("Yes")
    assert (made.prompt_tokens, made.completion_tokens, made.cached_tokens, made.cost_usd) == (None, None, None, None)


# ---- bodies


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a": 1}', {"a": 1}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": "\\ud800"}', {"a": "\ud800"}),
        (b'{"a": "\xff"}', {"a": "\ufffd"}),
        (b'{"a": 1e300}', {"a": 1e300}),
        (b"<html>busy</html>", None),
        (b"", None),
        (b'{"a": ', None),
        (b'{"a": 1}{"b": 2}', None),
        (b"data: {}\n\n", None),
        (b"[" * 100_000, None),
        (b"1" * 10_000, None),
        (b"\x00\xff\xfe", None),
    ],
)
def test_a_body_is_json_or_none(body: bytes, value: Any) -> None:
    assert read_json(body) == value


def test_a_body_with_nan_is_read() -> None:
    assert str(read_json(b'{"usage": {"prompt_tokens": NaN}}')) == "{'usage': {'prompt_tokens': nan}}"


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_json_or_none(body: bytes) -> None:
    read_json(body)


# ---- anything


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def maybe(**known: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object as the API has it, each of its fields as it should be, or anything, or left out."""
    return st.fixed_dictionaries({}, optional={name: value | ANYTHING for name, value in known.items()}) | ANYTHING


TEXTS = st.sampled_from(["positive", '{"label": "negative"}', "a\ud800", ""])
MESSAGE = maybe(content=TEXTS | st.lists(maybe(type=TEXTS, text=TEXTS), max_size=2), refusal=TEXTS, tool_calls=ANYTHING)
CHOICE = maybe(message=MESSAGE, finish_reason=st.sampled_from(["stop", "length", "content_filter", "tool_calls"]))
USAGE = maybe(
    prompt_tokens=st.integers(0, 9), completion_tokens=ANYTHING, prompt_tokens_details=maybe(cached_tokens=ANYTHING)
)
REPLY = maybe(choices=st.lists(CHOICE, max_size=3), usage=USAGE, model=TEXTS)


@settings(deadline=None)
@given(REPLY, st.sampled_from([None, LABELS]))
def test_any_json_is_an_answer_with_a_status_or_none_and_fits_its_columns(reply: Any, schema: Labels | None) -> None:
    reply = read_json(json.dumps(reply).encode())
    for several in (True, False):
        completion = read(reply, schema, several)
        if completion is None:
            continue
        if completion.status == "failed":  # it was paid for, and holds no answer
            assert read_choices(reply) is None
            assert completion.prompt_tokens or completion.completion_tokens
            assert completion.text is None
            continue
        assert completion.status in PAID
        assert (completion.error is None) == (completion.status == "ok")
        assert isinstance(completion.text, list) == several
        answers = completion.text if isinstance(completion.text, list) else [completion.text]
        if completion.status == "ok" and completion.tool_calls is None:
            assert None not in answers
        outcomes = Outcomes(1)
        outcomes.put(0, completion)
        row = np.zeros(1, np.intp)
        held = schema.answer if schema else "text"
        for suffix, cells in outcomes.columns(row, row, {}, details=True, answer=held).items():
            answers_dtype = object if several else schema.dtype if schema else text_dtype()
            made = typed(cells, column_dtype(suffix, answers_dtype))
            assert len(made) == 1
            assert pd.isna(cells[0]) is True or several or made[0] == cells[0]
