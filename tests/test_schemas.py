"""Schemas: labels as the API takes them, and answers read by them without a guess."""

from __future__ import annotations

import enum
from typing import Any, Literal

import jsonschema
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.errors import SchemaError
from llmframe.schemas import Labels, Unfit, read_schema


class Mood(str, enum.Enum):  # noqa: UP042
    GOOD = "good"
    BAD = "bad"


class Feeling(enum.StrEnum):
    GOOD = "good"
    BAD = "bad"


class Plain(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Stars(enum.IntEnum):
    ONE = 1
    TWO = 2


SENTIMENT = Labels(("positive", "negative"))
SCORE = Labels((1, 2, 10))


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        (["positive", "negative"], ("positive", "negative")),
        (("b", "a"), ("b", "a")),
        ([3, 1, 2], (3, 1, 2)),
        (range(1, 4), (1, 2, 3)),
        (["only"], ("only",)),
        (["two words", "größer", "Positive", "positive"], ("two words", "größer", "Positive", "positive")),
        (["1", "2"], ("1", "2")),
        (np.array(["a", "b"]), ("a", "b")),
        ([np.int64(1), np.int8(2)], (1, 2)),
        (["a\ud800"], ("a\ufffd",)),
        (list(Mood), ("good", "bad")),
        (list(Feeling), ("good", "bad")),
        (list(Plain), ("good", "bad")),
        (list(Stars), (1, 2)),
        (pd.Series(["b", "a", "b"]).unique(), ("b", "a")),
        (pd.Series(["b", "a"], dtype="string").array, ("b", "a")),
        (pd.Series(["b", "a"]).astype("category").cat.categories, ("a", "b")),
        (pd.Index([3, 1]), (3, 1)),
        (pd.Series([3, 1], index=[0, 0]), (3, 1)),
        (pd.array([3, 1], dtype="Int64"), (3, 1)),
        ({"b": 1, "a": 2}.keys(), ("b", "a")),
        ({1: "b", 2: "a"}.values(), ("b", "a")),
        (Literal["b", "a"], ("b", "a")),
        (Literal[2, 1], (2, 1)),
        (Mood, ("good", "bad")),
        (Feeling, ("good", "bad")),
        (Plain, ("good", "bad")),
        (Stars, (1, 2)),
    ],
)
def test_labels_keep_their_order_and_their_type(schema: Any, values: Any) -> None:
    labels = read_schema(schema)
    assert labels == Labels(values)
    assert labels is not None
    assert [type(label) for label in labels.values] == [type(label) for label in values]
    assert labels.dtype.categories.tolist() == list(values)


@pytest.mark.parametrize("members", [Mood, Feeling, Plain])
def test_an_answer_that_is_the_value_of_an_enums_member_is_that_label(members: Any) -> None:
    labels = read_schema(list(members))
    assert labels is not None
    assert labels.read('{"label": "good"}') == labels.read("good") == "good"
    assert labels.canonical == Labels(("good", "bad")).canonical


