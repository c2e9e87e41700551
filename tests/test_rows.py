"""Whole calls against a real server: row i's answer belongs to row i, and a frame comes back, whatever the frame."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmframe
from llmframe.errors import LLMFrameError, LLMFrameWarning, RowFailed
from llmframe.messages import well_formed
from llmframe.results import STATUSES, column_names, text_dtype
from tests.server import SimulatedServer, label_of

LABELS = ["positive", "negative"]
Ask = Callable[..., pd.DataFrame]
CLIENTS: dict[str, openai.AsyncOpenAI] = {}  # one for all calls: making one takes longer than a call


@pytest.fixture
def ask(server: SimulatedServer) -> Ask:
    """Call `df.llm.complete` at the simulated endpoint."""
    client = CLIENTS.setdefault(server.base_url, openai.AsyncOpenAI(base_url=server.base_url, max_retries=0))

    def complete(frame: pd.DataFrame, prompt: Any, **keywords: Any) -> pd.DataFrame:
        defaults: dict[str, Any] = {"model": "m", "progress": False}
        if "base_url" not in keywords:
            defaults["client"] = client
        return frame.llm.complete(prompt, **defaults | keywords)

    return complete


def cells(values: Any) -> list[Any]:
    """Give a column's values with every kind of missing as None."""
    return [None if pd.api.types.is_scalar(value) and pd.isna(value) else value for value in values]


# ---- row i's answer belongs to row i


TEXTS = (
    st.sampled_from(["a", "b", "", "{x}", "{{", "\ud800", "\ud83d\ude00 \U0001f600", "x" * 5000, "\x00\u2028"])
    | st.text(st.characters(), max_size=20).filter(lambda text: "[[" not in text)
    | st.sampled_from([None, float("nan"), pd.NA, pd.NaT])
    | st.integers()
)
INDEXES: dict[str, Callable[[int], pd.Index]] = {
    "range": pd.RangeIndex,
    "duplicated": lambda size: pd.Index([0, "a", 0, 0, -1.5, "a", 1][:size], dtype=object),
    "text": lambda size: pd.Index([f"r{number % 2}" for number in range(size)], name="x"),
    "dates": lambda size: pd.date_range("2024-01-01", periods=size)[::-1],
    "category": lambda size: pd.CategoricalIndex(["a"] * size),
    "missing": lambda size: pd.Index([None] * size, dtype="float64", name="response"),
    "levels": lambda size: pd.MultiIndex.from_arrays([[1] * size, ["a", None, "b", "a", "a", None, "c"][:size]]),
}
CHANGES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "whole": lambda frame: frame,
    "filtered": lambda frame: frame[frame.n > 1],
    "sampled": lambda frame: frame.sample(frac=0.7, random_state=1),
    "reversed": lambda frame: frame.iloc[::-1],
    "one row": lambda frame: frame.head(1),
    "doubled": lambda frame: pd.concat([frame, frame]),
}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(TEXTS, max_size=7),
    index=st.sampled_from(list(INDEXES)),
    change=st.sampled_from(list(CHANGES)),
    labelled=st.booleans(),
    dedupe=st.booleans(),
    details=st.booleans(),
    na=st.sampled_from(["skip", "keep"]),
    masked=st.booleans(),
    data=st.data(),
)
def test_row_is_answer_belongs_to_row_i(
    server: SimulatedServer,
    ask: Ask,
    values: list[Any],
    index: str,
    change: str,
    labelled: bool,
    dedupe: bool,
    details: bool,
    na: str,
    masked: bool,
    data: st.DataObject,
) -> None:
    whole = pd.DataFrame(
        {"x": pd.Series(values, dtype=object), "n": range(len(values)), "Response": 0, "response ": "!"}
    )
    frame = CHANGES[change](whole.set_axis(INDEXES[index](len(values)), axis=0))
    before = frame.copy(deep=True)
    size = len(frame)
    mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size)) if masked else [True] * size
    answered = server.stats().answered

    keywords = {"schema": LABELS} if labelled else {}
    where = {"where": mask} if masked else {}
    out = ask(frame, "<{x}>", dedupe=dedupe, details=details, na=na, **keywords, **where)

    pd.testing.assert_frame_equal(out[list(frame.columns)], before)
    pd.testing.assert_frame_equal(frame, before)
    assert out.index.equals(before.index)
    assert out.index.names == before.index.names
    assert list(out.columns) == [*frame.columns, *column_names("response", details)]
    sent: set[str] = set()
    rows = zip(
        cells(frame.x), mask, cells(out.response), cells(out.response_status), cells(out.response_error), strict=True
    )
    for position, (value, meant, answer, status, error) in enumerate(rows):
        tokens = cells(out.response_prompt_tokens)[position]
        if not meant or (value is None and na == "skip"):
            said = "missing value in column 'x'" if meant else "not selected"
            assert (answer, status, error, tokens) == (None, "skipped", said, None)
            continue
        text = well_formed(f"<{'' if value is None else value}>")
        assert (status, error) == ("ok", None)
        assert answer == (label_of(text, LABELS) if labelled else f"echo: {text}")
        assert (tokens == 0) == (dedupe and text in sent)
        if details:
            assert cells(out.response_source)[position] == ("duplicate" if dedupe and text in sent else "request")
        sent.add(text)
    asked = sum(
        meant and (value is not None or na == "keep") for value, meant in zip(cells(frame.x), mask, strict=True)
    )
    assert server.stats().answered - answered == (len(sent) if dedupe else asked)


