"""Message arrays: what comes out is plain, well-formed JSON, or an error that says what is wrong and where."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.errors import ConfigurationError, TemplateError
from llmframe.messages import check_messages, plain_json, user, well_formed

USER = {"role": "user", "content": "Hello"}
PARTS = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
ANY_TEXT = st.text(st.characters())


@settings(deadline=None)
@given(ANY_TEXT)
def test_well_formed_text_is_left_alone_and_other_text_loses_its_lone_surrogates_alone(text: str) -> None:
    made = well_formed(text)
    made.encode()
    assert well_formed(made) == made
    if not any("\ud800" <= letter <= "\udfff" for letter in text):
        assert made == text


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("\ud800", "\ufffd"),
        ("a\udfffb", "a\ufffdb"),
        ("\udc00\ud800", "\ufffd\ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\ufeffé\ud800", "\ufeffé\ufffd"),
    ],
)
def test_a_lone_surrogate_becomes_the_replacement_character(text: str, made: str) -> None:
    assert well_formed(text) == made
    assert user(text) == [{"role": "user", "content": made}]


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ([USER], [USER]),
        ((USER,), [USER]),
        (np.array([USER], dtype=object), [USER]),
        ([{**USER, "name": None}], [USER]),
        ([{"role": "user", "content": "\ud800"}], [{"role": "user", "content": "\ufffd"}]),
        ([{"role": "user", "content": ""}], [{"role": "user", "content": ""}]),
        ([{"role": "user", "content": PARTS}], [{"role": "user", "content": PARTS}]),
        (
            [{"role": "tool", "content": "4", "tool_call_id": "1"}],
            [{"role": "tool", "content": "4", "tool_call_id": "1"}],
        ),
        ([USER, CALL], [USER, CALL]),
        ([{"role": np.str_("user"), "content": "x", "n": np.int64(3)}], [{"role": "user", "content": "x", "n": 3}]),
    ],
)
def test_a_message_array_comes_out_as_plain_lists_and_dicts(given: Any, made: Any) -> None:
    assert check_messages(given, "prompt") == made


def test_what_is_checked_is_a_copy() -> None:
    given = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    made = check_messages(given, "prompt")
    made[0]["content"][0]["text"] = "changed"
    assert given[0]["content"] == [{"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Hello", r"m is a string \('Hello'\), not a message array"),
        (USER, "m is of type dict, not a message array"),
        (b"x", "m is of type bytes"),
        (5, "m is of type int"),
        (None, "m is None"),
        ([], "m is an empty message array"),
        (np.array([]), "m is an empty message array"),
        (["Hello"], r"m\[0\] is a string \('Hello'\), not a message"),
        ([[USER]], r"m\[0\] is of type list, not a message"),
        ([USER, {"content": "x"}], r"m\[1\] has no role"),
        ([{"role": "", "content": "x"}], r"m\[0\] has no role"),
        ([{"role": None, "content": "x"}], r"m\[0\] has no role"),
        ([{"role": 1, "content": "x"}], r"m\[0\] has no role"),
        ([USER, USER, {"role": "user"}], r"m\[2\]: its content is missing"),
        ([{"role": "user", "content": None}], r"m\[0\]: its content is None"),
        ([{"role": "user", "content": 5}], r"m\[0\]: its content is of type int"),
        ([{"role": "user", "content": {"text": "x"}}], r"m\[0\]: its content is of type dict"),
        (
            [{"role": "user", "content": [{"type": "x", "at": datetime.date(2024, 1, 1)}]}],
            r"m\[0\]\['content'\]\[0\]\['at'\]",
        ),
        ([{"role": "user", "content": "x", "weight": float("nan")}], r"m\[0\]\['weight'\]=nan is not a JSON number"),
    ],
)
def test_a_wrong_shape_is_named_with_its_place(given: Any, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        check_messages(given, "m")


def test_a_message_that_holds_itself_is_refused() -> None:
    message: dict[str, Any] = {"role": "user", "content": []}
    message["content"].append(message)
    with pytest.raises(TemplateError, match="m holds itself, or is nested too deep to be sent"):
        check_messages([message], "m")


def test_message_arrays_survive_a_parquet_file(tmp_path: Path) -> None:
    arrays = [
        [USER],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ada"}],
        [USER, CALL],
    ]
    parts = [
        [{"role": "user", "content": PARTS}],
        [{"role": "user", "content": [{"type": "text", "text": "no image"}]}],
    ]
    for each in (arrays, parts):
        pd.DataFrame({"m": each}).to_parquet(tmp_path / "m.parquet")
        back = pd.read_parquet(tmp_path / "m.parquet")["m"].tolist()
        assert isinstance(back[0], np.ndarray)
        assert [check_messages(one, "m") for one in back] == each


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(JSON)
def test_json_is_copied_as_it_is(value: Any) -> None:
    assert plain_json(value, "x", ConfigurationError) == value


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (np.float64(0.25), 0.25),
        (np.float32(0.25), 0.25),
        (np.float32(0.1), 0.1),
        (np.array([0.1], "float16"), [0.1]),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array(3), 3),
        (np.array([1, 2]), [1, 2]),
        ((1, 2), [1, 2]),
        ({1: "a", "\ud800": "\udfff"}, {"1": "a", "\ufffd": "\ufffd"}),
    ],
)
def test_numpy_and_tuples_become_json(given: Any, made: Any) -> None:
    plain = plain_json(given, "x", ConfigurationError)
    assert plain == made
    assert type(plain) is type(made)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), 2**64, -(2**63) - 1])
def test_a_number_that_json_cannot_carry_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"x\['a'\]\[1\]="):
        plain_json({"a": [0, value]}, "x", ConfigurationError)


@pytest.mark.parametrize(
    "value", [pd.NA, pd.NaT, {1, 2}, object(), b"x", datetime.date(2024, 1, 1), np.datetime64("2024")]
)
def test_a_value_that_json_does_not_have_is_refused_by_its_type(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="which JSON does not have"):
        plain_json(value, "x", ConfigurationError)
