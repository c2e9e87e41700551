"""Templates: `str.format` over column names, with format specs and nothing more."""

from __future__ import annotations

import datetime
import string
from collections.abc import Hashable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.errors import TemplateError
from llmframe.templates import read_template


def render(text: str, row: dict[Hashable, Any]) -> str:
    return read_template(text, {str(name): name for name in row}).render(row)


LITERALS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}")) | st.sampled_from(["{{", "}}"])
SPECS = ["", ":>8", ":08.3f", ":,", ":.2e", ":%", ":+", ":"]


@settings(deadline=None)
@given(
    st.lists(LITERALS | st.tuples(st.sampled_from("abc"), st.sampled_from(SPECS)), max_size=8),
    st.fixed_dictionaries({name: st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) for name in "abc"}),
)
def test_a_template_says_what_str_format_says(pieces: list[str | tuple[str, str]], row: dict[Hashable, Any]) -> None:
    text = "".join(piece if isinstance(piece, str) else f"{{{''.join(piece)}}}" for piece in pieces)
    assert render(text, row) == text.format(**{str(name): value for name, value in row.items()})


@settings(deadline=None)
@given(st.text(alphabet=string.ascii_lowercase[:3] + "{}:!.[]0 \n"))
def test_any_text_is_a_template_or_a_template_error(text: str) -> None:
    try:
        rendered = render(text, {"a": "A", "b": "B", "c": "C"})
    except TemplateError:
        return
    assert rendered == text.format(a="A", b="B", c="C")


@pytest.mark.parametrize(
    "name", ["a.b", "a:b", "a[0]", "a!r", "wow! great", "a b", "a:b:>5", "größe", " a ", "0", "a\nb"]
)
def test_a_columns_whole_name_is_matched_first(name: str) -> None:
    assert render(f"<{{{name}}}>", {"a": "wrong", name: "right"}) == "<right>"


def test_the_longest_column_name_takes_the_field_and_the_rest_is_its_spec() -> None:
    row: dict[Hashable, Any] = {"a": 1, "a:b": 2, "t": datetime.datetime(2024, 5, 6, 7, 8)}
    assert render("{a:b:>3}|{a:>3}|{t:%H:%M}", row) == "  2|  1|07:08"


def test_a_column_whose_label_is_a_number_is_named_by_its_digits() -> None:
    assert render("{0} {1:.1f}", {0: "zero", 1: 1.25}) == "zero 1.2"


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (3, "", "3"),
        (3.0, "", "3.0"),
        (True, "", "True"),
        (1234.5, ",.2f", "1,234.50"),
        (Decimal("1.10"), "", "1.10"),
        (Decimal("1.10"), ".1f", "1.1"),
        (datetime.date(2024, 1, 2), "%d.%m.%y", "02.01.24"),
        ("x", "^5", "  x  "),
        (None, ".2f", ""),
        ("{b}", "", "{b}"),
    ],
)
def test_a_value_is_formatted_as_python_formats_it(value: Any, spec: str, text: str) -> None:
    assert render(f"{{x:{spec}}}" if spec else "{x}", {"x": value, "b": "no"}) == text


class Secretive:
    password = "hunter2"

    def __str__(self) -> str:
        return "shown"

    def __format__(self, spec: str) -> str:
        raise RuntimeError("no specs here")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{x.password}", r"no column 'x\.password'; a template reaches columns only"),
        ("{x.__class__}", "a template reaches columns only"),
        ("{x[0]}", "a template reaches columns only"),
        ("{x!r}", "has a conversion"),
        ("{x!r:>5}", "has a conversion"),
        ("{}", "a field of the template is empty"),
        ("{:>5}", r"no column ':>5'"),
        ("{txt}", r"no column 'txt'; did you mean 'text'\?"),
        ("{quite_else}", r"no column 'quite_else'; the columns are 'x', 'text'"),
        ('{"label": 1}', "for braces that are text"),
        ("{x", r"a lone '\{' at '\{x'"),
        ("x}", r"a lone '\}' at 'x\}'"),
        ("{x:{text}}", r"a lone '\{'"),
        ("{x:>5}", "holds .*, which the spec '>5' does not take: no specs here"),
    ],
)
def test_anything_but_a_column_and_a_spec_is_an_error_that_says_why(text: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said) as raised:
        render(text, {"x": Secretive(), "text": "hello"})
    assert "hunter2" not in str(raised.value)


def test_a_frame_without_columns_says_so() -> None:
    with pytest.raises(TemplateError, match="no column 'x'; the columns are none"):
        render("{x}", {})


def test_its_columns_are_named_once_in_order_of_first_use() -> None:
    assert read_template("{b}{a}{{c}}{b:>2}", {"a": "a", "b": "b", "c": "c"}).columns == ("b", "a")
