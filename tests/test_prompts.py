"""Prompts: from any frame and any kind of prompt to the messages of each row."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmframe
from llmframe.errors import ConfigurationError, LLMFrameError, TemplateError
from llmframe.prompts import CHUNK, Missing, Prompts

SYSTEM = {"role": "system", "content": "Be brief."}


def made(frame: pd.DataFrame, prompt: Any, **keywords: Any) -> list[Any]:
    return list(Prompts(frame, prompt, **keywords).render())


def texts(frame: pd.DataFrame, prompt: Any, **keywords: Any) -> list[str]:
    return [row.reason if isinstance(row, Missing) else row[-1]["content"] for row in made(frame, prompt, **keywords)]


def one(prompt: Any, row: dict[Any, Any], **keywords: Any) -> Any:
    (messages,) = made(pd.DataFrame([row]), prompt, **keywords)
    return messages


def deep() -> list[Any]:
    """Give a list in a list, deeper than Python goes."""
    inner: list[Any] = []
    for _ in range(3000):
        inner = [inner]
    return inner


# ---- columns and values


@pytest.mark.parametrize(
    ("values", "dtype", "shown"),
    [
        ([1, 2], "int64", ["1", "2"]),
        ([1, None], "Int64", ["1", "missing value in column 'x'"]),
        ([1, None], "int64[pyarrow]", ["1", "missing value in column 'x'"]),
        ([1.0, 0.1], "float64", ["1.0", "0.1"]),
        ([1.0, 0.1], "float32", ["1.0", "0.1"]),
        ([0.1, None], "Float32", ["0.1", "missing value in column 'x'"]),
        ([0.1, None], "float[pyarrow]", ["0.1", "missing value in column 'x'"]),
        ([0.1, None], "float16", ["0.1", "missing value in column 'x'"]),
        ([True, False], "bool", ["True", "False"]),
        ([True, None], "boolean", ["True", "missing value in column 'x'"]),
        (["a", None], "object", ["a", "missing value in column 'x'"]),
        (["a", float("nan")], "object", ["a", "missing value in column 'x'"]),
        (["a", pd.NaT], "object", ["a", "missing value in column 'x'"]),
        (["a", pd.NA], "string", ["a", "missing value in column 'x'"]),
        (["a", None], "string[pyarrow]", ["a", "missing value in column 'x'"]),
        (["a", None], "category", ["a", "missing value in column 'x'"]),
        ([3, 4], "category", ["3", "4"]),
        (["2024-05-06", None], "datetime64[ns]", ["2024-05-06 00:00:00", "missing value in column 'x'"]),
        ([Decimal("1.10"), None], "object", ["1.10", "missing value in column 'x'"]),
        ([Decimal("1.10")], pd.ArrowDtype(pa.decimal128(5, 2)), ["1.10"]),
        ([datetime.date(2024, 5, 6)], "object", ["2024-05-06"]),
        ([pd.Period("2024-05"), None], "period[M]", ["2024-05", "missing value in column 'x'"]),
        ([1, 0], pd.SparseDtype("int64", 0), ["1", "0"]),
        ([np.int64(7), "b"], "object", ["7", "b"]),
        (["", " "], "object", ["", " "]),
    ],
)
@pytest.mark.parametrize("prompt", ["x", "{x}"])
def test_a_value_of_any_type_is_written_as_it_reads(prompt: str, values: Any, dtype: Any, shown: list[str]) -> None:
    assert texts(pd.DataFrame({"x": pd.Series(values, dtype=dtype)}), prompt) == shown


LISTS = [
    [f"word {number}" for number in range(1200)],
    ["x", None],
    [],
    [[1, 2], [3]],
    [1.5, 0.1],
    [True, False],
    [pd.Timestamp("2024-05-06 07:08:09.000001"), pd.Timestamp("2024-05-07")],
    [{"a": "b", "c": ["d", "e"]}, {"a": None, "c": []}],
]


@pytest.mark.parametrize("cell", LISTS, ids=lambda cell: f"{cell!r:.30}")
@pytest.mark.parametrize("prompt", ["{x}", lambda row: f"{row.x}", jinja2.Template("{{ x }}")])
def test_a_list_read_back_from_parquet_is_written_as_the_list(tmp_path: Path, prompt: Any, cell: list[Any]) -> None:
    frame = pd.DataFrame({"x": [cell]})
    frame.to_parquet(tmp_path / "x.parquet")
    read = pd.read_parquet(tmp_path / "x.parquet")
    assert isinstance(read["x"][0], np.ndarray)
    assert made(read, prompt) == made(frame, prompt)


def test_a_float32_in_a_list_is_written_as_it_reads() -> None:
    assert texts(pd.DataFrame({"x": [np.array([0.1, 1.0], "float32")]}), "{x}") == ["[0.1, 1.0]"]


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ([np.int64(1), np.int64(2)], "[1, 2]"),
        ([np.float64(0.5), None], "[0.5, None]"),
        ([np.float32(0.1)], "[0.1]"),
        ((np.float16(0.1), "a"), "[0.1, 'a']"),
        ([[np.int64(1)], {"a": np.bool_(True)}], "[[1], {'a': True}]"),
        ({np.int64(1): np.str_("a")}, "{1: 'a'}"),
        ([np.datetime64("2024-05-06")], "['2024-05-06 00:00:00']"),
        ([np.timedelta64(1, "D")], "['1 days 00:00:00']"),
        (np.float32(0.1), "0.1"),
    ],
)
@pytest.mark.parametrize("prompt", ["{x}", lambda row: f"{row.x}"])
def test_numpys_scalars_in_a_cell_are_written_as_plain_pythons(prompt: Any, cell: Any, shown: str) -> None:
    assert texts(pd.DataFrame({"x": [cell]}), prompt) == [shown]


def test_a_list_of_numpys_scalars_reads_the_same_from_parquet(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [[np.int64(1), np.int64(2)], [np.int64(3)]]})
    frame.to_parquet(tmp_path / "x.parquet")
    assert texts(pd.read_parquet(tmp_path / "x.parquet"), "{x}") == texts(frame, "{x}")


def test_a_category_of_float32_is_written_as_it_reads() -> None:
    categories = pd.Categorical(np.array([0.1, 1.0, np.nan], "float32"))
    assert texts(pd.DataFrame({"x": categories}), "{x}") == ["0.1", "1.0", "missing value in column 'x'"]


def test_whole_numbers_stay_whole_beside_floats_and_text() -> None:
    frame = pd.DataFrame({"n": [1, 2], "f": [0.5, 1.5], "s": ["a", "b"]})
    assert texts(frame, "{n} {f} {s} {n:03d}") == ["1 0.5 a 001", "2 1.5 b 002"]
    assert texts(frame, lambda row: f"{row.n} {row['f']}") == ["1 0.5", "2 1.5"]


@settings(deadline=None)
@given(st.lists(st.text(st.characters()) | st.none(), max_size=5))
def test_any_text_gives_messages_that_can_be_sent(values: list[str | None]) -> None:
    for messages in made(pd.DataFrame({"x": pd.Series(values, dtype=object)}), "<{x}>", na="keep"):
        messages[0]["content"].encode()


def test_rows_come_in_the_order_of_the_positions_asked_for_over_many_chunks() -> None:
    frame = pd.DataFrame({"x": range(2 * CHUNK + 5)}, index=[0] * (2 * CHUNK + 5))
    positions = np.arange(len(frame))[::-1]
    assert [messages[0]["content"] for messages in Prompts(frame, "x").render(positions)] == [
        str(position) for position in positions
    ]


def write_one(frame: pd.DataFrame) -> None:
    frame.loc[0, "x"] = "edited"


def write_all(frame: pd.DataFrame) -> None:
    frame["x"] = frame["x"].str.upper()


def grow(frame: pd.DataFrame) -> None:
    frame.loc[3] = ["more"]


def delete(frame: pd.DataFrame) -> None:
    del frame["x"]


def rename(frame: pd.DataFrame) -> None:
    frame.columns = ["y"]


@pytest.mark.parametrize("edit", [write_one, write_all, grow, delete, rename])
@pytest.mark.parametrize("prompt", ["x", "{x}", lambda row: row.x])
@pytest.mark.parametrize("dtype", ["object", "string"])
def test_what_is_edited_in_the_frame_meanwhile_is_not_sent(
    dtype: str, prompt: Any, edit: Callable[[pd.DataFrame], None]
) -> None:
    frame = pd.DataFrame({"x": pd.Series(["a", "b", "edited"], dtype=dtype)})
    prompts = Prompts(frame, prompt)
    edit(frame)
    assert [messages[0]["content"] for messages in prompts.render()] == ["a", "b", "edited"]


@pytest.mark.parametrize("frame", [pd.DataFrame({"x": []}), pd.DataFrame({"x": [1]}).head(0)])
@pytest.mark.parametrize("prompt", ["x", "{x}", lambda _: "a", [{"role": "user", "content": "{x}"}]])
def test_an_empty_frame_gives_no_messages(frame: pd.DataFrame, prompt: Any) -> None:
    assert made(frame, prompt) == []


def test_a_frame_without_columns_takes_a_function() -> None:
    assert texts(pd.DataFrame(index=["a", "b"]), lambda _: "Tell me a joke") == ["Tell me a joke"] * 2


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ([0], 0),
        ([0], "{0}"),
        ([("a", "b")], "{('a', 'b')}"),
        ([pd.Timestamp("2024")], pd.Timestamp("2024")),
        (["a b"], "a b"),
    ],
)
def test_a_column_may_have_any_label(columns: list[Any], prompt: Any) -> None:
    frame = pd.DataFrame([["hello"]])
    frame.columns = pd.Index(columns, tupleize_cols=False)
    assert texts(frame, prompt) == ["hello"]


def test_where_a_number_and_a_text_read_the_same_the_text_is_meant() -> None:
    frame = pd.DataFrame([["number", "text"]], columns=pd.Index([1, "1"], dtype=object))
    assert texts(frame, "{1}") == ["text"]


def test_columns_in_levels_are_refused_with_the_way_to_flatten_them() -> None:
    frame = pd.DataFrame([[1]], columns=pd.MultiIndex.from_tuples([("a", "b")]))
    with pytest.raises(ConfigurationError, match=r"MultiIndex.*flatten them first, as in df\.columns = "):
        Prompts(frame, "{a}")


@pytest.mark.parametrize("prompt", ["x", "a{x}", lambda _: "a", jinja2.Template("a")])
def test_a_name_that_two_columns_have_is_refused_where_it_is_read(prompt: Any) -> None:
    frame = pd.DataFrame([[1, 2, 3]], columns=["x", "x", "y"])
    with pytest.raises(TemplateError, match="column 'x' appears 2 times"):
        Prompts(frame, prompt)
    assert texts(frame, "{y}") == ["3"]


# ---- what a string may be


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("txt", r"no column 'txt'; did you mean 'text'\? \(for text that holds a column, write a template"),
        ("", "no column ''"),
        ("Summarise this review", "no column 'Summarise this review'; the columns are 'text', 'n'"),
        (
            "Classify the following review\nas positive or negative.",
            r"has no \{column\} field, so every row would send",
        ),
        ("{txt}", r"no column 'txt'; did you mean 'text'\?"),
        ("{{text}}", "no column"),
        (7, "the prompt is of type int"),
        (None, "the prompt is None"),
        ({"role": "user"}, "the prompt is of type dict"),
        ([], "prompt is an empty message array"),
        (["{text}"], r"prompt\[0\] is a string"),
        (["text", "n"], r"the prompt is a list of columns; write a template, as in '{text} {n}'"),
        (pd.Series(["Hi a"]), "the prompt is a Series; write a template of column names, as in 'Translate: {text}'"),
        ([{"role": "user"}], r"prompt\[0\]: its content is missing"),
        ([{"role": "user", "content": "Hello"}], r"has a \{column\} field.*llmframe\.complete"),
        ([{"role": "user", "content": "{txt}"}], "did you mean 'text'"),
    ],
)
def test_a_prompt_that_brings_no_row_in_is_an_error_before_any_request(prompt: Any, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        Prompts(pd.DataFrame({"text": ["a"], "n": [1]}), prompt)


def test_a_text_without_a_field_will_do_where_the_system_template_brings_the_row_in() -> None:
    assert one("Translate it.", {"x": "Hallo"}, system="It is: {x}") == [
        {"role": "system", "content": "It is: Hallo"},
        {"role": "user", "content": "Translate it."},
    ]
    assert one([{"role": "user", "content": "Go"}], {"x": 1}, system="{x}")[0]["content"] == "1"
    with pytest.raises(TemplateError, match="no column"):
        Prompts(pd.DataFrame({"x": [1]}), "Translate it.", system="You translate.")


# ---- system and examples


def test_the_system_text_comes_first_and_the_examples_before_the_prompts_own_turns() -> None:
    pairs = {("2+2", "4"): 0, ("3+3", "6"): 0}.keys()  # anything that can be read again
    prompts = Prompts(pd.DataFrame({"x": ["5+5"]}), "{x}", system="Be brief.", examples=pairs)
    turns = [("system", "Be brief."), ("user", "2+2"), ("assistant", "4"), ("user", "3+3"), ("assistant", "6")]
    expected = [{"role": role, "content": content} for role, content in [*turns, ("user", "5+5")]]
    assert list(prompts.render()) == [expected]
    assert "3+3" in prompts.description


def test_examples_come_after_the_prompts_own_system_message() -> None:
    own = [SYSTEM, {"role": "developer", "content": "{x}"}, {"role": "user", "content": "Go"}]
    roles = [message["role"] for message in one(own, {"x": 1}, examples=[("a", "b")])]
    assert roles == ["system", "developer", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"system": 5}, "system= is of type int"),
        ({"system": "{txt}"}, "no column 'txt'"),
        ({"system": "x"}, r"system='x' is a column's name, and system= is a template: write '\{x\}'"),
        ({"examples": ["ab"]}, r"examples\[0\] is a string"),
        ({"examples": [("a",)]}, r"examples\[0\] is of type tuple; it has to be a pair"),
        ({"examples": [("a", "b"), ("a", 5)]}, r"examples\[1\]: its assistant side is of type int"),
        ({"examples": 5}, "examples= is of type int"),
        ({"examples": zip("a", "b", strict=True)}, r"examples= is of type zip, .* use up; write list\(...\)"),
        ({"examples": iter([])}, r"examples= is of type list_iterator, .* use up"),
        ({"examples": np.array("ab")}, "examples= is of type ndarray"),
        ({"examples": pd.DataFrame({"x": ["a"]})}, r"examples\[0\] is a string \('x'\); it has to be a pair"),
        ({"na": "drop"}, "na='drop' is not known"),
    ],
)
def test_a_system_or_an_example_that_cannot_be_sent_is_named(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(LLMFrameError, match=said):
        Prompts(pd.DataFrame({"x": [1]}), "{x}", **keywords)


def test_braces_in_an_example_are_text() -> None:
    assert one("{x}", {"x": 1}, examples=[("{x}", '{"a": 1}')])[:2] == [
        {"role": "user", "content": "{x}"},
        {"role": "assistant", "content": '{"a": 1}'},
    ]


# ---- message lists, and columns of message arrays


def test_the_contents_and_names_of_a_message_list_are_templates_also_in_content_parts() -> None:
    prompt = [
        {"role": "system", "content": "Describe {{things}}"},
        {"role": "user", "name": "{x}", "content": [
            {"type": "text", "text": "What is {x:03d}?"},
            {"type": "image_url", "image_url": {"url": "https://a.b/{file}", "detail": "low"}},
        ]},
    ]  # fmt: skip
    assert one(prompt, {"x": 7, "file": "c.png"}) == [
        {"role": "system", "content": "Describe {things}"},
        {"role": "user", "name": "7", "content": [
            {"type": "text", "text": "What is 007?"},
            {"type": "image_url", "image_url": {"url": "https://a.b/c.png", "detail": "low"}},
        ]},
    ]  # fmt: skip


def test_the_role_of_a_message_may_be_a_field_which_has_to_be_there() -> None:
    prompt = [{"role": "{r}", "content": "a"}]
    frame = pd.DataFrame({"r": ["user", "assistant", None]})
    (user, assistant, missing) = made(frame, prompt)
    assert (user[0]["role"], assistant[0]["role"]) == ("user", "assistant")
    assert missing == Missing("missing value in column 'r'")
    with pytest.raises(TemplateError, match=r"row 2 .*prompt\[0\]: its role '\{r\}' is empty for this row"):
        made(frame, prompt, na="keep")
    with pytest.raises(TemplateError, match="no column 'q'"):
        made(frame, [{"role": "user", "name": "{q}", "content": "{r}"}])


def test_a_column_may_hold_message_arrays_as_lists_and_as_parquet_gives_them_back(tmp_path: Path) -> None:
    arrays = [
        [{"role": "user", "content": "a"}],
        [SYSTEM, {"role": "user", "content": "b", "name": "Ada"}, {"role": "assistant", "content": "c"}],
        None,
    ]
    frame = pd.DataFrame({"m": arrays})
    frame.to_parquet(tmp_path / "m.parquet")
    expected = [*arrays[:2], Missing("missing value in column 'm'")]
    assert made(frame, "m") == expected
    assert made(pd.read_parquet(tmp_path / "m.parquet"), "m") == expected
    assert made(pd.read_parquet(tmp_path / "m.parquet", dtype_backend="pyarrow"), "m") == expected


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ([{"content": "x"}], r"the message array in column 'm'\[0\] has no role"),
        ([{"role": "user", "content": None}], "its content is None"),
        ([], "is an empty message array"),
        ({"role": "user", "content": "x"}, "is of type dict, not a message array"),
    ],
)
def test_a_broken_message_array_is_named_with_its_row(cell: Any, said: str) -> None:
    frame = pd.DataFrame({"m": [[{"role": "user", "content": "a"}], cell]}, index=["first", "second"])
    with pytest.raises(TemplateError, match=rf"row 1 \(label 'second'\): .*{said}"):
        made(frame, "m")


# ---- functions and renderers


def test_a_function_is_called_once_for_each_row_however_often_it_is_rendered() -> None:
    calls: list[int] = []

    def prompt(row: Any) -> str:
        calls.append(row.x)
        return f"{row.x} for the {len(calls)}. time"

    prompts = Prompts(pd.DataFrame({"x": [1, 2, 3]}), prompt)
    first = list(prompts.render())
    assert list(prompts.render(np.array([2, 0]))) == [first[2], first[0]]
    assert calls == [1, 2, 3]


def test_a_column_goes_before_a_method_of_a_dict_in_a_function() -> None:
    row = {"items": "apple", "values": 3, "get": 1.5, "copy": None}
    assert one(lambda row: f"{row.items} {row.values} {row.get} {row.copy}", row)[0]["content"] == "apple 3 1.5 None"
    assert one(lambda row: str(dict(row)), row)[0]["content"] == str(row)
    assert one(lambda row: str(list(row.items())), {"x": "a"})[0]["content"] == "[('x', 'a')]"


@pytest.mark.parametrize("nothing", [None, float("nan"), np.nan, pd.NA, pd.NaT])
def test_a_function_may_return_nothing_for_a_row_that_is_to_be_skipped(nothing: Any) -> None:
    frame = pd.DataFrame({"x": [1, 2]})

    def prompt(row: Any) -> Any:
        return nothing if row.x == 1 else "two"

    assert texts(frame, prompt) == ["the prompt function returned no prompt", "two"]
    assert texts(frame, prompt, na="keep") == ["", "two"]
    with pytest.raises(TemplateError, match=r"row 0 \(label 0\): the prompt function returned no prompt"):
        made(frame, prompt, na="raise")


def test_a_function_may_return_messages() -> None:
    assert one(lambda row: [SYSTEM, {"role": "user", "content": row["x"] + "\ud800"}], {"x": "!"}) == [
        SYSTEM,
        {"role": "user", "content": "!\ufffd"},
    ]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (lambda _: 1 / 0, "the prompt function raised ZeroDivisionError: division by zero"),
        (lambda row: row.txt, r"raised AttributeError: no column 'txt'; did you mean 'text'\?"),
        (lambda row: row["txt"], r"raised KeyError: .*no column 'txt'; did you mean 'text'\?"),
        (lambda _: 5, "the prompt function returned a value that is of type int"),
        (lambda _: [{"content": "x"}], r"what the function returned\[0\] has no role"),
        (
            lambda _: [{"role": "user", "content": deep()}],
            "what the function returned holds itself, or is nested too deep",
        ),
        (lambda: "x", "raised TypeError"),
    ],
)
def test_a_function_that_fails_is_named_with_its_row(prompt: Any, said: str) -> None:
    with pytest.raises(TemplateError, match=rf"row 0 \(label 'a'\): .*{said}"):
        made(pd.DataFrame({"text": ["hello"]}, index=["a"]), prompt)


def test_an_async_function_is_refused_and_nothing_is_left_unawaited(recwarn: pytest.WarningsRecorder) -> None:
    async def prompt(row: Any) -> str:
        return str(row.x)

    with pytest.raises(TemplateError, match="the prompt function is async; pass a plain one"):
        one(prompt, {"x": 1})
    assert not recwarn.list


def test_a_series_says_how_its_value_is_written() -> None:
    with pytest.raises(TemplateError, match=r"no column 'text'; the value of a Series is \{\}"):
        pd.Series(["a"], name="text").llm.complete("Translate {text}", model="m")


def test_what_a_function_raised_is_the_errors_cause() -> None:
    with pytest.raises(TemplateError) as raised:
        one(lambda _: 1 / 0, {"x": 1})
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_function_sees_a_missing_value_as_none() -> None:
    frame = pd.DataFrame({"x": [np.nan], "y": pd.Series([None], dtype="Int64"), "t": [pd.NaT]})
    assert texts(frame, lambda row: repr([row.x, row.y, row.t])) == ["[None, None, None]"]


def test_a_jinja_template_is_given_the_row() -> None:
    frame = pd.DataFrame({"name": ["Ada", None], "n": [1, 2]})
    template = jinja2.Template("{% if name %}Hello {{ name }}{% else %}Hello stranger{% endif %} {{ n }}")
    assert texts(frame, template) == ["Hello Ada 1", "Hello stranger 2"]


@pytest.mark.parametrize("text", ["Translate: {{ tetx }}", "{% for one in [1] %}{{ tetx | upper }}{% endfor %}"])
def test_a_mistyped_name_in_a_jinja_template_is_refused(text: str) -> None:
    with pytest.raises(TemplateError, match=r"no column 'tetx'; did you mean 'text'\?"):
        one(jinja2.Template(text), {"text": "a"})


@pytest.mark.parametrize("text", ["{{ text }} {{ text.lenght }}", "{{ text }} {{ at.yaer | upper }}", "{{ cell.a.b }}"])
def test_a_mistyped_attribute_in_a_jinja_template_is_refused(text: str) -> None:
    said = "the template writes '(lenght|yaer|b)' of a value of type (str|Timestamp|int), which has none"
    with pytest.raises(TemplateError, match=said):
        one(jinja2.Template(text), {"text": "a", "at": pd.Timestamp("2024-05-06"), "cell": {"a": 1}})


@pytest.mark.parametrize(
    "text",
    [
        "{{ text }}{% if more is defined %}{{ more }}{% endif %}",
        "{{ text }}{{ more | default('') }}",
        "{{ text }}{% if more %}{{ more }}{% endif %}",
        "{% if text == 'b' %}{% set more = 1 %}{% endif %}{{ text }}{{ more }}",
        "{% macro write(it, more) %}{{ it }}{{ more }}{% endmacro %}{{ write(text) }}",
        "{{ text }}{{ cell.more }}",
        "{{ text }}{{ cell.list[5] }}",
        "{{ text }}{{ none.more }}",
        "{{ text }}{{ text.more | default('') }}",
        "{{ text }}{{ known }}",
        "{% for each in [text] %}{{ each }}{% endfor %}{{ range(0) | join }}",
    ],
)
def test_a_jinja_template_may_ask_for_names_that_are_no_columns(text: str) -> None:
    template = jinja2.Environment().from_string(text, {"known": ""})
    assert one(template, {"text": "a", "cell": {"list": [1]}, "none": None}) == [{"role": "user", "content": "a"}]


def test_a_jinja_template_whose_owner_says_what_becomes_of_unknown_names_keeps_to_that() -> None:
    template = jinja2.Environment(undefined=jinja2.DebugUndefined).from_string("{{ text }} {{ more }}")
    assert texts(pd.DataFrame({"text": ["a"]}), template) == ["a {{ more }}"]


def test_a_renderer_sees_columns_with_numbers_for_labels_by_their_digits() -> None:
    class Renderer:
        def render(self, **row: Any) -> str:
            return repr(row)

    frame = pd.DataFrame([["zero", "text", "number"]], columns=pd.Index([0, "1", 1], dtype=object))
    assert texts(frame, Renderer()) == ["{'0': 'zero', '1': 'text'}"]


@pytest.mark.parametrize(
    ("render", "said"),
    [
        (lambda **_: 5, r"the prompt's render\(\) returned a value that is of type int"),
        (lambda **_: 1 / 0, r"the prompt's render\(\) raised ZeroDivisionError"),
    ],
)
def test_a_renderer_that_fails_is_named_with_its_row(render: Callable[..., Any], said: str) -> None:
    class Renderer:
        pass

    Renderer.render = staticmethod(render)  # type: ignore[attr-defined]
    with pytest.raises(TemplateError, match=rf"row 0 \(label 0\): .*{said}"):
        one(Renderer(), {"x": 1})


# ---- missing values


def test_na_says_what_becomes_of_a_row_with_a_missing_value() -> None:
    frame = pd.DataFrame({"x": ["a", None], "y": ["b", "c"], "unused": [None, None]}, index=["r", "s"])
    assert texts(frame, "{x}{y}") == ["ab", "missing value in column 'x'"]
    assert texts(frame, "{x}{y}", na="keep") == ["ab", "c"]
    assert texts(frame, "{y}", system="{x}") == ["b", "missing value in column 'x'"]
    assert one("x", {"x": None}, na="keep") == [{"role": "user", "content": ""}]
    with pytest.raises(TemplateError, match=r"row 1 \(label 's'\): missing value in column 'x'; fill it, or pass na="):
        made(frame, "{x}{y}", na="raise")


def test_a_missing_value_with_a_format_spec_is_empty_too() -> None:
    frame = pd.DataFrame({"p": [1.5, np.nan], "t": [pd.Timestamp("2024-05-06"), pd.NaT]})
    assert texts(frame, "{p:.2f}/{t:%d.%m.}", na="keep") == ["1.50/06.05.", "/"]


def test_a_row_that_a_spec_does_not_take_is_named() -> None:
    frame = pd.DataFrame({"p": [1.5, "cheap"]}, index=["a", "a"])
    with pytest.raises(TemplateError, match=r"row 1 \(label 'a'\): column 'p' holds 'cheap', which the spec '.2f'"):
        made(frame, "{p:.2f}")


class Unwritable:
    def __str__(self) -> str:
        raise RuntimeError("no connection")

    __repr__ = __str__


@pytest.mark.parametrize("prompt", ["x", "{x}", "{x:>5}"])
def test_a_value_that_cannot_be_written_is_named_with_its_row(prompt: str) -> None:
    frame = pd.DataFrame({"x": ["a", Unwritable()]}, index=["first", "second"])
    with pytest.raises(TemplateError, match=r"row 1 \(label 'second'\): column 'x' holds a value of type Unwritable"):
        made(frame, prompt)


def test_false_is_not_the_column_0() -> None:
    with pytest.raises(TemplateError, match="the prompt is of type bool"):
        made(pd.DataFrame([["a"]]), False)


def test_a_row_that_is_not_wanted_is_no_error() -> None:
    prompts = Prompts(pd.DataFrame({"x": [0, 1]}), lambda row: str(1 / row.x), na="raise")
    rows = list(prompts.render(wanted=np.array([False, True])))
    assert isinstance(rows[0], Missing)
    assert rows[1] == [{"role": "user", "content": "1.0"}]


# ---- df.llm.messages


def test_the_messages_of_a_frame_are_a_series_with_its_index() -> None:
    frame = pd.DataFrame({"x": ["a", None, "c"]}, index=pd.MultiIndex.from_tuples([(1, 1), (1, 1), (2, 1)]))
    series = frame.llm.messages("{x}", where=[True, True, False])
    assert series.index.equals(frame.index)
    assert series.tolist() == [[{"role": "user", "content": "a"}], None, None]
    assert series.dtype == object
    assert frame.head(0).llm.messages("{x}").dtype == object


def test_the_messages_need_no_model_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert pd.DataFrame({"x": ["a"]}).llm.messages("x").tolist() == [[{"role": "user", "content": "a"}]]


@pytest.mark.parametrize(
    ("accessor", "given", "said"),
    [
        (llmframe.LLMFrame, {"x": ["a"]}, "of type dict; give it a pandas DataFrame"),
        (llmframe.LLMFrame, pa.table({"x": ["a"]}), "of type Table; give it a pandas DataFrame"),
        (llmframe.LLMFrame, pd.Series(["a"]), "of type Series; give it a pandas DataFrame"),
        (llmframe.LLMSeries, pd.DataFrame({"x": ["a"]}), "of type DataFrame; give it a pandas Series"),
    ],
)
def test_what_is_no_frame_is_refused_with_what_to_give(accessor: Any, given: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        accessor(given)


VALUES = pd.DataFrame(
    {
        "int": [1, 2],
        "float": [0.1, 1e20],
        "float32": np.array([0.1, 3.0], "float32"),
        "bool": [True, False],
        "nullable": pd.array([7, 8], "Int64"),
        "text": ["é\u2028", "b"],
        "category": pd.Categorical(["x", "y"]),
        "time": [pd.Timestamp("2024-01-02"), pd.Timestamp("2024-01-02 03:04:05.678")],
        "zone": pd.to_datetime(["2024-01-02", "2024-06-02"]).tz_localize("Europe/Berlin"),
        "delta": pd.to_timedelta(["1h", "2 days"]),
        "date": [datetime.date(2024, 1, 2)] * 2,
        "decimal": [Decimal("1.10")] * 2,
        "list": [[1, "a"], [2.5, None]],
    }
)


def test_a_value_is_written_alike_by_every_version_of_pandas_and_numpy() -> None:
    # What is written is in the key: one that changes asks, and bills, every user for every answer again.
    template = " | ".join(f"{{{name}}}" for name in VALUES)
    written = [messages[0]["content"] for messages in Prompts(VALUES, template).render(np.arange(2))]
    assert written == [
        "1 | 0.1 | 0.1 | True | 7 | é\u2028 | x | 2024-01-02 00:00:00 | 2024-01-02 00:00:00+01:00 | 0 days 01:00:00 | "
        "2024-01-02 | 1.10 | [1, 'a']",
        "2 | 1e+20 | 3.0 | False | 8 | b | y | 2024-01-02 03:04:05.678000 | 2024-06-02 00:00:00+02:00 | "
        "2 days 00:00:00 | 2024-01-02 | 1.10 | [2.5, None]",
    ]
