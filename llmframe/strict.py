"""JSON Schemas: any of them to one plain form, from there to the form the API's strict mode takes, and to a key's.

Pure. Strict mode wants an object at the root, every property required and none besides
(https://platform.openai.com/docs/guides/structured-outputs); what it and other servers may not know is said in the
description, so that the model reads it and the validation on return holds it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from llmframe.errors import SchemaError

JsonSchema = dict[str, Any]

API_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what the API takes as the name of a json_schema
KNOWN = frozenset({"type", "enum", "anyOf", "items", "properties", "required", "additionalProperties", "$ref", "$defs"})
DROPPED = frozenset(
    {
        "title",
        "default",
        "examples",
        "example",
        "discriminator",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$schema",
        "$id",
        "$comment",
        "definitions",
        "nullable",
        "const",
        "oneOf",
        "allOf",
    }
)  # said in another way, or nothing that an answer could keep to
LOOSE = frozenset(
    {"prefixItems", "patternProperties", "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "allOf"}
)  # no server's strict mode has them
UNFOLDED = 10_000_000  # characters of a key with its references followed; eight models that know one another have more
_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", list: "array"}
OWN_MAPS = frozenset(  # names in them are the user's
    {"properties", "$defs", "definitions", "patternProperties", "dependentSchemas"}
)


def plain(schema: Mapping[str, Any]) -> JsonSchema:
    """Bring a schema into one form, however it was written.

    ``const`` becomes ``enum``, ``oneOf`` and a list of types ``anyOf``, ``definitions`` ``$defs``, a lone ``allOf``
    what it holds; a reference at the root is followed. Titles, defaults and examples go.

    Raises
    ------
    SchemaError
        A reference that leads nowhere, or out of the schema.

    Examples
    --------
    >>> plain({"type": "object", "title": "T", "properties": {"a": {"const": 1, "title": "A"}}})
    {'type': 'object', 'properties': {'a': {'enum': [1]}}}
    """
    definitions = {**schema.get("definitions", {}), **schema.get("$defs", {})}
    root = {name: value for name, value in schema.items() if name not in ("definitions", "$defs")}
    made: JsonSchema = _plain(root)
    defs = {name: _plain(value) for name, value in definitions.items()}
    followed: set[str] = set()
    while "$ref" in made:
        reference = made.pop("$ref")
        if reference == "#" or reference in followed:
            raise _endless(reference)
        followed.add(reference)
        made = {**target(reference, made, defs), **made}
    reached = _reached(made, defs)
    used = {name: definition for name, definition in defs.items() if name in reached}
    _check_ends(made, used)
    if reached:
        made["$defs"] = used
    return made


def _endless(reference: str) -> SchemaError:
    return SchemaError(
        f"the schema's {reference!r:.100} refers to itself with no property or item in between, so that no answer can "
        "be checked against it; let it say what it is"
    )


def _check_ends(root: JsonSchema, defs: Mapping[str, Any]) -> None:
    """Refuse what is defined by itself: jsonschema would follow it until Python's stack is full."""
    ended: set[str] = set()

    def look(part: Any, above: tuple[str, ...]) -> None:
        if not isinstance(part, dict):
            return
        reference = part.get("$ref")
        if reference in above:
            raise _endless(reference)
        if reference is not None and reference not in ended:
            look(target(reference, root, defs), (*above, reference))
            ended.add(reference)
        for inner in _beside(part):
            look(inner, above)

    look(root, ("#",))
    for name, definition in defs.items():
        look(definition, (f"#/$defs/{name}",))


def _beside(schema: JsonSchema) -> list[Any]:
    """Give the schemas inside a schema that the same value has to fit."""
    inside = [schema.get(name) for name in ("not", "if", "then", "else")]
    inside += [*schema.get("anyOf", ()), *schema.get("allOf", ()), *schema.get("dependentSchemas", {}).values()]
    return inside


