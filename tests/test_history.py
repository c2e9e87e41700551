"""Conversations: `history=` goes on from call to call, row by row, also through parquet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import llmframe
from llmframe.errors import ConfigurationError, TemplateError
from tests.server import SimulatedServer

Ask = Callable[..., pd.DataFrame]


@pytest.fixture
def ask(server: SimulatedServer) -> Ask:
    def complete(frame: pd.DataFrame, prompt: str, **keywords: Any) -> pd.DataFrame:
        defaults = {"model": "m", "base_url": server.base_url, "progress": False, "history": "talk"}
        return frame.llm.complete(prompt, **defaults | keywords)

    return complete


def said(talk: Any) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in talk]


FIRST = [("user", "a"), ("assistant", "echo: a")]


def test_a_second_call_goes_on_with_each_rows_conversation(server: SimulatedServer, ask: Ask) -> None:
    one = ask(pd.DataFrame({"text": ["a", "b"]}), "{text}")
    assert said(one["talk"][0]) == FIRST
    two = ask(one, "And why?", output="why")
    assert said(two["talk"][0]) == [*FIRST, ("user", "And why?"), ("assistant", "echo: And why?")]
    assert said(two["talk"][1])[:2] == [("user", "b"), ("assistant", "echo: b")]
    assert said(one["talk"][0]) == FIRST
    sent = [said(request.body["messages"]) for request in server.requests()[2:]]
    assert sorted(sent) == sorted([said(talk)[:-1] for talk in two["talk"]])


def test_a_conversation_goes_on_after_parquet(ask: Ask, tmp_path: Path) -> None:
    ask(pd.DataFrame({"text": ["a", None]}), "{text}").to_parquet(tmp_path / "talk.parquet")
    back = pd.read_parquet(tmp_path / "talk.parquet")
    two = ask(back, "And why?", output="why")
    assert said(two["talk"][0]) == [*FIRST, ("user", "And why?"), ("assistant", "echo: And why?")]
    assert said(two["talk"][1]) == [("user", "And why?"), ("assistant", "echo: And why?")]


def test_system_and_examples_are_kept_and_sent_once(server: SimulatedServer, ask: Ask) -> None:
    keywords = {"system": "Be {mood}.", "examples": [("x", "y")]}
    one = ask(pd.DataFrame({"text": ["a"], "mood": ["brief"]}), "{text}", **keywords)
    start = [("system", "Be brief."), ("user", "x"), ("assistant", "y")]
    assert said(one["talk"][0]) == [*start, *FIRST]
    ask(one, "b{text}", output="b", **keywords)
    assert said(server.requests()[-1].body["messages"]) == [*start, *FIRST, ("user", "ba")]
    ask(one, "c{text}", output="c", system="Be long.")
    assert said(server.requests()[-1].body["messages"])[0] == ("system", "Be long.")


def test_a_row_without_an_answer_keeps_the_conversation_that_it_had(ask: Ask) -> None:
    frame = pd.DataFrame({"text": ["a", "[[status=400]]", None, "[[refusal=no]]"]})
    frame["talk"] = pd.Series([None, [{"role": "user", "content": "earlier"}], [], None], dtype=object)
    out = ask(frame, "{text}")
    assert said(out["talk"][0]) == FIRST
    assert said(out["talk"][1]) == [("user", "earlier")]
    assert out["talk"][2] == []
    assert out["talk"][3] is None


def test_rows_that_are_left_out_keep_theirs(ask: Ask) -> None:
    one = ask(pd.DataFrame({"text": ["a", "b"]}), "{text}")
    two = ask(one, "And why?", where=[True, False], output="why")
    assert [len(talk) for talk in two["talk"]] == [4, 2]


def test_a_resumed_conversation_pays_nothing(server: SimulatedServer, ask: Ask, tmp_path: Path) -> None:
    one = ask(pd.DataFrame({"text": ["a"]}), "{text}", checkpoint=tmp_path)
    again = ask(pd.DataFrame({"text": ["a"]}), "{text}", checkpoint=tmp_path)
    assert server.stats().answered == 1
    assert again["talk"].tolist() == one["talk"].tolist()


def test_a_call_of_tools_stays_in_the_conversation(ask: Ask) -> None:
    out = ask(pd.DataFrame({"text": ["[[tool_calls]]"]}), "{text}")
    assert out["talk"][0][-1]["tool_calls"][0]["function"]["name"] == "look_up"


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"output": "talk"}, ConfigurationError, "both 'talk'"),
        ({"history": "response_status"}, ConfigurationError, "one of the columns"),
        ({"n": 2}, ConfigurationError, "history= goes on with one"),
        ({"history": "text"}, TemplateError, "the conversation in column 'text' is a string"),
    ],
)
def test_what_cannot_be_a_conversation_is_refused_before_asking(
    server: SimulatedServer, ask: Ask, keywords: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ask(pd.DataFrame({"text": ["a"]}), "{text}", **keywords)
    assert server.stats().received == 0


def test_an_interrupted_runs_frame_has_the_conversations_so_far(server: SimulatedServer, ask: Ask) -> None:
    with pytest.raises(llmframe.RowFailed) as stopped:
        ask(pd.DataFrame({"text": ["a", "[[status=400]]"]}), "{text}", on_error="raise", max_concurrency=1)
    assert stopped.value.frame is not None
    assert said(stopped.value.frame["talk"][0]) == FIRST
    assert stopped.value.frame["talk"][1] is None
