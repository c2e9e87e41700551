"""Options: every keyword's default, its checks, and what the call, `configure` and the environment say of it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmframe
from llmframe import accessor
from llmframe.errors import ConfigurationError
from llmframe.options import FRAME_ONLY, KEYWORDS, Options, _one_typo, call_options, configure, gather
from llmframe.requests import OURS

DEFAULTS = {
    "system": None,
    "examples": None,
    "history": None,
    "images": None,
    "model": None,
    "schema": None,
    "output": "response",
    "details": False,
    "where": None,
    "refresh": False,
    "na": "skip",
    "checkpoint": None,
    "dedupe": True,
    "max_concurrency": None,
    "rpm": None,
    "tpm": None,
    "max_cost": None,
    "max_tokens_total": None,
    "prices": None,
    "timeout": None,
    "max_attempts": 8,
    "on_error": "column",
    "api": "chat",
    "client": None,
    "base_url": None,
    "api_key": None,
    "progress": None,
}


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmframe.options._configured", {})


def client(**keywords: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="sk-test", base_url="http://localhost:1/v1", **keywords)


# ---- the list of keywords


def test_the_defaults_are_those_of_the_manual() -> None:
    options = call_options()
    assert {name: getattr(options, name) for name in KEYWORDS} == DEFAULTS
    assert options.params == {}


@pytest.mark.parametrize("call", [llmframe.LLMFrame.complete, llmframe.LLMFrame.acomplete, llmframe.LLMFrame.messages])
def test_the_signature_shows_every_keyword_and_its_default(call: Any) -> None:
    shown = inspect.signature(call).parameters
    assert [*shown] == ["self", "prompt", *KEYWORDS, "params"]
    assert {name: shown[name].default for name in KEYWORDS} == DEFAULTS
    assert all(shown[name].kind is inspect.Parameter.KEYWORD_ONLY for name in KEYWORDS)


def test_the_docstring_tells_of_every_keyword_and_of_none_besides() -> None:
    documented = inspect.getdoc(accessor.LLMFrame.complete) or ""
    section = documented.split("Parameters\n----------\n")[1].split("\n\nReturns")[0]
    headings = re.findall(r"^(\S.*?)(?: : .*)?$", section, re.MULTILINE)
    named = [name for heading in headings for name in heading.split(", ")]
    assert sorted(named) == sorted(["prompt", *KEYWORDS, "**params"])


def test_the_docstring_of_a_list_names_the_keywords_that_it_refuses() -> None:
    documented = inspect.getdoc(llmframe.complete) or ""
    assert [name for name in re.findall(r"``(\w+)``", documented) if name in KEYWORDS] == [*FRAME_ONLY]


def test_options_have_a_field_for_every_keyword() -> None:
    assert [field.name for field in dataclasses.fields(Options)] == [*KEYWORDS, "params"]


def test_an_unknown_keyword_goes_to_the_api_untouched() -> None:
    params = {
        "temperature": 0.2,
        "max_tokens": 5,
        "reasoning_effort": "low",
        "n": 2,
        "user": "me",
        "top_k": 4,
        "stop": [],
    }
    assert call_options(**params, extra_body={"min_p": 0.1}).params == {**params, "extra_body": {"min_p": 0.1}}


def test_a_parameter_that_is_none_is_left_out_also_where_one_is_configured() -> None:
    assert call_options(temperature=None, stop=None, extra_body={"a": None}).params == {"extra_body": {"a": None}}
    configure(temperature=0)
    assert gather({"temperature": None}).params == {}


def test_options_show_no_key() -> None:
    shown = repr(call_options(api_key="sk-secret", extra_headers={"Authorization": "sk-secret"}))
    assert "sk-secret" not in shown


# ---- checks


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("na", "drop", "na='drop' is not known; it is one of 'skip', 'raise', 'keep'"),
        ("na", None, "na=None is not known"),
        ("na", ["skip"], "is not known"),
        ("on_error", "ignore", "on_error='ignore' is not known; it is one of 'column', 'raise'"),
        ("api", "assistants", "api='assistants' is not known; it is one of 'chat', 'responses'$"),
        ("api", np.array(["chat"]), "is not known"),
        ("details", 1, "details=1 is not known; it is one of True, False"),
        ("details", "yes", "details='yes' is not known"),
        ("refresh", None, "refresh=None is not known"),
        ("dedupe", 0, "dedupe=0 is not known"),
        ("progress", "auto", "progress='auto' is not known; it is one of None, True, False"),
        ("output", "", "output='' is no column name"),
        ("output", 5, "output=5 is no column name"),
        ("output", "\ud800", "is no column name"),
        ("history", "h\ud800", "is no column name"),
        ("model", "m\ud800", "is no model's name"),
        *(("checkpoint", value, "checkpoint=.* is no directory") for value in ("", "a\0b", "a\ud800b", b"a")),
        ("model", 5, "model=5 is no model's name"),
        ("model", "", "model='' is no model's name"),
        ("checkpoint", 5, "checkpoint=5 is no directory"),
        ("checkpoint", True, "checkpoint=True is no directory"),
        *(("n", value, "n=.* has to be a whole number") for value in (0, 2.5, "2", True, float("nan"), float("inf"))),
        ("extra_body", {"n": "2"}, "n='2' has to be a whole number of at least 1"),
        *(("max_attempts", value, "has to be a whole number of at least 1") for value in (0, -1, 1.5, "8", None, True)),
        *(("max_concurrency", value, "has to be a whole number of at least 1") for value in (0, 2.0, "1", True)),
        *(
            (name, value, f"{name}=.* has to be a number above 0")
            for name in ("rpm", "tpm", "timeout")
            for value in (0, -1, float("nan"), float("inf"), "60", True)
        ),
    ],
)
def test_a_value_that_a_keyword_cannot_have_is_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        call_options(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("na", "keep"),
        ("na", "raise"),
        ("on_error", "raise"),
        ("details", True),
        ("progress", False),
        ("max_attempts", 1),
        ("max_concurrency", 1),
        ("rpm", 0.5),
        ("tpm", 10_000),
        ("timeout", 0.1),
        ("timeout", np.float32(2.5)),
        ("max_concurrency", np.int64(4)),
        ("output", "größe"),
        ("checkpoint", Path("runs/x")),
    ],
)
def test_a_value_that_a_keyword_can_have_is_kept(name: str, value: Any) -> None:
    assert getattr(call_options(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("checkpont", "checkpoint"),
        ("checkpoint_", "checkpoint"),
        ("chekcpoint", "checkpoint"),
        ("schemas", "schema"),
        ("shema", "schema"),
        ("outputs", "output"),
        ("detail", "details"),
        ("modle", "model"),
        ("max_concurency", "max_concurrency"),
        ("rps", "rpm"),
        ("rp", "rpm"),
        ("base_ur", "base_url"),
        ("Where", "where"),
        ("max_cots", "max_cost"),
        ("tempreature", "temperature"),
        ("max_token", "max_tokens"),
        ("responce_format", "response_format"),
    ],
)
def test_a_keyword_one_typo_away_from_ours_or_the_apis_is_refused(typo: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"unknown keyword '{typo}'; did you mean '{meant}'\?"):
        call_options(**{typo: 1})


@pytest.mark.parametrize("name", ["top_k", "min_p", "min_tokens", "max_new_tokens", "repetition_penalty", "n", "seed"])
def test_what_other_servers_take_is_sent_to_them(name: str) -> None:
    assert call_options(**{name: 1}).params == {name: 1}


@settings(deadline=None)
@given(st.text(string.ascii_lowercase[:3], max_size=4), st.text(string.ascii_lowercase[:3], max_size=4))
def test_one_typo_is_one_letter_added_left_out_replaced_or_swapped(word: str, known: str) -> None:
    def typos(text: str) -> Iterator[str]:
        for at in range(len(text) + 1):
            yield text[:at] + text[at + 1 :]
            yield text[:at] + text[at : at + 2][::-1] + text[at + 2 :]
            for letter in "abc":
                yield text[:at] + letter + text[at:]
                yield text[:at] + letter + text[at + 1 :]

    assert _one_typo(word, known) == (word != known and word in set(typos(known)))


@pytest.mark.parametrize("name", ["stream", "messages", "input", "prompt"])
def test_a_parameter_that_has_no_meaning_here_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}= "):
        call_options(**{name: True})


def test_no_keyword_of_ours_is_a_name_in_the_body_that_the_api_needs() -> None:
    api = set(openai.types.chat.completion_create_params.CompletionCreateParamsNonStreaming.__annotations__)
    assert api & {*KEYWORDS} <= OURS


@pytest.mark.parametrize(
    ("params", "several"),
    [
        ({}, False),
        ({"n": 1}, False),
        ({"n": 2}, True),
        ({"n": np.int64(2)}, True),
        ({"n": None}, False),
        ({"n": 2.0}, True),
        ({"extra_body": {"n": 2}}, True),
        ({"n": 2, "extra_body": {"n": 1}}, False),
        ({"n": 2, "extra_body": None}, True),
    ],
)
def test_an_answer_is_a_list_where_the_request_asks_for_several(params: dict[str, Any], several: bool) -> None:
    assert call_options(**params).several is several


# ---- the call, configure and the environment


def test_the_call_beats_configure_which_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gather({}).model is None
    monkeypatch.setenv("LLMFRAME_MODEL", "of the environment")
    monkeypatch.setenv("LLMFRAME_CHECKPOINT", "runs/environment")
    assert gather({}).model == "of the environment"
    assert gather({}).checkpoint == "runs/environment"
    configure(model="configured", temperature=0, na="keep")
    assert (gather({}).model, gather({}).na, gather({}).params) == ("configured", "keep", {"temperature": 0})
    assert gather({"model": "of the call", "temperature": 1}).model == "of the call"
    assert gather({"temperature": 1}).params == {"temperature": 1}
    assert gather({"checkpoint": None}).checkpoint is None


def test_configure_adds_to_what_is_configured_and_none_takes_it_back() -> None:
    configure(model="a", temperature=0)
    configure(rpm=60)
    configure(temperature=None)
    assert (gather({}).model, gather({}).rpm, gather({}).params) == ("a", 60, {})
    configure(model=None, rpm=None)
    assert gather({}) == call_options()


@pytest.mark.parametrize(
    "wrong",
    [{"na": "drop"}, {"checkpont": "x"}, {"stream": True}, {"where": [True]}, {"prompt": "x"}, {"max_attempts": 0}],
)
def test_a_wrong_configure_changes_nothing(wrong: dict[str, Any]) -> None:
    configure(model="a", rpm=60)
    with pytest.raises(ConfigurationError):
        configure(model="b", tpm=5, **wrong)
    assert gather({}) == call_options(model="a", rpm=60)


def test_another_way_to_the_endpoint_replaces_the_configured_one_whole() -> None:
    one, other = client(), client()
    configure(client=one, model="m")
    assert gather({}).client is one
    assert gather({"base_url": None, "api_key": None}).client is one
    assert gather({"base_url": "http://a/v1"}) == call_options(base_url="http://a/v1", model="m")
    assert gather({"api_key": "k"}).client is None
    assert gather({"client": None}).client is None
    configure(base_url="http://b/v1", api_key="k")
    assert gather({}) == call_options(base_url="http://b/v1", api_key="k", model="m")
    assert gather({"client": other}) == call_options(client=other, model="m")
    assert gather({"base_url": "http://c/v1"}) == call_options(base_url="http://c/v1", api_key="k", model="m")
    configure(client=one)
    assert gather({}) == call_options(client=one, model="m")
