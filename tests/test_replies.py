"""Replies: either API's JSON in one form; and whole calls of the Responses API, tools and thinking models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmframe
from llmframe.errors import ConfigurationError
from llmframe.replies import read_choices, read_output, read_usage, without_thinking
from llmframe.responses import as_input
from tests.server import SimulatedServer


def call(server: SimulatedServer, texts: list[str], **keywords: Any) -> pd.DataFrame:
    defaults = {"model": "m", "base_url": server.base_url, "progress": False, "details": True}
    return pd.DataFrame({"text": texts}).llm.complete("{text}", **defaults | keywords)


# ---- thinking


@pytest.mark.parametrize(
    ("text", "answer", "thought"),
    [
        ("<think>a</think>b", "b", "a"),
        ("\n<think>\na\n\n</think>\n\nb\n", "b\n", "a"),
        ("<think>\n\n</think>\n\nb", "b", None),
        ("<think>never ended", None, "never ended"),
        ("a\n</think>\n\nb", "b", "a"),
        ("<think>a</think>b</think>c", "b</think>c", "a"),
        ("The tags <think> and </think> are inline.", "The tags <think> and </think> are inline.", None),
        ("Close it with </think>.", "Close it with </think>.", None),
    ],
)
def test_what_a_model_thinks_is_parted_from_what_it_says(text: str, answer: str | None, thought: str | None) -> None:
    assert without_thinking(text) == (answer, thought)


@pytest.mark.parametrize("by", ["reasoning_content", "reasoning", "think"])
def test_thinking_is_in_its_own_column_and_never_in_the_answer(
    server: SimulatedServer, tmp_path: Path, by: str
) -> None:
    server.configure(reasoning="It is short.", reasoning_by=by, reasoning_tokens=3)
    for source in ("request", "checkpoint"):
        out = call(server, ["a"], checkpoint=tmp_path)
        assert out["response"].tolist() == ["echo: a"]
        assert out["response_reasoning"].tolist() == ["It is short."]
        assert out["response_reasoning_tokens"].tolist() == [3]
        assert out["response_source"].tolist() == [source]


def test_a_schema_reads_the_answer_after_the_thinking(server: SimulatedServer) -> None:
    server.configure(reasoning="good or bad?", reasoning_by="think")
    out = call(server, ["a"], schema=["good", "bad"])
    assert out["response_status"].tolist() == ["ok"]
    assert out["response_attempts"].tolist() == [1]


# ---- tools

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_calls_of_tools_come_back_as_json(server: SimulatedServer, tmp_path: Path, api: str) -> None:
    for _ in range(2):
        out = call(server, ["a [[tool_calls]]", "b"], tools=[TOOL], tool_choice="auto", api=api, checkpoint=tmp_path)
        assert out["response_status"].tolist() == ["ok", "ok"]
        calls = json.loads(out["response_tool_calls"][0])
        assert [(one["id"], one["function"]["name"]) for one in calls] == [("call_0", "look_up")]
        assert out["response_tool_calls"].isna().tolist() == [False, True]
        assert out["response"].isna().tolist() == [True, False]
    assert server.stats().answered == 2
    assert server.requests()[0].body["tools"] == [TOOL]


# ---- the Responses API


def test_both_apis_give_the_same_columns(server: SimulatedServer) -> None:
    server.configure(cached_tokens=1, reasoning_tokens=2, reasoning="Hm.")
    texts = ["a", "[[refusal=no]]", "[[say=It was]][[finish=length]]", "[[finish=content_filter]]", "[[status=400]]"]
    chat, responses = (call(server, texts, api=api, prices={"input": 1, "output": 2}) for api in ("chat", "responses"))
    differ = [f"response_{name}" for name in ("latency_s", "finish_reason", "request_id")]
    pd.testing.assert_frame_equal(chat.drop(columns=differ), responses.drop(columns=differ))
    assert responses["response_status"].tolist() == ["ok", "refused", "truncated", "filtered", "failed"]
    assert responses["response_finish_reason"].tolist()[:4] == [
        "completed",
        "completed",
        "max_output_tokens",
        "content_filter",
    ]


def test_the_system_prompt_is_the_instructions(server: SimulatedServer) -> None:
    examples = [("1", "one")]
    call(server, ["2"], api="responses", system="Count.", examples=examples, max_output_tokens=9, temperature=0)
    (request,) = server.requests()
    assert request.target == "/v1/responses"
    assert request.body == {
        "model": "m",
        "instructions": "Count.",
        "input": [
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "2"},
        ],
        "max_output_tokens": 9,
        "temperature": 0,
    }


def test_instructions_of_the_users_own_are_not_overwritten(server: SimulatedServer) -> None:
    call(server, ["2"], api="responses", system="Count.", instructions="Be brief.")
    body = server.requests()[0].body
    assert body["instructions"] == "Be brief."
    assert body["input"] == [{"role": "system", "content": "Count."}, {"role": "user", "content": "2"}]


def test_a_schema_is_the_text_format_and_keeps_the_users_verbosity(server: SimulatedServer) -> None:
    out = call(server, ["a"], api="responses", schema=["good", "bad"], text={"verbosity": "low"})
    assert out["response_status"].tolist() == ["ok"]
    text = server.requests()[0].body["text"]
    assert (text["verbosity"], text["format"]["type"], text["format"]["strict"]) == ("low", "json_schema", True)
    assert "schema" in text["format"]


def test_messages_go_under_this_apis_names() -> None:
    tool_call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Look"}, image]},
        {"role": "assistant", "content": None, "tool_calls": [tool_call]},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
    ]
    assert as_input(messages) == (
        None,
        [
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "Look"},
                    {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "auto"},
                ],
            },
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "4"},
        ],
    )


def test_a_call_of_a_custom_tool_is_one_like_any_other_and_goes_back_as_it_came() -> None:
    item = {"type": "custom_tool_call", "id": "ctc_1", "call_id": "c1", "name": "run", "input": "x = 1"}
    (said,) = read_output({"status": "completed", "output": [item]}) or ()
    (one,) = said.calls
    assert one == {"id": "c1", "type": "custom", "custom": {"name": "run", "input": "x = 1"}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [one]}]
    output = {"role": "tool", "tool_call_id": "c1", "content": "1"}
    assert as_input([*turns, output])[1] == [
        {"type": "custom_tool_call", "call_id": "c1", "name": "run", "input": "x = 1"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "1"},
    ]


@pytest.mark.parametrize("status", ["completed", None])
def test_an_empty_reply_is_no_answer_so_that_it_is_asked_again(status: str | None) -> None:
    assert read_output({"status": status, "output": [], "usage": {"input_tokens": 3, "output_tokens": 9}}) is None


@pytest.mark.parametrize("name", ["n", "background"])
def test_what_the_responses_api_cannot_give_is_refused_before_asking(server: SimulatedServer, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"leave .*{name}="):
        call(server, ["a"], api="responses", **{name: 2})
    assert server.stats().received == 0


def test_an_error_in_a_200_of_the_responses_api_is_tried_again(server: SimulatedServer) -> None:
    server.configure(p_error_in_200=0.5)
    out = call(server, list("abcdefgh"), api="responses")
    assert out["response"].tolist() == [f"echo: {text}" for text in "abcdefgh"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "content", "summary", "message", "refusal"]), inner)
    ),
    max_leaves=10,
)


@given(st.fixed_dictionaries({"output": ANYTHING, "status": st.sampled_from(["completed", "incomplete", 5])}))
def test_no_reply_is_an_exception_from_inside(payload: Any) -> None:
    payload["choices"] = payload["output"]
    payload["usage"] = payload["output"]
    read_output(payload)
    read_choices(payload)
    read_usage(payload)


# ---- several, and lists


def test_n_gives_a_list_of_answers_a_row(server: SimulatedServer, tmp_path: Path) -> None:
    for _ in range(2):
        out = call(server, ["a", "b"], n=3, temperature=1, checkpoint=tmp_path)
        assert out["response"].tolist()[0] == ["echo: a", "echo: a (2)", "echo: a (3)"]
        assert out["response_status"].tolist() == ["ok", "ok"]
    assert server.stats().answered == 2


def test_without_dedupe_each_duplicate_has_an_answer_of_its_own(server: SimulatedServer) -> None:
    call(server, ["a", "a", "a"], dedupe=False, temperature=1)
    assert server.stats().answered == 3


class Review(pydantic.BaseModel):
    stars: int


def test_a_list_call_gives_the_models_own_objects(server: SimulatedServer) -> None:
    (one,) = llmframe.complete(
        [[{"role": "user", "content": "a"}]], model="m", base_url=server.base_url, schema=Review, progress=False
    )
    assert one.parsed == Review(stars=1)