def test_a_frame_without_columns_takes_a_function(ask: Ask) -> None:
    out = ask(pd.DataFrame(index=["a", "a"]), lambda _: "Hello")
    assert out.response.tolist() == ["echo: Hello"] * 2
    assert out.index.tolist() == ["a", "a"]


def test_a_very_long_text_is_answered(ask: Ask) -> None:
    text = "wörld " * 200_000
    assert ask(pd.DataFrame({"x": [text]}), "x").response.tolist() == ["echo: " + text]


def test_a_column_named_like_ours_may_be_the_prompt_under_another_output(ask: Ask) -> None:
    frame = pd.DataFrame({"response": ["a"], "response_status": ["b"], "response_response": ["c"]})
    out = ask(frame, "{response}{response_status}", output="answer")
    assert out.answer.tolist() == ["echo: ab"]
    pd.testing.assert_frame_equal(out[frame.columns.tolist()], frame)


def test_what_is_sent_is_what_messages_shows(server: SimulatedServer, ask: Ask) -> None:
    frame = pd.DataFrame({"x": pd.Series(["a", None, "c\ud800"], dtype=object)}).set_axis([1, 1, 0])
    keywords: dict[str, Any] = {"system": "Say {{x}}: {x}", "examples": [("1", "2")]}
    ask(frame, "<{x}>", max_concurrency=1, temperature=0, **keywords)
    sent = [request.body for request in server.requests()]
    assert [body["messages"] for body in sent] == frame.llm.messages("<{x}>", **keywords).dropna().tolist()
    assert [{name: body[name] for name in body if name != "messages"} for body in sent] == [
        {"model": "m", "temperature": 0}
    ] * 2


def test_message_arrays_from_a_parquet_file_are_answered_each_in_its_row(ask: Ask, tmp_path: Path) -> None:
    arrays = [[{"role": "user", "content": text}] for text in "abc"]
    arrays[1].insert(0, {"role": "system", "content": "Be brief.", "name": "me"})
    pd.DataFrame({"m": arrays}).to_parquet(tmp_path / "m.parquet")
    out = ask(pd.read_parquet(tmp_path / "m.parquet"), "m")
    assert out.response.tolist() == ["echo: a", "echo: b", "echo: c"]


def test_the_awaited_call_gives_the_same_frame(server: SimulatedServer, ask: Ask) -> None:
    frame = pd.DataFrame({"x": ["a", "b", None]}, index=[0, 0, 1])
    awaited = asyncio.run(
        frame.llm.acomplete("{x}", model="m", base_url=server.base_url, api_key="sk-test", progress=False)
    )
    pd.testing.assert_frame_equal(awaited, ask(frame, "{x}"))


# ---- types never depend on the data


@pytest.mark.parametrize("keywords", [{}, {"schema": LABELS}, {"schema": [2, 1]}, {"n": 2}])
def test_an_empty_frame_a_failed_one_a_skipped_one_and_a_full_one_have_the_same_types(
    ask: Ask, keywords: dict[str, Any]
) -> None:
    full = ask(pd.DataFrame({"x": ["a", "b"]}), "x", details=True, **keywords)
    others = [
        ask(pd.DataFrame({"x": ["a"]}).head(0), "x", details=True, **keywords),
        ask(pd.DataFrame({"x": ["[[status=400]]"]}), "x", details=True, **keywords),
        ask(pd.DataFrame({"x": ["[[refusal=no]]"]}), "x", details=True, **keywords),
        ask(pd.DataFrame({"x": [None]}, dtype=object), "x", details=True, **keywords),
        ask(pd.DataFrame({"x": ["a"]}), "x", details=True, where=[False], **keywords),
    ]
    columns = list(column_names("response", details=True))
    for other in others:
        pd.testing.assert_series_equal(other[columns].dtypes, full[columns].dtypes)
    assert full.response_status.cat.categories.tolist() == list(STATUSES)
    if "schema" in keywords:
        assert full.response.cat.categories.tolist() == keywords["schema"]