def test_no_schema_is_none() -> None:
    assert read_schema(None) is None


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ([], r"has no labels; name at least one"),
        (np.array([]), r"has no labels"),
        (["a", "b", "a"], "the label 'a' is given 2 times"),
        ([1, 2, 2, 2], "the label 2 is given 3 times"),
        (["\ud800", "\udfff"], "is given 2 times"),
        (["a", 1], "the label 1 is of type int; labels are all text or all whole numbers"),
        ([1, "a"], "the label 'a' is of type str"),
        ([True, False], "the label True is of type bool"),
        ([1, True], "the label True is of type bool"),
        ([1.0, 2.0], "the label 1.0 is of type float"),
        (["a", None], "the label None is of type NoneType"),
        (["a", float("nan")], "the label nan is of type float"),
        ([["a"]], r"the label \['a'\] is of type list"),
        ([""], "the label '' is empty or has white space around it"),
        ([" a"], "the label ' a' is empty or has white space around it"),
        (["a\n"], "white space around it"),
        ([2**60], "beyond 53 bits"),
        ("positive", "schema='positive' is no schema; pass a list of labels"),
        (np.array("positive"), "is no schema; pass a list of labels"),
        (b"ab", "is no schema; pass a list of labels"),
        ({"a"}, r"schema=\{'a'\} is no schema; pass a list of labels, as in .* or list\(...\)"),
        (set(map(str, range(99))), "schema=<set> is no schema; pass a list of labels"),
        (pd.DataFrame({"a": ["b"]}), "schema=<DataFrame> is no schema; pass a list of labels"),
        (pd.Series(["a", "b", "a"]), "the label 'a' is given 2 times; give each label once"),
        (pd.Series(["a", None]), "the label nan is of type float|the label None is of type NoneType"),
        (Literal["a", None], "the label None is of type NoneType"),
        (int, "schema=<class 'int'> is no schema"),
        ({"type": "object"}, "not that of an object with properties"),
        (5, "schema=5 is no schema"),
        (np.array("a"), "is no schema; pass a list of labels"),
    ],
)
def test_labels_that_cannot_be_asked_for_are_refused(schema: Any, said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        read_schema(schema)


@pytest.mark.parametrize(
    ("labels", "text", "answer"),
    [
        (SENTIMENT, '{"label": "positive"}', "positive"),
        (SENTIMENT, ' {"label":"negative"}\n', "negative"),
        (SENTIMENT, "positive", "positive"),
        (SENTIMENT, "\nnegative ", "negative"),
        (SCORE, '{"label": 10}', 10),
        (SCORE, "2", 2),
        (Labels(("1", "2")), '{"label": "1"}', "1"),
        (Labels(("1", "2")), "2", "2"),
        (Labels(("gut", "größer")), '{"label": "gr\\u00f6\\u00dfer"}', "größer"),
    ],
)
def test_an_answer_is_a_label_alone_or_in_the_object_asked_for(labels: Labels, text: str, answer: Any) -> None:
    read = labels.read(text)
    assert read == answer
    assert type(read) is type(answer)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (SENTIMENT, "Positive"),
        (SENTIMENT, "positive."),
        (SENTIMENT, '"positive"'),
        (SENTIMENT, "positive negative"),
        (SENTIMENT, "It is positive"),
        (SENTIMENT, "pos"),
        (SENTIMENT, ""),
        (SENTIMENT, "neutral"),
        (SENTIMENT, '{"label": "neutral"}'),
        (SENTIMENT, '{"label": "Positive"}'),
        (SENTIMENT, '{"label": " positive"}'),
        (SENTIMENT, '{"label": ["positive"]}'),
        (SENTIMENT, '{"label": null}'),
        (SENTIMENT, '{"label": "positive", "why": "it says so"}'),
        (SENTIMENT, '{"Label": "positive"}'),
        (SENTIMENT, '{"sentiment": "positive"}'),
        (SENTIMENT, '["positive"]'),
        (SENTIMENT, '```json\n{"label": "positive"}\n```'),
        (SENTIMENT, '{"label": "positive"'),
        (SENTIMENT, "{}"),
        (SENTIMENT, "null"),
        (SCORE, "1.0"),
        (SCORE, '{"label": 1.0}'),
        (SCORE, '{"label": "1"}'),
        (SCORE, '{"label": true}'),
        (SCORE, "01"),
        (SCORE, "3"),
        (Labels(("1", "2")), '{"label": 1}'),
    ],
)
def test_an_answer_that_does_not_fit_is_never_guessed_at(labels: Labels, text: str) -> None:
    with pytest.raises(Unfit) as raised:
        labels.read(text)
    assert repr(text) in str(raised.value)
    assert repr(labels.values[0]) in str(raised.value)


@settings(deadline=None)
@given(st.text(st.characters()))
def test_any_text_is_a_label_or_unfit(text: str) -> None:
    try:
        said = SENTIMENT.read(text)
    except Unfit as error:
        said = str(error)
    assert said == text.strip() or said.startswith("the answer ")
    assert len(said) < 500


def test_the_format_sent_admits_the_labels_and_nothing_else() -> None:
    for labels in (SENTIMENT, SCORE):
        sent = labels.response_format
        assert sent["type"] == "json_schema"
        assert sent["json_schema"]["strict"] is True
        schema = sent["json_schema"]["schema"]
        for label in labels.values:
            jsonschema.validate({"label": label}, schema)
        for other in ({"label": "neutral"}, {"label": None}, {}, {"label": labels.values[0], "more": 1}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(other, schema)


def test_the_column_of_labels_is_a_category_in_the_order_given() -> None:
    assert pd.Categorical([], dtype=Labels(("b", "a")).dtype).categories.tolist() == ["b", "a"]
    assert not Labels(("b", "a")).dtype.ordered


@pytest.mark.parametrize(
    ("output", "name"), [("sentiment", "sentiment"), ("ist es gut?", "label"), ("a" * 65, "label")]
)
def test_the_model_is_told_what_the_labels_are_of(output: str, name: str) -> None:
    labels = read_schema(["positive", "negative"], output)
    assert labels is not None
    assert list(labels.response_format["json_schema"]["schema"]["properties"]) == [name]
    assert labels.read(f'{{"{name}": "positive"}}') == "positive"


def test_the_name_of_the_column_is_no_part_of_the_key() -> None:
    one, other = read_schema(["a", "b"], "one"), read_schema(["a", "b"], "other")
    assert one is not None
    assert other is not None
    assert one.canonical == other.canonical
