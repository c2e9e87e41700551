"""JSON schemas in their plain, strict and canonical forms."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.errors import SchemaError
from llmframe.requests import canonical
from llmframe.strict import canonical_form, is_loose, plain, strict

NODE = {
    "$ref": "#/$defs/Node",
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
        }
    },
}


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties)}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"const": "a", "title": "A"}, {"enum": ["a"]}),
        ({"const": "a", "type": "string"}, {"enum": ["a"]}),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ({"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ({"type": "string", "nullable": True}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ({"allOf": [{"type": "string"}], "description": "d"}, {"type": "string", "description": "d"}),
        ({"allOf": [True], "type": "string"}, {"type": "string"}),
        ({"type": "string", "default": "x", "examples": ["y"]}, {"type": "string"}),
    ],
)
def test_a_schema_is_the_same_however_it_was_written(written: Any, meant: Any) -> None:
    assert plain(an_object(a=written)) == an_object(a=meant)


def test_a_property_may_be_called_like_a_keyword() -> None:
    schema = an_object(title={"type": "string"}, default={"type": "string"}, anyOf={"type": "string"})
    assert plain(schema) == schema


def test_definitions_are_found_where_older_drafts_have_them() -> None:
    schema = {**an_object(a={"$ref": "#/definitions/A"}), "definitions": {"A": {"type": "string"}}}
    assert plain(schema) == {**an_object(a={"$ref": "#/$defs/A"}), "$defs": {"A": {"type": "string"}}}


def test_a_definition_may_have_a_slash_in_its_name() -> None:
    schema = {**an_object(a={"$ref": "#/$defs/my~1A"}), "$defs": {"my/A": {"type": "string"}}}
    assert plain(schema) == schema
    assert canonical_form(schema) == an_object(a={"type": "string"})


def test_a_reference_that_leads_nowhere_is_refused() -> None:
    for reference in ("#/$defs/Nobody", "https://example.com/schema.json", "#/properties/a"):
        with pytest.raises(SchemaError, match="which is not among its \\$defs"):
            plain(an_object(a={"$ref": reference}))


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}},
        {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}},
        {**an_object(a={"$ref": "#/$defs/A"}), "$defs": {"A": {"$ref": "#/$defs/A"}}},
        {
            **an_object(a={"$ref": "#/$defs/A"}),
            "$defs": {"A": {"oneOf": [{"type": "null"}, {"$ref": "#/$defs/B"}]}, "B": {"not": {"$ref": "#/$defs/A"}}},
        },
        {**an_object(a={"type": "string"}), "anyOf": [{"$ref": "#"}]},
    ],
)
def test_a_schema_that_is_defined_by_itself_is_refused(schema: Any) -> None:
    with pytest.raises(SchemaError, match="refers to itself with no property or item in between"):
        plain(schema)


def test_strict_mode_requires_every_property_and_lets_the_optional_ones_be_null() -> None:
    made = strict(
        plain({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]})
    )
    assert made["required"] == ["a", "b"]
    assert made["additionalProperties"] is False
    assert made["properties"]["b"] == {"anyOf": [{"type": "integer"}, {"type": "null"}]}


def test_what_a_server_may_not_know_is_said_in_the_description() -> None:
    made = strict(plain(an_object(a={"type": "string", "minLength": 3, "format": "email", "description": "Who."})))
    assert made["properties"]["a"] == {"type": "string", "description": "Who. (minLength: 3, format: email)"}


def test_a_reference_stands_alone() -> None:
    schema = {**an_object(a={"$ref": "#/$defs/A", "description": "d"}), "$defs": {"A": {"type": "string"}}}
    assert strict(plain(schema))["properties"]["a"] == {"anyOf": [{"$ref": "#/$defs/A"}], "description": "d"}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "object"},
        {"type": "array"},
        {"type": "array", "prefixItems": [{"type": "integer"}], "items": False},
        {},
        {"not": {"type": "string"}},
    ],
)
def test_what_strict_mode_cannot_hold_is_known(part: Any) -> None:
    assert is_loose(plain(an_object(a=part)))
    assert not is_loose(plain(an_object(a={"type": "integer"})))


def test_names_of_definitions_are_not_in_a_key() -> None:
    one = plain({**an_object(a={"$ref": "#/$defs/A"}), "$defs": {"A": an_object(x={"type": "string"})}})
    two = plain({**an_object(a={"$ref": "#/$defs/my__A"}), "$defs": {"my__A": an_object(x={"type": "string"})}})
    assert canonical_form(one) == canonical_form(two) == an_object(a=an_object(x={"type": "string"}))


def test_a_recursive_schema_has_an_end_in_a_key() -> None:
    made = canonical_form(plain(NODE))
    assert made["properties"]["next"]["anyOf"][0]["properties"]["next"]["anyOf"][0] == {"$ref": 1}


def mutual(names: list[str]) -> dict[str, Any]:
    """Give a schema of definitions each of which refers to all, which has a path for every order of them."""
    child = {"type": "array", "items": {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names]}}
    kinds = {name: an_object(kind={"enum": [number]}, child=child) for number, name in enumerate(names)}
    return plain({"$ref": f"#/$defs/{names[0]}", "$defs": kinds})


def test_the_key_of_definitions_that_all_refer_to_one_another_is_short_and_without_their_names() -> None:
    made = canonical_form(mutual([f"M{number}" for number in range(30)]))
    assert len(canonical(made)) < 100_000
    assert made == canonical_form(mutual([f"my__M{30 - number}" for number in range(30)]))
    assert made != canonical_form(mutual([f"M{number}" for number in range(31)]))


def test_the_order_of_properties_is_in_no_key_however_large_the_schema_is() -> None:
    one = mutual([f"M{number}" for number in range(30)])
    two = json.loads(json.dumps(one), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert canonical(canonical_form(one)) == canonical(canonical_form(two))


SCALARS = st.sampled_from(
    [{"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {"enum": ["a", "b"]}, {"const": 1}]
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(lambda item: {"type": "array", "items": item}, inner),
        st.builds(lambda item: {"anyOf": [item, {"type": "null"}]}, inner),
        st.builds(
            lambda properties: {"type": "object", "properties": properties},
            st.dictionaries(st.sampled_from(["a", "b", "title", "type"]), inner, min_size=1),
        ),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(SCHEMAS)
def test_strict_schemas_are_schemas_and_being_plain_or_strict_again_changes_nothing(part: Any) -> None:
    simple = plain(an_object(root=part))
    assert plain(simple) == simple
    made = strict(simple)
    jsonschema.Draft202012Validator.check_schema(made)
    again = strict(plain(made))
    assert again["properties"] == made["properties"]