def test_the_frame_goes_through_parquet_as_it_is(ask: Ask, tmp_path: Path) -> None:
    out = ask(pd.DataFrame({"n": [1, 2]}), "Say {n}", details=True, schema=LABELS)
    out.to_parquet(tmp_path / "out.parquet")
    back = pd.read_parquet(tmp_path / "out.parquet")
    text = {name: dtype for name, dtype in out.dtypes.items() if dtype == text_dtype()}  # pandas 2.2 reads `string`
    pd.testing.assert_frame_equal(back.astype(text), out)


# ---- a status and an error for every row


def test_each_row_has_its_own_status_and_error(ask: Ask) -> None:
    expected = {
        "fine": ("echo: fine", "ok", None),
        "[[say=It was]][[finish=length]]": ("It ", "truncated", "token limit"),
        "[[finish=content_filter]]": (None, "filtered", "content filter"),
        "[[status=400:content_filter]]": (None, "filtered", "HTTP 400"),
        "[[refusal=I will not]]": (None, "refused", "I will not"),
        "[[content=null]]": (None, "invalid", "no text"),
        "[[tool_calls]]": (None, "ok", None),
        "[[status=400]]": (None, "failed", "HTTP 400"),
        "[[status=413]]": (None, "failed", "HTTP 413"),
        "[[surrogate]]": ("half a pair: \ufffd", "ok", None),
        "[[content=]]": ("", "ok", None),
    }
    out = ask(pd.DataFrame({"x": list(expected)}), "x", details=True, max_attempts=1)
    for position, (text, status, error) in enumerate(expected.values()):
        row = out.iloc[position]
        assert cells([row.response, row.response_status]) == [text, status]
        assert (error or "") in (cells([row.response_error])[0] or "")
        assert pd.isna(row.response_error) == (status == "ok")
        assert pd.isna(row.response_prompt_tokens) == ("status=" in row.x)


def test_a_label_that_does_not_fit_is_null_and_quoted(ask: Ask) -> None:
    says = [
        "[[say=positive]]",
        "[[say=Positive]]",
        "[[label=neutral]]",
        "[[say=negative]][[finish=length]]",
        "[[refusal=no]]",
    ]
    out = ask(pd.DataFrame({"x": says}), "x", schema=LABELS)
    assert cells(out.response) == ["positive", None, None, None, None]
    assert out.response_status.tolist() == ["ok", "invalid", "invalid", "truncated", "refused"]
    quoted = [None, "'Positive'", "neutral", "'nega'", "no"]
    assert all((want or "") in (said or "") for want, said in zip(quoted, cells(out.response_error), strict=True))


def test_several_answers_are_a_list_in_the_cell(ask: Ask) -> None:
    out = ask(pd.DataFrame({"x": ["a", "[[refusal=no]]", None]}), "x", n=3)
    assert out.response.tolist() == [["echo: a", "echo: a (2)", "echo: a (3)"], [None] * 3, None]
    assert out.response_status.tolist() == ["ok", "refused", "skipped"]


