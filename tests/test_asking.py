"""Asking again: an answer that does not fit, an endpoint that takes no schema; against a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pydantic
import pytest

import llmframe
from llmframe.asking import MISFITS, Asking
from llmframe.failures import Failure
from llmframe.requests import Requests
from llmframe.results import Completion
from llmframe.schemas import read_schema
from tests.server import SimulatedServer

Ask = Callable[..., pd.DataFrame]


class Review(pydantic.BaseModel):
    stars: int
    summary: str


@pytest.fixture
def ask(server: SimulatedServer) -> Ask:
    def complete(texts: list[str], **keywords: Any) -> pd.DataFrame:
        defaults = {"model": "m", "base_url": server.base_url, "progress": False, "details": True, "schema": Review}
        return pd.DataFrame({"text": texts}).llm.complete("{text}", **defaults | keywords)

    return complete


def test_a_reply_without_an_answer_does_not_end_the_asking_again(ask: Ask, server: SimulatedServer) -> None:
    server.reset(p_empty_choices=0.05)
    out = ask([f"row {number} [[unfit_first=1]]" for number in range(100)])
    assert set(out["response_status"]) == {"ok"}
    assert out["response_attempts"].max() > 2
    assert llmframe.last_run().usage.prompt_tokens == out["response_prompt_tokens"].sum()


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_an_answer_that_does_not_fit_is_asked_again_with_the_error(server: SimulatedServer, ask: Ask, api: str) -> None:
    out = ask(["a [[unfit_first=2]]", "b"], api=api)
    assert out["response_status"].tolist() == ["ok", "ok"]
    assert out["response_attempts"].tolist() == [3, 1]
    assert out["response_stars"].tolist() == [1, 1]
    bodies = [request.body for request in server.requests()]
    turns = max((body["messages" if api == "chat" else "input"] for body in bodies), key=len)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert turns[1]["content"] == '{"unfit": true}'
    assert "stars: Field required" in turns[2]["content"]


def test_all_that_a_row_was_asked_is_in_its_tokens(server: SimulatedServer, ask: Ask) -> None:
    out = ask(["a [[unfit_first=2]]"])
    stats = server.stats()
    assert out["response_prompt_tokens"].tolist() == [stats.prompt_tokens]
    assert out["response_completion_tokens"].tolist() == [stats.completion_tokens]
    assert llmframe.last_run().usage.prompt_tokens == stats.prompt_tokens


def test_an_answer_that_never_fits_is_invalid_after_two_repairs(server: SimulatedServer, ask: Ask) -> None:
    out = ask(["a [[unfit_first=9]]"])
    assert out["response_status"].tolist() == ["invalid"]
    assert out["response"].tolist() == ['{"unfit": true}']
    assert "stars: Field required" in out["response_error"][0]
    assert out["response_stars"].isna().all()
    assert server.stats().answered == 3


def test_a_label_that_is_none_is_asked_again(server: SimulatedServer, ask: Ask) -> None:
    out = ask(["a [[unfit_first=1]]", "b [[label=other]]"], schema=["good", "bad"])
    assert out["response_status"].tolist() == ["ok", "invalid"]
    assert out["response_attempts"].tolist() == [2, 3]


def test_a_repaired_answer_is_kept_under_the_request_that_was_meant(
    server: SimulatedServer, ask: Ask, tmp_path: Path
) -> None:
    first = ask(["a [[unfit_first=1]]", "b [[unfit_first=9]]"], checkpoint=tmp_path)
    again = ask(["a [[unfit_first=1]]", "b [[unfit_first=9]]"], checkpoint=tmp_path)
    assert server.stats().answered == 2 + 3
    pd.testing.assert_frame_equal(
        first.drop(columns="response_source"), again.drop(columns="response_source"), check_exact=True
    )


def test_what_fails_while_it_is_asked_again_keeps_the_answer_that_was_paid_for(
    server: SimulatedServer, ask: Ask
) -> None:
    server.configure(request_burst=1, requests_per_min=1e-6)
    out = ask(["a [[unfit_first=9]]"], max_attempts=1)
    assert out["response_status"].tolist() == ["invalid"]
    assert out["response_prompt_tokens"].tolist() == [server.stats().prompt_tokens]


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("refused", [["json_schema"], ["json_schema", "json_object"]])
def test_an_endpoint_that_takes_no_schema_gets_it_in_the_prompt(
    server: SimulatedServer, ask: Ask, refused: list[str], api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.configure(refuse_formats=refused)
    good = json.dumps({"stars": 4, "summary": "fine"})
    out = ask([f"{n} [[say={good}]]" for n in range(60)], max_concurrency=4, progress=True, api=api)
    assert out["response_status"].eq("ok").all()
    assert out["response_stars"].eq(4).all()
    said = capsys.readouterr().err
    assert said.count("does not take json_schema") == 1
    assert said.count("does not take json_object") == len(refused) - 1
    last = server.requests()[-1].body
    turn = last["messages" if api == "chat" else "input"][-1]["content"]
    assert '"stars"' in turn
    assert "JSON" in turn
    form = last.get("response_format") or (last.get("text") or {}).get("format") or {}
    assert form.get("type") == ("json_object" if len(refused) == 1 else None)
    assert server.stats().failed["400"] <= 4 * len(refused) + 4


REFUSALS = [
    (400, "'response_format.type' must be 'json_schema' or 'text'"),
    (400, "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model."),
    (400, "Invalid schema for response_format 'answer': In context=(), 'required' is required to be supplied."),
    (400, "This response_format type is unavailable now"),
    (422, '{"detail":[{"loc":["body","response_format","type"],"msg":"Input should be \'text\'"}]}'),
    (404, "No endpoints found that support structured_outputs for this model"),
    (500, "failed to parse grammar"),
    (400, "Unsupported parameter: 'text.format' is not supported with this model."),
    (400, "Unknown name \"additionalProperties\" at 'generation_config.response_schema': Cannot find field."),
]
NO_REFUSALS = [
    (400, "This model's maximum context length is 8192 tokens."),
    (429, "Rate limit reached; response_format has nothing to do with it"),
    (401, "Incorrect API key provided."),
    (400, "Invalid 'temperature'"),
]


@pytest.mark.parametrize(("http", "words"), REFUSALS + NO_REFUSALS)
def test_a_refusal_of_the_schema_is_known_by_its_words(http: int, words: str) -> None:
    told: list[str] = []
    requests = Requests("https://api.openai.com/v1", "m", {}, None, None)
    asking = Asking(requests, read_schema(Review), lambda _: [{"role": "user", "content": "a"}], told.append)
    body = asking.fallen_back(0, "json_schema", Failure("row", "request", f"HTTP {http}: {words}", http))
    assert (body is not None) == ((http, words) in REFUSALS)
    assert (asking.form, len(told)) == (("json_object", 1) if (http, words) in REFUSALS else ("json_schema", 0))


def test_once_a_schema_was_taken_no_refusal_is_about_it() -> None:
    requests = Requests("https://api.openai.com/v1", "m", {}, None, None)
    asking = Asking(requests, read_schema(Review), lambda _: [{"role": "user", "content": "a"}], [].append)
    assert asking.repaired(0, 0, {}, Completion(status="ok")) is None
    assert asking.fallen_back(1, "json_schema", Failure("row", "request", "HTTP 400: response_format", 400)) is None


def test_an_answer_that_the_endpoint_found_not_to_fit_is_no_refusal_of_the_schema_unless_none_ever_fits() -> None:
    told: list[str] = []
    requests = Requests("https://api.openai.com/v1", "m", {}, None, None)
    asking = Asking(requests, read_schema(Review), lambda _: [{"role": "user", "content": "a"}], told.append)
    misfit = Failure("retry", "bad body", "HTTP 400: Generated JSON does not match: jsonschema: ''", 400)
    for number in range(MISFITS - 1):
        assert asking.fallen_back(number, "json_schema", misfit) is None
    assert (asking.form, told) == ("json_schema", [])
    assert asking.fallen_back(MISFITS, "json_schema", misfit) is not None
    assert (asking.form, len(told)) == ("json_object", 1)
    assert asking.fallen_back(MISFITS, "json_object", misfit) is None


def test_a_fallback_changes_no_key(server: SimulatedServer, ask: Ask, tmp_path: Path) -> None:
    good = json.dumps({"stars": 4, "summary": "fine"})
    texts = [f"{n} [[say={good}]]" for n in range(5)]
    ask(texts, checkpoint=tmp_path)
    server.configure(refuse_formats=["json_schema"])
    assert ask(texts, checkpoint=tmp_path)["response_source"].eq("checkpoint").all()


def test_a_property_named_like_a_column_of_ours_gets_an_underscore_and_it_is_said_once(
    ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = {"type": "object", "properties": {"model": {"type": "string"}}, "required": ["model"]}
    for _ in range(2):
        out = ask(["a"], schema=schema, progress=True)
    assert out["response_model_"].tolist() == ["echo: a"]
    assert out["response_model"].tolist() == ["m"]
    assert capsys.readouterr().err.count("the property 'model' is in column 'response_model_'") == 1


def test_two_properties_with_one_column_are_refused_before_asking(server: SimulatedServer, ask: Ask) -> None:
    schema = {"type": "object", "properties": {"status": {"type": "string"}, "status_": {"type": "string"}}}
    with pytest.raises(llmframe.SchemaError, match="'status' and 'status_' would both"):
        ask(["a"], schema=schema)
    assert server.stats().received == 0


def test_the_answer_is_json_also_where_it_came_in_a_fence(ask: Ask) -> None:
    fenced = '```json\n{"stars": 4, "summary": "fine",}\n```'
    out = ask([f"[[say={fenced}]]"])
    assert json.loads(out["response"][0]) == {"stars": 4, "summary": "fine"}
    assert out["response_attempts"].tolist() == [1]


def test_json_that_was_cut_is_truncated_and_not_asked_again(server: SimulatedServer, ask: Ask) -> None:
    out = ask(["a"], max_tokens=3)
    assert out["response_status"].tolist() == ["truncated"]
    assert out["response_stars"].isna().all()
    assert server.stats().answered == 1


def test_a_bad_request_of_another_kind_is_no_refusal_of_the_schema(server: SimulatedServer, ask: Ask) -> None:
    out = ask(["a [[status=400]]", "b"])
    assert out["response_status"].tolist() == ["failed", "ok"]
    assert all(request.body["response_format"]["type"] == "json_schema" for request in server.requests())


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_either_api_is_asked_for_the_schema_in_its_own_form_and_fills_typed_columns(
    server: SimulatedServer, ask: Ask, api: str, tmp_path: Path
) -> None:
    class Inner(pydantic.BaseModel):
        name: str
        count: int | None = None

    class Form(pydantic.BaseModel):
        title: str
        stars: int
        level: Literal[1, 2] | None
        mood: Literal["good", "bad"]
        inner: Inner
        many: list[Inner]

    out = ask(["a", None, "[[say=no]]"], schema=Form, api=api)
    body = server.requests()[0].body
    asked = body["text"]["format"] if api == "responses" else body["response_format"]["json_schema"]
    assert asked["strict"] is True
    assert sorted(asked["schema"]["properties"]) == ["inner", "level", "many", "mood", "stars", "title"]
    assert out["response_status"].tolist() == ["ok", "skipped", "invalid"]
    assert out["response_title"][0] == "echo: a"
    assert out["response_stars"].dtype == pd.Int64Dtype()
    out.to_parquet(tmp_path / "out.parquet")
    back = pd.read_parquet(tmp_path / "out.parquet")
    assert back.dtypes.astype(str).equals(out.dtypes.astype(str))
    assert back["response_inner"][0] == out["response_inner"][0]
    assert back["response_many"][0].tolist() == out["response_many"][0]
    assert back["response_level"].isna().tolist() == [False, True, True]
