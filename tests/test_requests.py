"""Requests: the body that is sent, and the key under which its answer is kept."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import openai
import orjson
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.errors import ConfigurationError
from llmframe.messages import user
from llmframe.requests import OURS, Requests, among, canonical, identity
from llmframe.schemas import Labels

OPENAI = "https://api.openai.com/v1"
HELLO = user("Hello")
LABELS = Labels(("positive", "negative"))
PARTS = [
    {"role": "system", "content": "Sei knapp. 简短。"},
    {"role": "user", "content": [{"type": "text", "text": 'Größe?\n"é" \U0001f600\u2028\x7f\x00'}], "name": "Ada"},
]


def key(params: dict[str, Any], messages: Any = HELLO, schema: Any = None, occurrence: int = 0, **other: str) -> str:
    schema = schema.canonical if schema else None
    requests = Requests(other.get("endpoint", OPENAI), other.get("model", "gpt-4o-mini"), params, schema)
    return requests.key(messages, occurrence).hex()


# Keys of the first release. One that changes asks, and bills, every user for every answer again: whatever is done
# to the code, to pydantic, to openai or to pandas, these stay as they are. New ones may be added.
GOLDEN = {
    "one turn": (key({}), "acae1b3e1ca441aae3ab8477be6475b79b8f40182b5bdafdd6b2724ed0793351"),
    "temperature 0": (key({"temperature": 0}), "c0ae29bec26d07e794fa8a95edf1fdc239172a2263ab93473c67fef74f795bb1"),
    "unicode and content parts": (key({}, PARTS), "4445739f5102b893ebe942b0a61d3b1ab45ca3d20f9463c09fae11d95e87d173"),
    "nested parameters": (
        key(
            {"temperature": 0.7, "stop": ["\n", "é"], "logit_bias": {"50256": -100}, "extra": {"a": [None, True, 1e-7]}}
        ),
        "a78592a7a12a9dcdacda2f620bef28b702fd24fbd111712dd6c7980e34112232",
    ),
    "labels": (key({}, schema=LABELS), "8dd84988338e67bd10afddd28dd9051435ad53fdf83b77903c87f06acbdc818d"),
    "numbers for labels": (
        key({}, schema=Labels((1, 2, 3))),
        "0569a04199e72e82b2df5486384a00f8d0443527cf70988c054568ce8759c909",
    ),
    "the third occurrence": (
        key({"temperature": 1}, occurrence=2),
        "bf37ec0065e3bdda92b72fda80aeaecdf17446ed0adc1a56ea338ee2c4ff6efd",
    ),
    "another endpoint": (
        key({}, endpoint="http://localhost:8000/v1", model="Qwen/Qwen3-8B"),
        "1c4b7c93684904cc7314c7a2afa16480b83a1594ecd3156cde68ebacaf338862",
    ),
    "the embedded model": (
        key({}, endpoint="local:b179c952", model="local"),
        "c62087ed00fd54b5c1f4cb10ad7a639f5cea4993fadfe6ab55a59564ab103bd3",
    ),
}


@pytest.mark.parametrize(("made", "pinned"), GOLDEN.values(), ids=GOLDEN)
def test_a_key_never_changes(made: str, pinned: str) -> None:
    assert made == pinned


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (key({"temperature": 0}), key({"temperature": 0.0})),
        (key({"temperature": 0}), key({"temperature": -0.0})),
        (key({"temperature": 0.25}), key({"temperature": np.float32(0.25)})),
        (key({"seed": 5}), key({"seed": np.int64(5)})),
        (key({"a": {"b": [1.0]}}), key({"a": {"b": (1,)}})),
        (key({"a": 1, "b": {"c": 2, "d": 3}}), key({"b": {"d": 3, "c": 2}, "a": 1})),
        (key({}), key({}, [{"content": "Hello", "role": "user"}])),
    ],
)
def test_the_same_request_has_one_key_however_it_is_written(one: str, other: str) -> None:
    assert one == other


def test_whatever_makes_another_request_has_another_key() -> None:
    keys = [
        *(made for made, _ in GOLDEN.values()),
        key({"temperature": True}),
        key({"temperature": "0"}),
        key({"temperature": None}),
        key({"seed": 1}),
        key({}, occurrence=1),
        key({}, model="gpt-4o"),
        key({}, endpoint="https://api.openai.com/v2"),
        key({}, user("Hello ")),
        key({}, [{"role": "system", "content": "Hello"}]),
        key({}, HELLO + HELLO),
        key({}, schema=Labels(("negative", "positive"))),
        key({}, schema=Labels(("1", "2", "3"))),
    ]
    assert len(set(keys)) == len(keys)


def test_how_a_schema_is_put_to_the_api_is_not_in_the_key() -> None:
    asked = Requests(OPENAI, "m", {}, LABELS.canonical, LABELS.response_format)
    assert asked.key(HELLO) == Requests(OPENAI, "m", {}, LABELS.canonical).key(HELLO)


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text()
JSON = st.recursive(
    SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None)
@given(JSON)
def test_the_canonical_form_is_sorted_json_without_white_space(value: Any) -> None:
    plain = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert canonical(value) == plain.encode()
    assert json.loads(canonical(value)) == value


PARAMS = st.dictionaries(st.text(min_size=1).filter(lambda name: name not in OURS), JSON, max_size=4)


@settings(deadline=None)
@given(PARAMS, st.randoms(use_true_random=False))
def test_the_order_of_parameters_changes_no_key(params: dict[str, Any], random: Any) -> None:
    names = list(params)
    random.shuffle(names)
    assert key({name: params[name] for name in names}) == key(params)


@settings(deadline=None)
@given(PARAMS)
def test_the_body_says_what_was_meant(params: dict[str, Any]) -> None:
    requests = Requests(OPENAI, "gpt-4o-mini", params, LABELS.canonical, LABELS.response_format)
    body = json.loads(requests.body(PARTS))
    said = {"model": "gpt-4o-mini", "messages": PARTS, **params, "response_format": LABELS.response_format}
    assert body == said


def test_a_body_without_parameters_is_the_model_and_the_messages() -> None:
    assert orjson.loads(Requests(OPENAI, "m", {}).body(HELLO)) == {"model": "m", "messages": HELLO}


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        np.float64("inf"),
        2**70,
        openai.NOT_GIVEN,
        openai.omit,
        pd.NA,
        {1, 2},
        object(),
        [0, {"a": float("nan")}],
    ],
)
def test_a_parameter_that_json_does_not_have_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="temperature"):
        Requests(OPENAI, "m", {"temperature": value})


@pytest.mark.parametrize("name", ["model", "messages", "stream"])
def test_what_the_body_has_already_cannot_come_in_by_extra_body(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"extra_body= has '{name}'"):
        Requests(OPENAI, "m", {name: True})


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("HTTPS://API.OpenAI.com:443/v1//", "https://api.openai.com/v1"),
        ("http://localhost:80/V1", "http://localhost/V1"),
        ("http://localhost:443/v1", "http://localhost:443/v1"),
        ("https://user:secret@host:8443/v1", "https://host:8443/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
    ],
)
def test_an_endpoint_is_one_however_its_url_is_spelled(url: str, same: str) -> None:
    assert identity(url) == same


HOSTS = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True)
PATHS = st.from_regex(r"(/[A-Za-z0-9_.-]{1,8}){0,3}", fullmatch=True)


@settings(deadline=None)
@given(st.sampled_from(["http", "https"]), HOSTS, st.none() | st.integers(1, 65535), PATHS, st.integers(0, 2))
def test_the_spelling_of_a_url_is_not_in_its_identity(
    scheme: str, host: str, port: int | None, path: str, slashes: int
) -> None:
    at = "" if port is None else f":{port}"
    made = identity(f"{scheme}://{host}{at}{path}")
    assert identity(made) == made
    assert identity(f"{scheme.upper()}://{host.upper()}{at}{path}{'/' * slashes}") == made
    assert identity(f"{scheme}://me:secret@{host}{at}{path}") == made
    default = {"http": 80, "https": 443}[scheme]
    assert (identity(f"{scheme}://{host}:{default}{path}") == made) == (port in (None, default))


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_words_are_found_among_sorted_ones(words: list[int], others: list[int]) -> None:
    found = among(np.array(words, np.uint64), np.sort(np.array(others, np.uint64)))
    assert found.tolist() == [word in others for word in words]