def test_labels_beside_one_that_does_not_fit_come_back_from_the_checkpoint(ask: Ask, tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": ["a", "[[say=positive]][[refusal=no]]", "[[label=neutral]]"]})
    first, again = (ask(frame, "x", schema=LABELS, n=2, checkpoint=tmp_path) for _ in range(2))
    assert first.response_status.tolist() == ["ok", "refused", "invalid"]
    assert again.response.tolist() == first.response.tolist()


def test_on_error_raise_names_the_row_and_carries_the_frame(ask: Ask) -> None:
    frame = pd.DataFrame({"x": ["a", "[[status=400]]", "c"]}, index=["r", "s", "s"])
    with pytest.raises(RowFailed, match=r"row 1 \(label 's'\) failed: HTTP 400") as raised:
        ask(frame, "x", on_error="raise", max_concurrency=1)
    assert (raised.value.position, raised.value.label) == (1, "s")
    assert raised.value.frame is not None
    assert raised.value.frame.response_status.tolist() == ["ok", "failed", "pending"]
    assert raised.value.frame.index.equals(frame.index)
    travelled = pickle.loads(pickle.dumps(raised.value))  # out of a process pool
    assert (travelled.args, travelled.position, travelled.label) == (raised.value.args, 1, "s")
    assert travelled.frame.equals(raised.value.frame)


# ---- where


def test_a_frame_filled_in_two_halves_equals_one_filled_at_once(server: SimulatedServer, ask: Ask) -> None:
    frame = pd.DataFrame({"x": ["a", "b", None, "d", "e"]}, index=[0, 0, 1, 1, 2])
    mask = np.array([True, False, True, False, True])
    for keywords in ({}, {"schema": LABELS}, {"n": 2}, {"output": "y"}):
        half = ask(frame, "x", where=mask, **keywords)
        name = keywords.get("output", "response")
        assert half[f"{name}_error"].tolist()[1::2] == ["not selected"] * 2
        pd.testing.assert_frame_equal(ask(half, "x", where=~mask, **keywords), ask(frame, "x", **keywords))


def test_missing_asks_again_what_has_no_answer_and_keeps_the_rest(server: SimulatedServer, ask: Ask) -> None:
    frame = pd.DataFrame({"x": ["a", "[[status=400]]", None, "[[refusal=no]]"]})
    first = ask(frame, "x", where="missing")
    assert first.response_status.tolist() == ["ok", "failed", "skipped", "refused"]
    received = server.stats().received
    mended = first.assign(x=["changed", "b", None, "d"])
    second = ask(mended, "x", where="missing")
    assert cells(second.response) == ["echo: a", "echo: b", None, "echo: d"]
    assert second.response_status.tolist() == ["ok", "ok", "skipped", "ok"]
    assert cells(second.response_error) == [None, None, "missing value in column 'x'", None]
    assert server.stats().received == received + 2


def test_a_call_of_tools_and_an_empty_answer_from_csv_are_not_paid_for_again(
    server: SimulatedServer, ask: Ask, tmp_path: Path
) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    first = ask(pd.DataFrame({"x": ["a [[tool_calls]]", "[[content=]]", "[[status=400]]"]}), "x", tools=[tool])
    assert first.response_status.tolist() == ["ok", "ok", "failed"]
    first.to_csv(tmp_path / "out.csv", index=False)
    received = server.stats().received
    second = ask(pd.read_csv(tmp_path / "out.csv"), "x", tools=[tool], where="missing")
    assert second.response_status.tolist() == ["ok", "ok", "failed"]
    assert server.stats().received == received + 1


def test_labels_that_are_there_already_are_kept_among_the_new_ones(ask: Ask) -> None:
    frame = pd.DataFrame({"x": ["[[say=b]]", "[[say=c]]"], "response": pd.Categorical(["a", None])})
    out = ask(frame, "x", schema=["c", "b", "a"], where="missing")
    assert out.response.tolist() == ["a", "c"]
    assert out.response.cat.categories.tolist() == ["c", "b", "a"]


# ---- nothing is sent for a call that cannot be made


BAD_CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mistyped column": ("txt", {}),
    "unknown column": ("{txt}", {}),
    "no field": ("Translate it.\n", {}),
    "attribute": ("{x.password}", {}),
    "broken array": ([{"role": "user"}], {}),
    "failing function": (lambda row: row.txt, {}),
    "format spec": ("{x:.2f}", {}),
    "missing value": ("x", {"na": "raise"}),
    "column in the way": ("x", {"output": "y"}),
    "kept values of another kind": ("x", {"output": "y", "where": [True, False, False]}),
    "short mask": ("x", {"where": [True]}),
    "mask with nulls": ("x", {"where": [True, None, False]}),
    "empty schema": ("x", {"schema": []}),
    "two schemas": ("x", {"schema": LABELS, "response_format": {"type": "json_object"}}),
    "typo": ("x", {"checkpont": "runs/x"}),
    "stream": ("x", {"stream": True}),
    "choice": ("x", {"na": "drop"}),
    "parameter": ("x", {"temperature": float("nan")}),
    "sentinel": ("x", {"temperature": openai.NOT_GIVEN}),
    "prices": ("x", {"prices": {"input": 1}}),
    "no model": ("x", {"model": None}),
    "url": ("x", {"base_url": "localhost"}),
}