def _plain(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema  # true and false are schemas too
    made: JsonSchema = {}
    for name, value in schema.items():
        if name in DROPPED:
            continue
        if name in OWN_MAPS and isinstance(value, Mapping):
            made[name] = {key: _plain(item) for key, item in value.items()}
        elif name in ("anyOf", "prefixItems") and isinstance(value, list):
            made[name] = [_plain(item) for item in value]
        elif name in ("items", "additionalProperties", "not", "if", "then", "else"):
            made[name] = _plain(value)
        elif name == "$ref" and isinstance(value, str):
            made[name] = value.replace("#/definitions/", "#/$defs/")
        else:
            made[name] = value
    if "const" in schema:
        made["enum"] = [schema["const"]]
    if "enum" in made:
        made.pop("type", None)  # pydantic writes it or not, by its version
    branches = schema.get("allOf")
    if isinstance(branches, list):
        if len(branches) == 1 and isinstance(branches[0], Mapping):
            made = {**_plain(branches[0]), **made}
        elif branches != [True]:  # which says nothing
            made["allOf"] = [_plain(branch) for branch in branches]
    if isinstance(schema.get("oneOf"), list):
        made["anyOf"] = [_plain(branch) for branch in schema["oneOf"]]
    if isinstance(made.get("type"), list):
        made["anyOf"] = [_of_type(made, kind) for kind in made.pop("type")]
        made = {name: value for name, value in made.items() if name in ("anyOf", "description")}
    if schema.get("nullable") is True:
        made = {"anyOf": [made, {"type": "null"}]}
    branches = [branch for branch in made.get("anyOf", ()) if isinstance(branch, dict)]
    if any(branch.get("type") == "number" for branch in branches):
        for branch in branches:  # how pydantic says ``Decimal``: a pattern in words of its version
            if branch.get("type") == "string":
                branch.pop("pattern", None)
    return made


def _of_type(schema: JsonSchema, kind: str) -> JsonSchema:
    if kind == "null":
        return {"type": "null"}
    return {"type": kind, **{name: value for name, value in schema.items() if name not in ("type", "description")}}


def _name(reference: Any) -> str:
    return str(reference).removeprefix("#/$defs/").replace("~1", "/").replace("~0", "~")


def target(reference: Any, root: JsonSchema, defs: Mapping[str, Any]) -> JsonSchema:
    """Give what a reference leads to.

    Raises
    ------
    SchemaError
        It leads nowhere, or out of the schema.
    """
    if reference == "#":
        return root
    name = _name(reference)
    if not str(reference).startswith("#/$defs/") or not isinstance(defs.get(name), Mapping):
        raise SchemaError(f"the schema refers to {reference!r:.100}, which is not among its $defs; put it there")
    found: JsonSchema = defs[name]
    return found


def _reached(schema: Any, defs: Mapping[str, Any]) -> set[str]:
    reached: set[str] = set()
    left = [schema]
    while left:
        for reference in _references(left.pop()):
            definition = target(reference, {}, defs)
            name = _name(reference)
            if reference != "#" and name not in reached:
                reached.add(name)
                left.append(definition)
    return reached


def _references(schema: Any) -> list[str]:
    found: list[str] = []
    for part in _parts(schema):
        found += [part["$ref"]] if "$ref" in part else []
        found += [reference for inner in _children(part) for reference in _references(inner)]
    return found


def _parts(schema: Any) -> list[JsonSchema]:
    return [schema] if isinstance(schema, dict) else []


def _children(schema: JsonSchema) -> list[Any]:
    children: list[Any] = []
    for name, value in schema.items():
        if name in OWN_MAPS:
            children += value.values()
        elif name in ("anyOf", "allOf", "prefixItems"):
            children += value
        elif name in ("items", "additionalProperties", "not", "if", "then", "else"):
            children.append(value)
    return children


def _mapped(schema: JsonSchema, change: Callable[[Any], Any]) -> JsonSchema:
    """Copy a schema with each schema inside it changed."""
    made: JsonSchema = {}
    for name, value in schema.items():
        if name in OWN_MAPS:
            made[name] = {key: change(item) for key, item in value.items()}
        elif name in ("anyOf", "oneOf", "allOf", "prefixItems"):
            made[name] = [change(item) for item in value]
        elif name in ("items", "additionalProperties", "not", "if", "then", "else"):
            made[name] = change(value)
        else:
            made[name] = value
    return made


def with_nulls(schema: Any) -> Any:
    """Say OpenAPI's ``nullable`` as JSON Schema does, in a schema that is as it came.

    Examples
    --------
    >>> with_nulls({"type": "string", "nullable": True})
    {'anyOf': [{'type': 'string'}, {'type': 'null'}]}
    """
    if not isinstance(schema, dict):
        return schema
    made = _mapped(schema, with_nulls)
    return {"anyOf": [made, {"type": "null"}]} if made.pop("nullable", False) is True else made


def is_loose(schema: JsonSchema) -> bool:
    """Whether a plain schema says what strict mode cannot hold: open objects, tuples, conditions."""
    if LOOSE & schema.keys():
        return True
    if _is_object(schema):
        more = schema.get("additionalProperties")
        if more not in (None, False) or not isinstance(schema.get("properties"), dict):
            return True
    if schema.get("type") == "array" and not isinstance(schema.get("items"), dict):
        return True
    if not schema.keys() & {"type", "enum", "anyOf", "$ref"}:
        return True  # anything at all
    return any(is_loose(inner) for inner in _children(schema) if isinstance(inner, dict))


def check_required(schema: JsonSchema) -> None:
    """Refuse a required property that is not among the properties, where strict mode takes no other.

    Raises
    ------
    SchemaError
        No answer can have it.
    """
    missing = [name for name in schema.get("required", ()) if name not in schema.get("properties", {})]
    if missing and _is_object(schema):
        raise SchemaError(
            f"the schema requires {missing[0]!r}, which is not among its properties "
            f"{list(schema['properties'])!r:.200}; add it there, or take it from 'required'"
        )
    for inner in _children(schema):
        if isinstance(inner, dict):
            check_required(inner)


def strict(schema: JsonSchema) -> JsonSchema:
    """Give a plain schema as strict mode takes it: every property required, those that may be absent nullable.

    Examples
    --------
    >>> strict({"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}}})["properties"]["a"]
    {'anyOf': [{'type': 'string', 'description': 'maxLength: 9'}, {'type': 'null'}]}
    """
    made: JsonSchema = _mapped(_told(schema), strict_part)
    if _is_object(made) and isinstance(made.get("properties"), dict):
        required = set(schema.get("required", ()))
        for name, part in made["properties"].items():
            if name not in required:
                made["properties"][name] = nullable(part)
        made["required"] = list(made["properties"])
        if made.get("additionalProperties") is None:
            made["additionalProperties"] = False
    if "$ref" in made and len(made) > 1:  # strict mode has no siblings of a reference; its description is one
        made = {"anyOf": [{"$ref": made.pop("$ref")}], **made}
    return made


def strict_part(schema: Any) -> Any:
    """Do as `strict` does, for a part that may be true or false."""
    return strict(schema) if isinstance(schema, dict) else schema


def nullable(schema: Any) -> Any:
    """Let a schema also be null."""
    if not isinstance(schema, dict) or takes_null(schema):
        return schema
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {"anyOf": [schema, {"type": "null"}]}


def takes_null(schema: JsonSchema) -> bool:
    """Whether a plain schema has null among what it takes, references left out."""
    branches = schema.get("anyOf", ())
    return (
        schema.get("type") == "null"
        or None in schema.get("enum", ())
        or any(takes_null(branch) for branch in branches if isinstance(branch, dict))
    )


def _told(schema: JsonSchema) -> JsonSchema:
    """Move the keywords that a server may not know into the description."""
    known = {name: value for name, value in schema.items() if name in KNOWN or name in LOOSE}
    if "enum" in known:
        kinds = dict.fromkeys(_JSON_TYPES.get(type(value), "object") for value in known["enum"])
        known = {"type": next(iter(kinds)) if len(kinds) == 1 else list(kinds), **known}  # strict mode wants one
    told = ", ".join(
        f"{name}: {value if isinstance(value, str) else orjson.dumps(value).decode()}"
        for name, value in schema.items()
        if name not in known and name != "description"
    )
    description = schema.get("description")
    if told:
        description = f"{description} ({told})" if description else told
    return {**known, "description": description} if description else known


def _is_object(schema: JsonSchema) -> bool:
    return schema.get("type") == "object" or "properties" in schema


def canonical_form(schema: JsonSchema) -> JsonSchema:
    """Give a plain schema as a key has it, without the names of its definitions: each stands where it is referred to.

    Definitions that refer to one another would grow without measure, and are numbered instead.
    """
    defs = schema.get("$defs", {})

    def followed(part: Any, above: tuple[str, ...]) -> Any:
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            name = part["$ref"]
            rest = {key: value for key, value in part.items() if key != "$ref"}
            if name in above:
                return {**rest, "$ref": len(above) - above.index(name)}  # so many references up
            return followed({**target(name, root, defs), **rest}, (*above, name))
        return _ordered(_mapped(part, lambda inner: followed(inner, above)))

    root = {name: value for name, value in schema.items() if name != "$defs"}
    if not _keeps_measure(root, defs):
        return _numbered(root, defs)
    made: JsonSchema = followed(root, ("#",))
    return made


def _keeps_measure(root: JsonSchema, defs: Mapping[str, Any]) -> bool:
    left = UNFOLDED
    known: dict[str, tuple[int, list[str]]] = {}

    def follow(name: str, above: tuple[str, ...]) -> None:
        nonlocal left
        if name not in known:
            definition = target(name, root, defs)
            known[name] = len(json.dumps(definition)), _references(definition)
        size, references = known[name]
        left -= size
        for reference in references:
            if left > 0 and reference not in above:
                follow(reference, (*above, reference))

    follow("#", ("#",))
    return left > 0


def _numbered(root: JsonSchema, defs: Mapping[str, Any]) -> JsonSchema:
    """Give a schema and its definitions in a list, in the order in which they are met, each reference by its place."""
    places = {"#": 0}
    made: list[Any] = []

    def numbered(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            part = {**part, "$ref": places.setdefault(part["$ref"], len(places))}
        return _ordered(_mapped(part, numbered))

    while len(made) < len(places):
        definition = target(list(places)[len(made)], root, defs)
        made.append(numbered(json.loads(json.dumps(definition, sort_keys=True))))  # no order of names is in a key
    return {"definitions": made}


def _ordered(schema: JsonSchema) -> JsonSchema:
    required = schema.get("required")
    return {**schema, "required": sorted(required)} if isinstance(required, list) else schema