@pytest.mark.parametrize(("prompt", "keywords"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_call_that_cannot_be_made_sends_nothing(
    server: SimulatedServer, ask: Ask, prompt: Any, keywords: dict[str, Any]
) -> None:
    frame = pd.DataFrame({"x": ["a", "b", None], "y": [1, 2, 3]})
    before = frame.copy(deep=True)
    with pytest.raises(LLMFrameError) as raised:
        ask(frame, prompt, **keywords)
    assert raised.value.frame is None
    assert server.stats().received == 0
    pd.testing.assert_frame_equal(frame, before)


# ---- what is in a key


def test_how_a_request_is_sent_is_no_part_of_it(server: SimulatedServer, ask: Ask, tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": ["a", "b", "a", None]})
    call: dict[str, Any] = {"checkpoint": tmp_path / "run", "temperature": 0, "seed": 1}
    first = ask(frame, "x", details=True, **call)
    again = [
        {"api_key": "sk-another-key", "base_url": server.base_url + "/"},
        {"timeout": 9.5, "max_attempts": 2, "rpm": 600, "tpm": 10**6, "max_concurrency": 1},
        {"extra_headers": {"x-team": "a"}, "on_error": "raise", "prices": {"input": 1, "output": 1}},
        {"output": "y", "details": True, "na": "keep", "where": [True, True, False, False]},
        {"temperature": 0.0, "seed": np.int64(1)},
    ]
    for keywords in again:
        out = ask(frame, "x", **{**call, **keywords})
        assert out[keywords.get("output", "response")].tolist()[:2] == ["echo: a", "echo: b"]
    assert server.stats().answered == 2
    resumed = ask(frame, "x", details=True, **call)
    assert resumed.response_source.tolist()[:3] == ["checkpoint", "checkpoint", "duplicate"]
    pd.testing.assert_frame_equal(resumed.drop(columns="response_source"), first.drop(columns="response_source"))
    shuffled = ask(frame.iloc[::-1], "x", **call)
    assert cells(shuffled.response) == [None, "echo: a", "echo: b", "echo: a"]
    assert server.stats().answered == 2
    for number, keywords in enumerate(
        [{"temperature": 1}, {"model": "n"}, {"schema": LABELS}, {"system": "Be brief."}]
    ):
        with pytest.warns(LLMFrameWarning, match="0 of . answers in .* fit"):
            ask(frame, "x", **{**call, **keywords})
        assert server.stats().answered == 2 * (number + 2)


def test_without_dedupe_each_occurrence_resumes_as_its_own(server: SimulatedServer, ask: Ask, tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": ["a", "b", "a", "a"]})
    call: dict[str, Any] = {"checkpoint": tmp_path / "run", "dedupe": False, "details": True}
    half = ask(frame, "x", where=[False, False, True, True], **call)
    assert server.stats().answered == 2
    whole = ask(half, "x", where=[True, True, True, False], **call)
    assert server.stats().answered == 4
    again = ask(frame, "x", **call)
    assert server.stats().answered == 4
    pd.testing.assert_frame_equal(again.drop(columns="response_source"), whole.drop(columns="response_source"))


# ---- the doors beside the frame's


def test_a_series_gives_its_answers_alone(server: SimulatedServer) -> None:
    series = pd.Series(["a", None, "c"], index=[3, 3, 1], name="text")
    out = series.llm.complete("Say {}", model="m", base_url=server.base_url, progress=False)
    assert cells(out) == ["echo: Say a", None, "echo: Say c"]
    assert out.index.equals(series.index)


def test_a_list_of_message_arrays_gives_its_answers_in_order(server: SimulatedServer) -> None:
    texts = [f"text {number % 7}" for number in range(50)]
    arrays = [[{"role": "user", "content": text}] for text in texts]
    completions = llmframe.complete(arrays, model="m", base_url=server.base_url, progress=False)
    assert [completion.text for completion in completions] == [f"echo: {text}" for text in texts]
    assert server.stats().answered == 7


def test_what_stops_a_call_of_a_list_carries_the_answers_so_far_and_of_a_frame_the_frame_alone(
    server: SimulatedServer,
) -> None:
    texts = ["one", "[[status=400]]", "two"]
    keywords: dict[str, Any] = {"model": "m", "base_url": server.base_url, "progress": False, "max_concurrency": 1}
    keywords["on_error"] = "raise"
    with pytest.raises(llmframe.RowFailed) as listed:
        llmframe.complete([[{"role": "user", "content": text}] for text in texts], **keywords)
    assert listed.value.completions is not None
    assert [one.status for one in listed.value.completions] == ["ok", "failed", "pending"]
    with pytest.raises(llmframe.RowFailed) as framed:
        pd.DataFrame({"text": texts}).llm.complete("text", **keywords)
    assert framed.value.completions is None
    assert framed.value.frame is not None
    assert framed.value.frame["response_status"].tolist() == ["ok", "failed", "pending"]
